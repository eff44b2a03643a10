"""The conformance battery: what every method must hold, by what it declares of itself.

The checks are plain functions that raise AssertionError, so that they run in a test suite and from the command
line (``weightsmith methods NAME --check``), on methods of this package and of anybody else's. A method that fails
while it runs fails the check. Which promises are tried follows from ``properties`` and the parameters to try from
``example``; :func:`dataclasses.replace` gives a method another example.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, get_args

import ml_dtypes
import numpy as np
import numpy.typing as npt

from weightsmith.engine.arrays import merge_arrays
from weightsmith.methods.registry import Method, Property

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
PROPERTIES = get_args(Property)
NARROW = (np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)


def run_battery(method: Method) -> Iterator[tuple[str, str | None]]:
    """Run every check that applies to a method.

    Yields:
        The check's name, and None if it holds, or what is wrong.
    """
    for name, check in CHECKS.items():
        if name in PROPERTIES and name not in method.properties:
            continue
        try:
            check(method)
        except AssertionError as error:
            yield name, _first_line(error) or "does not hold"
        except Exception as error:
            yield name, f"{type(error).__name__}: {_first_line(error)}"
        else:
            yield name, None


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


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
    with np.errstate(invalid="ignore"):
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
    before = [array.copy() for array in _all(models, base)]
    _merge(method, models, base)
    after = _all(models, base)
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True)), "an input was modified"


def _all(models: list[Array], base: Array | None) -> list[Array]:
    return models if base is None else [*models, base]


def unchanged_tensor(method: Method) -> None:
    """A tensor that no model changes is the base's, and one that a single model leaves alone is finite.

    Most fine-tunes leave some tensors alone: task vectors of zero have no direction and no largest entry.
    """
    for name in ("matrix", "vector", "scalar"):
        models, base = inputs_for(method, SHAPES[name])
        if base is None:
            return
        _close(_merge(method, [base.copy() for _ in models], base), base, f"{name}: models that equal the base")
        merged = _merge(method, [base.copy(), *models[1:]], base)
        assert np.isfinite(merged).all(), f"{name}: not finite where one model equals the base"


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
    """The order of the models does not matter, weights going with them."""
    if "symmetric" not in method.properties or method.maximum == 1:
        return
    models, base = inputs_for(method, SHAPES["matrix"])
    labels = [f"model{i}" for i in range(len(models))]
    given: dict[str, Any] = {}
    if "weight" in method.parameters:
        given["weight"] = [0.5 + 0.25 * i for i in range(len(models))]
    merged = _merge(method, models, base, parameters=given, labels=labels)
    given = {name: values[::-1] for name, values in given.items()}
    turned = _merge(method, models[::-1], base, parameters=given, labels=labels[::-1])
    _close(turned, merged, "the models in another order", 5e-6)


def translates(method: Method) -> None:
    """One checkpoint added to the base and to every model is added to the result."""
    if "translates" not in method.properties:
        return
    models, base = inputs_for(method, SHAPES["matrix"])
    models, base = [_on_a_grid(model) for model in models], None if base is None else _on_a_grid(base)
    added = _on_a_grid(np.random.default_rng(1).uniform(-4, 4, SHAPES["matrix"]).astype(np.float32))
    merged = _merge(method, models, base)
    moved = _merge(method, [model + added for model in models], None if base is None else base + added)
    _close(moved, merged + added, "a checkpoint added to all inputs", 5e-6)


def _on_a_grid(array: Array) -> Array:
    """Round, so that sums and differences are exact and adding something changes no rank and no sign."""
    return np.round(array * 1024) / np.float32(1024)


def removable(method: Method) -> None:
    """A model of weight 0 has no influence: another in its place, or none, gives the same."""
    if "removable" not in method.properties:
        return
    count = max(models_for(method), 2)
    models, base = inputs_for(method, SHAPES["matrix"], models=count)
    weights = [0.5, 0.25, *[0.0] * (count - 2)] if count > 2 else [0.5, 0.0]
    merged = _merge(method, models, base, parameters={"weight": weights})
    stranger = (100 * models[-1]).astype(np.float32)
    with_other = _merge(method, [*models[:-1], stranger], base, parameters={"weight": weights})
    _close(with_other, merged, "another model of weight 0")
    if count > method.minimum:
        without = _merge(method, models[:-1], base, parameters={"weight": weights[:-1]})
        _close(without, merged, "a merge without the model of weight 0")


def seeded(method: Method) -> None:
    """The same seed gives the same bytes; of a random method, another seed, tensor or model name other ones."""
    models, base = inputs_for(method, SHAPES["matrix"])
    merged = _merge(method, models, base, seed=1)
    _same_bytes(_merge(method, models, base, seed=1), merged, "the same seed")
    labels = [f"another {i}" for i in range(len(models))]
    for what, change in (
        ("seed", {"seed": 2}),
        ("tensor name", {"name": "another"}),
        ("model name", {"labels": labels}),
    ):
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
    rng = np.random.default_rng(0)
    models, base = inputs_for(method, SHAPES["matrix"])
    wide, wide_base = ([array * rng.uniform(1, 2, array.shape) for array in part] for part in (models, _all([], base)))
    merged = _merge(method, wide, wide_base[0] if wide_base else None)
    assert merged.dtype == np.float64, f"float64 inputs gave {merged.dtype}"
    short = float(np.mean(merged == merged.astype(np.float32)))
    assert short < 0.5, f"of float64 inputs, {short:.0%} of the results are those of float32"


def nonfinite_inputs(method: Method) -> None:
    """A NaN in an input stays NaN, and neither it nor an infinity stops the merge, however many there are."""
    for share in (0.01, 0.5, 1.0):
        models, base = inputs_for(method, SHAPES["matrix"])
        broken = np.random.default_rng(1).random(SHAPES["matrix"]) < share
        models[0][broken] = np.nan
        assert np.isnan(_merge(method, models, base)[broken]).all(), "a NaN became a number"
        models[0][broken] = np.inf
        models[-1][broken] = -np.inf
        _merge(method, models, base)


CHECKS: dict[str, Check] = {
    check.__name__: check
    for check in (
        any_shape,
        any_block_size,
        inputs_untouched,
        unchanged_tensor,
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
