"""Rules for single weights that are stored as something else: which tensors they are, by names and shapes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

from weightsmith import dtypes
from weightsmith.checkpoint.tensor import Tensor
from weightsmith.errors import CheckpointError
from weightsmith.reparameterized.algebra import reshape
from weightsmith.reparameterized.instructions import Instruction
from weightsmith.reparameterized.layer import Layer, vector
from weightsmith.reparameterized.model import Model, join
from weightsmith.reparameterized.tensors import KernelTensor
from weightsmith.reparameterized.weights import (
    STABLE,
    companded,
    conditioned,
    mapped,
    sigma_reparam,
    spectral_norm,
    weight_norm,
)

# torch.nn.utils.weight_norm names its tensors by suffix, torch.nn.utils.parametrizations.weight_norm by number.
_DIRECTION = re.compile(r"^(?P<base>.+)_v$|^(?P<module>.*?)parametrizations\.(?P<weight>[^.]+)\.original1$")
_ORIGINAL = re.compile(r"^(?P<base>.+)_orig$|^(?P<module>.*?)parametrizations\.(?P<weight>[^.]+)\.original$")


def fold_weight_norm(model: Model) -> None:
    """Fold ``weight_g`` and ``weight_v``, or ``parametrizations.weight.original0`` and ``original1``."""
    for name in list(model.tensors):
        match = _DIRECTION.match(name)
        if match is None or model.get(name) is None:
            continue
        if match["base"]:
            result, gain_name = match["base"], f"{match['base']}_g"
        else:
            result, gain_name = f"{match['module']}{match['weight']}", name.removesuffix("1") + "0"
        gain, direction = model.get(gain_name), model.tensors[name]
        if gain is None:
            continue
        axis = _axis_of_norms(gain, direction, named=result.rpartition(".")[2].startswith("weight"))
        layer = None if axis == "none" else model.tensor_layer(name)
        if layer is None or isinstance(axis, str):
            continue
        made = KernelTensor(result, weight_norm(layer, gain, axis), direction.shape)
        model.fold("weight_norm", result, [gain_name, name], {result: made})


def _axis_of_norms(gain: Tensor, direction: Tensor, *, named: bool) -> int | str | None:
    """Return the axis that a gain has a value for each index of, None for the whole tensor, or ``"none"``.

    Tensors that merely end in ``_g`` and ``_v`` have other shapes: PyTorch keeps the axes of the norm with length 1.
    """
    if not direction.shape or not dtypes.is_float(gain.dtype) or not dtypes.is_float(direction.dtype):
        return "none"
    if gain.shape == ():
        return None
    if len(gain.shape) == len(direction.shape):
        long = [i for i, length in enumerate(gain.shape) if length != 1]
        if not long and 1 in direction.shape:
            # Along an axis of length 1 there is one norm: that of the whole tensor.
            return None
        if len(long) == 1 and gain.shape[long[0]] == direction.shape[long[0]]:
            return long[0]
        return "none"
    if named and gain.shape == (1,):
        return None
    return 0 if named and gain.shape == direction.shape[:1] else "none"


def fold_sigma_reparam(model: Model) -> None:
    """Fold layers of apple/ml-sigma-reparam: ``sigma`` beside a weight, and ``u`` in ``spectral_normed_weight``."""
    for name in list(model.tensors):
        for wrapper in ("spectral_normed_weight", "spectral_normed_weight.net"):
            if name == f".{wrapper}.u" or not name.endswith(f"{wrapper}.u"):
                continue
            module = name.removesuffix(f"{wrapper}.u").rstrip(".")
            _fold_sigma(model, module, join(module, wrapper))


def _fold_sigma(model: Model, module: str, wrapper: str) -> None:
    weight, copy = join(module, "weight"), f"{wrapper}.weight"
    # The weight is registered twice; files that hold shared tensors once have either name.
    kept = weight if model.get(weight) is not None else copy
    layer = model.tensor_layer(kept)
    right = model.get(f"{wrapper}.u")
    if layer is None or right is None:
        return
    if len(layer.shape) != 2 or right.shape != (layer.width,):
        raise model.error(
            module, f"u is {list(right.shape)} and weight {list(layer.shape)}; a matrix and a value for each column fit"
        )
    sigma_name = join(module, "sigma")
    sigma = model.get(sigma_name)
    if sigma is not None and sigma.size != 1:
        raise model.error(sigma_name, f"is {list(sigma.shape)}; one number is expected")
    # Without sigma the layer was told to watch the norm alone (stats_only), and uses its weight as it is.
    folded = layer if sigma is None else sigma_reparam(layer, sigma, right)
    said = model.first_said("sigma_reparam", module)
    if said is not None and said["kernel"]:
        model.use(said)
        folded = reshape(folded, _kernel_shape(model, module, layer, said["kernel"]))
    also = [weight, copy, sigma_name, join(module, "effective_spectral_norm"), f"{wrapper}.u"]
    consumed = model.names(also=[*also, f"{wrapper}.spectral_norm"])
    model.fold("sigma_reparam", module, consumed, {weight: KernelTensor(weight, folded)})


def _kernel_shape(model: Model, module: str, layer: Layer, text: str) -> tuple[int, ...]:
    sizes = [int(part) for part in text.split("x")]
    kernel = sizes * 2 if len(sizes) == 1 else sizes
    if layer.width % math.prod(kernel):
        raise model.error(module, f"weight is {list(layer.shape)}: {layer.width} is no multiple of a kernel of {text}")
    return (layer.out, layer.width // math.prod(kernel), *kernel)


def fold_spectral_norm(model: Model) -> None:
    """Fold torch's spectral norm: ``weight_orig``, ``weight_u``, ``weight_v``, or the parametrization's names."""
    for name in list(model.tensors):
        match = _ORIGINAL.match(name)
        if match is None or model.get(name) is None:
            continue
        if match["base"]:
            result, left_name, right_name = match["base"], f"{match['base']}_u", f"{match['base']}_v"
        else:
            result = f"{match['module']}{match['weight']}"
            left_name, right_name = (name.removesuffix("original") + part for part in ("0._u", "0._v"))
        left, right, shape = model.get(left_name), model.get(right_name), model.tensors[name].shape
        if left is None or right is None or not shape:
            continue
        axis = next((i for i in range(len(shape)) if left.shape == (shape[i],)), None)
        layer = model.tensor_layer(name)
        if axis is None or layer is None or right.shape != (math.prod(shape) // shape[axis],):
            raise model.error(
                result,
                f"u is {list(left.shape)}, v {list(right.shape)} and the weight {list(shape)}: they do not fit",
            )
        made = KernelTensor(result, spectral_norm(layer, left, right, axis), shape)
        model.fold("spectral_norm", result, [name, left_name, right_name], {result: made})


def fold_said_weights(model: Model) -> None:
    """Fold what no name shows: Weight Compander, weight conditioning, StableSSM."""
    for kind, make in (("compander", _compander), ("conditioned", _conditioned), ("stable_ssm", _stable)):
        if not any(model.said(kind)):
            continue
        for name in list(model.tensors):
            said = model.first_said(kind, name) if model.get(name) is not None else None
            layer = None if said is None else model.tensor_layer(name)
            if said is None or layer is None:
                continue
            if not layer.shape:
                layer = reshape_scalar(layer)
            folded, consumed = make(model, name, layer, said)
            model.use(said)
            model.fold(kind, name, [name, *consumed], {name: KernelTensor(name, folded, model.tensors[name].shape)})


def reshape_scalar(layer: Layer) -> Layer:
    """Return a tensor without axes as one with one."""
    return Layer((1,), layer.dtype, lambda start, stop: layer.rows(0, 1).reshape(-1)[start:stop])


def _compander(model: Model, name: str, layer: Layer, said: Instruction) -> tuple[Layer, list[str]]:
    values, consumed = [], []
    for setting in ("a", "b"):
        given = said[setting]
        if isinstance(given, str):
            path = join(name.rpartition(".")[0], given)
            values.append(_stored_number(model, path))
            consumed.append(path)
        else:
            values.append(_constant(given))
    return companded(layer, values[0], values[1]), list(dict.fromkeys(consumed))


def _constant(value: float) -> Callable[[], float]:
    return lambda: value


def _stored_number(model: Model, path: str) -> Callable[[], float]:
    tensor = model.get(path)
    if tensor is None or tensor.size != 1:
        found = "is not there" if tensor is None else f"is {list(tensor.shape)}"
        raise model.error(path, f"{found}; the setting names a tensor of one number beside the weight")

    def read() -> float:
        value = float(vector(tensor)[0])
        if value == 0 or not math.isfinite(value):
            raise CheckpointError(f"{path} is {value:g}; a number other than 0 is needed")
        return value

    return read


def _conditioned(model: Model, name: str, layer: Layer, said: Instruction) -> tuple[Layer, list[str]]:
    if len(layer.shape) < 2:
        raise model.error(name, f"is {list(layer.shape)}; weight conditioning is of matrices and kernels")
    return conditioned(layer), []


def _stable(model: Model, name: str, layer: Layer, said: Instruction) -> tuple[Layer, list[str]]:
    function, a, b = STABLE[said["function"]], float(said["a"]), float(said["b"])
    return mapped(layer, lambda values: function(values, a, b)), []
