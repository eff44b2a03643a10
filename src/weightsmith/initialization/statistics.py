"""What a file of activations says of the inputs of each layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from weightsmith import dtypes
from weightsmith.checkpoint.checkpoint import Checkpoint
from weightsmith.checkpoint.tensor import Array, Tensor
from weightsmith.errors import CheckpointError
from weightsmith.kernels.convert import widen

_FLOAT64 = np.dtype(np.float64)
# Rows that are held in float64 at a time.
_ROWS = 4096


@dataclass(frozen=True)
class Components:
    """Principal directions of a layer's inputs.

    Attributes:
        directions: ``[count, in]``, float64, orthonormal rows, by falling variance.
        ratios: ``[count]``: the share of the variance that each explains.
    """

    directions: Array
    ratios: Array


class Activations:
    """Samples of the inputs of layers, or their Gram matrices, by module.

    A tensor is named as the module, or as its weight. It holds samples ``[n, in]``, or ``X^T X`` as a symmetric matrix
    ``[in, in]``.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Look at a file of activations."""
        self._checkpoint = checkpoint

    def check(self, module: str, width: int) -> None:
        """Check that there is something for a layer.

        Args:
            module: the layer's name.
            width: how many inputs it has.

        Raises:
            CheckpointError: if there is nothing, or it is of another shape.
        """
        tensor = self._find(module)
        if tensor is None:
            raise CheckpointError(
                f"{self._checkpoint.name} has no activations of {module}: save what goes into it as "
                f"[samples, {width}], or its Gram matrix, under that name; or leave the layer out (--target)"
            )
        fits = len(tensor.shape) == 2 and tensor.shape[1] == width and tensor.shape[0] > 0
        if not fits or not dtypes.is_float(tensor.dtype):
            raise CheckpointError(
                f"{self._checkpoint.name}: {tensor.name} is {dtypes.name_of(tensor.dtype)} {list(tensor.shape)}, and "
                f"{module} takes {width} inputs: floats [samples, {width}], or a Gram matrix [{width}, {width}], are "
                "needed"
            )

    def components(self, module: str, count: int) -> Components:
        """Return the leading principal components of a layer's inputs.

        Of samples the mean is taken away first. Gram matrices do not tell it: theirs are those about zero.

        Args:
            module: the layer's name.
            count: how many, at most.
        """
        products, samples = self._products(module, centred=True)
        variances, vectors = np.linalg.eigh(products)
        variances = np.maximum(variances[::-1], 0.0)
        total = float(variances.sum())
        # Fewer samples than inputs leave directions without any variance.
        most = len(variances) if samples is None else max(min(len(variances), samples - 1), 1)
        count = min(count, most, max(int(np.count_nonzero(variances > 1e-12 * variances[0])), 1))
        if total <= 0:
            raise CheckpointError(f"{self._checkpoint.name}: the activations of {module} do not vary")
        return Components(np.ascontiguousarray(vectors[:, ::-1][:, :count].T), variances[:count] / total)

    def covariance(self, module: str) -> Array:
        """Return ``X^T X`` of a layer's inputs, divided by its mean on the diagonal: ``[in, in]``, float64.

        Raises:
            CheckpointError: if it is zero.
        """
        products, _ = self._products(module, centred=False)
        mean = float(np.trace(products)) / len(products)
        if mean <= 0:
            raise CheckpointError(f"{self._checkpoint.name}: the activations of {module} are zero")
        scaled: Array = products / mean
        return scaled

    def _find(self, module: str) -> Tensor | None:
        known: Mapping[str, Tensor] = self._checkpoint
        return known.get(module) or known.get(f"{module}.weight")

    def _products(self, module: str, *, centred: bool) -> tuple[Array, int | None]:
        """Return ``X^T X``, and how many samples there are, if they are there."""
        tensor = self._find(module)
        assert tensor is not None
        rows, width = tensor.shape
        if rows == width:
            whole = self._rows(tensor, 0, rows)
            if np.array_equal(whole, whole.T):
                return whole, None
        mean = np.zeros(width)
        for start in range(0, rows, _ROWS) if centred else ():
            mean += self._rows(tensor, start, min(start + _ROWS, rows)).sum(0) / rows
        products = np.zeros((width, width))
        for start in range(0, rows, _ROWS):
            part = self._rows(tensor, start, min(start + _ROWS, rows)) - mean
            products += part.T @ part
        return products, rows

    def _rows(self, tensor: Tensor, start: int, stop: int) -> Array:
        width = tensor.shape[1]
        values = widen(tensor.read(start * width, stop * width), _FLOAT64).reshape(stop - start, width)
        if not np.isfinite(values).all():
            raise CheckpointError(
                f"{self._checkpoint.name}: {tensor.name} has values that are NaN or infinite; gather the activations "
                "again, without them"
            )
        return values
