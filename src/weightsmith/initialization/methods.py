"""Factors to begin a training with, one function for each method: a layer's weight in, A and B out.

All take the weight as the layer uses it, ``W [out, in]``, and the scale s by which ``B A`` will be multiplied, and give
``A [rank, in]`` and ``B [out, rank]`` in float64. Those that begin with a part of W need the rest of it as the base:
``W - s B A``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import array_api_compat.numpy as xp
import numpy as np

from weightsmith.checkpoint.tensor import Array
from weightsmith.initialization.statistics import Components
from weightsmith.kernels import philox
from weightsmith.methods.matrices import Decomposition, leading, spectrum

_FLOAT64 = np.dtype(np.float64)


@dataclass(frozen=True)
class Given:
    """What a method may use beside the weight.

    Attributes:
        name: the module's name.
        rank: the rank.
        scale: s.
        seed: of random numbers.
        decomposition: ``exact`` or ``randomized``.
        components: principal directions of the layer's inputs, where activations are there.
        covariance: ``X^T X`` of its inputs, where activations are there.
        smallest: whether the triples of the smallest singular values are taken, where a method leaves the choice.
    """

    name: str
    rank: int
    scale: float
    seed: int
    decomposition: Decomposition
    components: Components | None
    covariance: Array | None
    smallest: bool


Factors = tuple[Array, Array]


@dataclass(frozen=True)
class Method:
    """A way to begin.

    Attributes:
        function: returns A and B.
        takes_part: whether it begins with a part of the weight, so that the base must be the rest.
        data: what of the activations it uses: ``components``, ``covariance`` or nothing.
    """

    function: Callable[[Array, Given], Factors]
    takes_part: bool
    data: str = ""


def pissa(weight: Array, given: Given) -> Factors:
    """Begin with the leading singular triples of the weight.

    ``B = U_r sqrt(S_r / s)``, ``A = sqrt(S_r / s) V_r^T``. Meng et al., PiSSA, NeurIPS 2024, arXiv:2404.02948, as PEFT
    computes it.
    """
    left, values, right = leading(xp, weight, given.rank, given.decomposition)
    return _balanced(left, values, right, given.scale)


def milora(weight: Array, given: Given) -> Factors:
    """Begin with the trailing singular triples of the weight: training changes what matters least to it.

    Wang et al., MiLoRA, NAACL 2025, arXiv:2406.09044. The factors are balanced as PiSSA's (inferred).
    """
    return _trailing(weight, given)


def olora(weight: Array, given: Given) -> Factors:
    """Begin with the first rows of ``W = Q R``: ``B = Q_r``, orthonormal, and ``A = R_r``.

    Büyükakyüz, OLoRA, 2024, arXiv:2406.01775, as PEFT computes it: the factors are not divided by s, and ``s Q_r R_r``
    is taken from the base.
    """
    q, r = np.linalg.qr(weight.astype(_FLOAT64))
    return np.ascontiguousarray(r[: given.rank]), np.ascontiguousarray(q[:, : given.rank])


def eva(weight: Array, given: Given) -> Factors:
    """Begin with the directions in which the layer's inputs vary most as A, and B zero.

    Paischer et al., One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation, 2024,
    arXiv:2410.07170. Without activations the right singular vectors of the weight stand for them: the directions that
    the layer is most sensitive to. That is ours, and not the paper's method (inferred).
    """
    if given.components is not None:
        directions = given.components.directions[: given.rank]
    else:
        directions = leading(xp, weight, given.rank, given.decomposition)[2]
    return directions.astype(_FLOAT64), np.zeros((len(weight), given.rank))


def corda(weight: Array, given: Given) -> Factors:
    """Begin with singular triples of the weight as the layer's inputs weigh it.

    With C the inputs' second moments, damped, ``W C = U S V^T``: ``B = U_r sqrt(S_r / s)`` and
    ``A = sqrt(S_r / s) V_r^T C^-1``, of the largest values (the instruction-previewed mode, ``ipm``) or the smallest
    (the knowledge-preserved mode, ``kpm``). Yang et al., CorDA, NeurIPS 2024, arXiv:2406.05223, as PEFT computes it; C
    is divided by its mean diagonal, which changes the balance of the factors alone. Without activations C is the
    identity, and what is left is PiSSA, or MiLoRA for the smallest.
    """
    if given.covariance is None:
        return _trailing(weight, given) if given.smallest else pissa(weight, given)
    covariance = damped(given.covariance)
    u, s, vt = np.linalg.svd(weight.astype(_FLOAT64) @ covariance, full_matrices=False)
    chosen = slice(-given.rank, None) if given.smallest else slice(given.rank)
    # C is symmetric: v^T C^-1 is the solution of C x = v.
    right = np.linalg.solve(covariance, vt[chosen].T).T
    return _balanced(u[:, chosen], s[chosen], right, given.scale)


def kaiming(weight: Array, given: Given) -> Factors:
    """Begin with random A and B zero, as LoRA does: A is uniform between the negative and the positive of 1 / sqrt(in).

    He et al., 2015, with the gain by which PEFT (and PyTorch's linear layers) use it. The numbers depend on the seed
    and the module's name alone.
    """
    rows, columns = weight.shape
    size = given.rank * columns
    numbers = philox.uniform(philox.key_of("kaiming", given.seed, given.name), 0, size).astype(_FLOAT64)
    return (2 * numbers.reshape(given.rank, columns) - 1) / np.sqrt(columns), np.zeros((rows, given.rank))


METHODS: dict[str, Method] = {
    "kaiming": Method(kaiming, takes_part=False),
    "pissa": Method(pissa, takes_part=True),
    "milora": Method(milora, takes_part=True),
    "olora": Method(olora, takes_part=True),
    "eva": Method(eva, takes_part=False, data="components"),
    "corda": Method(corda, takes_part=True, data="covariance"),
}


def damped(covariance: Array) -> Array:
    """Return a matrix of second moments with so much on the diagonal that it can be inverted well.

    As in PEFT: a hundredth of the mean diagonal, doubled until the product with the inverse is the identity to within
    0.05 (Frobenius).
    """
    size = len(covariance)
    damp = 0.01 * float(np.trace(covariance)) / size
    while True:
        found: Array = covariance + damp * np.eye(size)
        try:
            error = float(np.linalg.norm(found @ np.linalg.inv(found) - np.eye(size)))
        except np.linalg.LinAlgError:
            error = np.inf
        if error < 0.05:
            return found
        damp *= 2


def explained(weight: Array, count: int) -> Array:
    """Return the shares of the weight's energy that its leading singular values have: ``[count]``."""
    values = spectrum(xp, weight).values
    total = float((values**2).sum())
    shares: Array = values[:count] ** 2 / total if total > 0 else np.zeros(count)
    return shares


def _trailing(weight: Array, given: Given) -> Factors:
    found = spectrum(xp, weight)
    least = min(weight.shape)
    # Vectors rise: the first belong to the smallest values.
    near = found.vectors[:, : given.rank][:, ::-1]
    values = found.values[least - given.rank :]
    wide = weight.astype(_FLOAT64)
    safe = np.where(values > 0, values, 1.0)
    if weight.shape[0] <= weight.shape[1]:
        return _balanced(near, values, (near.T @ wide) / safe[:, None], given.scale)
    return _balanced((wide @ near) / safe, values, near.T, given.scale)


def _balanced(left: Array, values: Array, right: Array, scale: float) -> Factors:
    roots = np.sqrt(values.astype(_FLOAT64) / scale)
    return roots[:, None] * right.astype(_FLOAT64), left.astype(_FLOAT64) * roots
