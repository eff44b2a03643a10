"""The conformance battery: what every method must hold, by what it declares of itself.

The checks are plain functions that raise AssertionError, so that they run in a test suite and from the command
line (``weightsmith methods NAME --check``), on methods of this package and of anybody else's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from weightsmith.engine.arrays import merge_arrays
from weightsmith.errors import WeightsmithError
from weightsmith.methods.registry import Method

Array = npt.NDArray[Any]
Check = Callable[[Method], None]

SHAPES: dict[str, tuple[int, ...]] = {
    "matrix": (24, 36),
    "vector": (40,),
    "scalar": (),
    "one": (1,),
    "column": (9, 1),
    "empty": (0, 4),
    "convolution": (4, 3, 2, 2),
    "long": (3, 70_001),
}
NARROW = (np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)


def run_battery(method: Method) -> Iterator[tuple[str, str | None]]:
    """Run every check that applies to a method.

    Yields:
        The check's name, and None if it holds, or what is wrong.
    """
    for name, check in CHECKS.items():
        try:
            check(method)
        except (AssertionError, WeightsmithError) as error:
            yield name, str(error).strip().split("\n")[0] or "does not hold"
        else:
            yield name, None


def models_for(method: Method) -> int:
    """Return how many models to try a method with."""
    return method.maximum or max(method.minimum, 3)


def parameters_for(method: Method, models: int) -> dict[str, Any]:
    """Return parameters to try a method with: its example's, spread over the models."""
    return {
        name: [value] * models if method.parameters[name].per_model else value for name, value in method.example.items()
    }


def inputs_for(
    method: Method, shape: tuple[int, ...], *, seed: int = 0, models: int | None = None
) -> tuple[list[Array], Array | None]:
    """Return random models near a random base (None where the method has no use for one)."""
    rng = np.random.default_rng(seed)
    base = rng.standard_normal(shape).astype(np.float32)
    count = models or models_for(method)
    tuned = [(base + 0.1 * rng.standard_normal(shape)).astype(np.float32) for _ in range(count)]
    return tuned, None if method.base == "unused" else base


def _merge(method: Method, models: list[Array], base: Array | None, **options: Any) -> Array:
    given = {**parameters_for(method, len(models)), **options.pop("parameters", {})}
    return merge_arrays(method.name, models, base, parameters=given, **options)


def _same_bytes(one: Array, other: Array, what: str) -> None:
    assert one.shape == other.shape, f"{what}: shapes {one.shape} and {other.shape}"
    differing = int(np.count_nonzero(one.reshape(-1).view(np.uint32) != other.reshape(-1).view(np.uint32)))
    assert differing == 0, f"{what}: {differing} of {one.size} values differ"


def _close(one: Array, other: Array, what: str, tolerance: float = 2e-6) -> None:
    error = float(np.max(np.abs(one - other), initial=0.0))
    scale = float(np.max(np.abs(other), initial=1.0))
    assert error <= tolerance * scale, f"{what}: off by {error:.3g}"


def any_shape(method: Method) -> None:
    """Scalars, empty tensors, vectors, columns and convolutions keep their shape and are finite."""
    for name, shape in SHAPES.items():
        models, base = inputs_for(method, shape)
        merged = _merge(method, models, base)
        assert merged.shape == shape, f"{name}: {shape} became {merged.shape}"
        assert np.isfinite(merged).all(), f"{name}: not finite"


def any_block_size(method: Method) -> None:
    """Blocks of any size, and one or four threads, give the same bytes."""
    for name in ("matrix", "long", "convolution"):
        models, base = inputs_for(method, SHAPES[name])
        whole = _merge(method, models, base)
        for block_size, threads in ((1 << 20, 4), (1000, 1), (97, 4)):
            if name != "long" or block_size >= 1000:
                again = _merge(method, models, base, block_size=block_size, threads=threads)
                _same_bytes(again, whole, f"{name} in blocks of {block_size} on {threads} threads")


def inputs_untouched(method: Method) -> None:
    """No input is modified."""
    models, base = inputs_for(method, SHAPES["matrix"])
    before = [array.copy() for array in (*models, *([base] if base is not None else []))]
    _merge(method, models, base)
    after = (*models, *([base] if base is not None else []))
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True)), "an input was modified"


def idempotent(method: Method) -> None:
    """Copies of one model give that model."""
    if "idempotent" not in method.properties:
        return
    (model, *_), base = inputs_for(method, SHAPES["matrix"])
    base = model.copy() if method.maximum == 1 and base is not None else base
    if base is not None and method.maximum != 1:
        # With a base, copies of one fine-tune give that fine-tune.
        merged = _merge(method, [model] * models_for(method), base, parameters=_keeping(method))
    else:
        merged = _merge(method, [model] * models_for(method), base)
    _close(merged, model, "copies of a model do not give it back")


def _keeping(method: Method) -> dict[str, Any]:
    """Parameters under which nothing is selected away."""
    return {"select_topk": 1.0} if "select_topk" in method.parameters else {}


def symmetric(method: Method) -> None:
    """The order of the models does not matter."""
    if "symmetric" not in method.properties or method.maximum == 1:
        return
    models, base = inputs_for(method, SHAPES["matrix"])
    labels = [f"model{i}" for i in range(len(models))]
    merged = _merge(method, models, base, labels=labels)
    turned = _merge(method, models[::-1], base, labels=labels[::-1])
    _close(turned, merged, "the models in another order", 5e-6)


def translates(method: Method) -> None:
    """A constant added to the base and to every model is added to the result."""
    if "translates" not in method.properties:
        return
    models, base = _on_a_grid(method, SHAPES["matrix"])
    merged = _merge(method, models, base)
    moved = _merge(method, [model + 4 for model in models], None if base is None else base + 4)
    if base is None and method.base == "optional":
        return
    _close(moved, merged + 4, "a constant added to all inputs", 5e-6)


def _on_a_grid(method: Method, shape: tuple[int, ...]) -> tuple[list[Array], Array | None]:
    """Return inputs whose sums and differences are exact, so that a shift changes no rank and no sign."""
    models, base = inputs_for(method, shape)
    grid = [np.round(array * 1024) / np.float32(1024) for array in models]
    return grid, None if base is None else np.round(base * 1024) / np.float32(1024)


def removable(method: Method) -> None:
    """A model of weight 0 has no influence."""
    if "removable" not in method.properties or method.maximum == 2:
        return
    models, base = inputs_for(method, SHAPES["matrix"], models=3)
    stranger = (100 * models[2]).astype(np.float32)
    weight = {"weight": [0.5, 0.25, 0.0]}
    with_one = _merge(method, models, base, parameters=weight)
    with_other = _merge(method, [*models[:2], stranger], base, parameters=weight)
    _close(with_other, with_one, "a model of weight 0")


def seeded(method: Method) -> None:
    """The same seed gives the same bytes and another seed, tensor or model name other ones."""
    models, base = inputs_for(method, SHAPES["matrix"])
    merged = _merge(method, models, base, seed=1)
    _same_bytes(_merge(method, models, base, seed=1), merged, "the same seed")
    for what, change in (("seed", {"seed": 2}), ("tensor's name", {"name": "another"})):
        same = np.array_equal(_merge(method, models, base, **{"seed": 1, **change}), merged)
        assert same != method.random, f"another {what} {'does not change' if method.random else 'changes'} the result"


def narrow_inputs(method: Method) -> None:
    """Inputs in 8 or 16 bits give what the same values in float32 give."""
    for dtype in NARROW:
        models, base = inputs_for(method, SHAPES["matrix"])
        small = [model.astype(dtype) for model in models]
        small_base = None if base is None else base.astype(dtype)
        merged = _merge(method, small, small_base)
        wide_base = None if small_base is None else small_base.astype(np.float32)
        wide = _merge(method, [model.astype(np.float32) for model in small], wide_base)
        _same_bytes(merged, wide, f"inputs in {np.dtype(dtype).name}")


def wide_inputs(method: Method) -> None:
    """Inputs in float64 are worked on in float64."""
    models, base = inputs_for(method, SHAPES["matrix"])
    wide_base = None if base is None else base.astype(np.float64)
    merged = _merge(method, [model.astype(np.float64) for model in models], wide_base)
    assert merged.dtype == np.float64, f"float64 inputs gave {merged.dtype}"


def nonfinite_inputs(method: Method) -> None:
    """NaN and infinity in an input stay where they are: they neither hang nor spread beyond their vector."""
    models, base = inputs_for(method, SHAPES["matrix"])
    models[0][0, 0] = np.nan
    models[0][1, 1] = np.inf
    merged = _merge(method, models, base)
    assert merged.shape == SHAPES["matrix"], "the shape changed"


CHECKS: dict[str, Check] = {
    check.__name__: check
    for check in (
        any_shape,
        any_block_size,
        inputs_untouched,
        idempotent,
        symmetric,
        translates,
        removable,
        seeded,
        narrow_inputs,
        wide_inputs,
        nonfinite_inputs,
    )
}
