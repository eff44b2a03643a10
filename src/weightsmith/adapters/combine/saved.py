"""What adapters hold beside factors: trained biases, saved modules, biases of the layers B."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from weightsmith.adapters.combine.inputs import Inputs
from weightsmith.adapters.combine.registry import Saved
from weightsmith.adapters.combine.tensors import weighted
from weightsmith.adapters.peft_config import PREFIX
from weightsmith.bundle.tiles import Values
from weightsmith.checkpoint.tensor import Array, Tensor
from weightsmith.dtypes import DType
from weightsmith.errors import PlanError


def saved_tensors(inputs: Inputs, how: Saved, dtype: DType) -> dict[str, Tensor]:
    """Return the trained biases and saved modules of a result, under the keys of the first adapter that has them.

    Args:
        inputs: the adapters.
        how: ``sum`` of their changes, ``mean``, or ``drop``.
        dtype: the dtype they are written in.

    Raises:
        PlanError: if they have different shapes, or what is wanted takes the base, and it is not given.
    """
    names = dict.fromkeys(name for adapter in inputs.adapters for name in adapter.plain)
    return {} if how == "drop" else dict(_saved(inputs, name, how, dtype) for name in names)


def _saved(inputs: Inputs, name: str, how: Saved, dtype: DType) -> tuple[str, Tensor]:
    held = [adapter.plain.get(name) for adapter in inputs.adapters]
    there = [(tensor, weight) for tensor, weight in zip(held, inputs.weights, strict=True) if tensor is not None]
    shapes = {tensor.shape for tensor, _ in there}
    if len(shapes) > 1:
        raise PlanError(f"{name} is {' and '.join(map(str, map(list, shapes)))} in different adapters; --saved drop")
    first = there[0][0]
    whole = sum(inputs.weights)
    if how == "mean" and not whole:
        raise PlanError(f"{name}: the weights sum to 0, so there is no mean with them; --saved drop leaves it out")
    scale = 1 / whole if how == "mean" else 1.0
    terms = [(tensor, weight * scale) for tensor, weight in there]
    rest = 1 - sum(weight for _, weight in terms)
    if abs(rest) > 1e-9:
        # What is missing to a sum of 1 is the base's.
        if inputs.base is None:
            reason = "their changes are added up" if how == "sum" else "not all adapters have it"
            raise PlanError(
                f"{name} is trained by {len(there)} of the {len(held)} adapters, and {reason}, which takes the "
                "base's own: name it (--base), give weights that sum to 1, or choose --saved mean or drop"
            )
        own = inputs.base[inputs.of_base(name)]
        if own.shape != first.shape:
            raise PlanError(
                f"{name} is {list(first.shape)} in the adapters, and {list(own.shape)} in {inputs.base.name}"
            )
        terms.append((own, rest))
    return first.name, weighted(first.name, [one for one, _ in terms], [weight for _, weight in terms], dtype)


def layer_biases(inputs: Inputs, method: str, dtype: DType, *, sums: bool) -> dict[str, Tensor]:
    """Return the biases of layers B (``lora_bias``), whose scaled sum is exact; PEFT wants all if there is one.

    Args:
        inputs: the adapters.
        method: the method's name, for errors.
        dtype: the dtype they are written in.
        sums: whether the method gives a weighted sum.

    Raises:
        PlanError: if it does not, or a bias is changed by more than adding to it.
    """
    changing = {
        module: [number for number in range(len(inputs.adapters)) if _changes_bias(inputs, number, module)]
        for module in inputs.sites
    }
    changed = {number for numbers in changing.values() for number in numbers}
    for number in sorted(changed):
        adapter = inputs.adapters[number]
        if not sums or adapter.kind.peft_type != "LORA":
            raise PlanError(
                f"{adapter.name} changes biases of its layers, and the method {method!r} says nothing of these"
                + ("; use linear, cat or svd" if adapter.kind.peft_type == "LORA" else f" for {adapter.kind.title}")
            )
    found: dict[str, Tensor] = {}
    for module, site in inputs.sites.items() if changed else ():
        if site.form != "embedding":
            name = f"{PREFIX}{module}.lora_B.bias"
            found[name] = Values(name, (site.shape[0],), dtype, _bias_of(inputs, module, changing[module]))
    return found


def _changes_bias(inputs: Inputs, number: int, module: str) -> bool:
    adapter = inputs.adapters[number]
    changes = adapter.kind.changes_bias
    if changes is None or module not in adapter.modules or not changes(inputs.layer(number, module)):
        return False
    if inputs.base is None or adapter.kind.peft_type == "LORA":
        return True
    # Other kinds change what is there: nothing, where the base has no bias.
    weight = inputs.of_base(f"{module}.weight", number)
    return f"{weight.removesuffix('.weight')}.bias" in inputs.base


def _bias_of(inputs: Inputs, module: str, numbers: Sequence[int]) -> Callable[[int, int], Array]:
    def compute(start: int, stop: int) -> Array:
        total = np.zeros(inputs.sites[module].shape[0])
        for number in numbers:
            adapter = inputs.adapters[number]
            assert adapter.kind.bias is not None
            total += inputs.weights[number] * adapter.kind.bias(inputs.layer(number, module), np.zeros_like(total))
        return total[start:stop]

    return compute
