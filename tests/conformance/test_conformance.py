"""Every registered method, by what it declares; and the battery itself, on methods that break it."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from references import REFERENCES

from weightsmith import conformance
from weightsmith.engine.arrays import merge_arrays
from weightsmith.methods import registry
from weightsmith.methods.registry import PerModel, all_methods, get_method, method

METHODS = sorted(all_methods())


@pytest.mark.parametrize(("name", "check"), list(itertools.product(METHODS, conformance.CHECKS)))
def test_a_method_holds_what_it_declares(name, check):
    conformance.CHECKS[check](get_method(name))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_reference(name):
    assert REFERENCES[name]


def settings_of(name: str) -> list[Any]:
    return [pytest.param(name, given, id=f"{name}-{i}") for i, given in enumerate(REFERENCES[name][1])]


@pytest.mark.parametrize("shape", [(24, 36), (40,), (4, 3, 2, 2), (3, 50_000)], ids=str)
@pytest.mark.parametrize(("name", "given"), [entry for name in METHODS for entry in settings_of(name)])
def test_a_method_agrees_with_a_plain_whole_tensor_computation(name, given, shape):
    known = get_method(name)
    models, base = conformance.inputs_for(known, shape)
    if known.base == "optional" and given.get("no_base"):
        base = None
    given = {key: value for key, value in given.items() if key != "no_base"}
    count = len(models)
    expected = REFERENCES[name][0]([m.astype(np.float64) for m in models], base, **given)
    parameters = {
        key: [value] * count if known.parameters[key].per_model and not isinstance(value, list) else value
        for key, value in given.items()
    }
    merged = merge_arrays(name, models, base, parameters=parameters, block_size=10_000)
    # Entries on the edge of a selection may fall on either side in float32: none of these settings has one.
    np.testing.assert_allclose(merged, expected, rtol=0, atol=3e-6 * np.abs(expected).max())


def broken(check: str) -> Any:
    """Return a method that declares everything and breaks one promise."""

    def base(block: Any, weight: Any) -> Any:
        return sum(w * delta for w, delta in zip(weight, block.deltas, strict=True)) + block.base

    def any_shape(block: Any, *, weight: PerModel[float]) -> Any:
        return base(block, weight) / 0.0

    def any_block_size(block: Any, *, weight: PerModel[float]) -> Any:
        return base(block, weight) * block.models[0].sum()

    def inputs_untouched(block: Any, *, weight: PerModel[float]) -> Any:
        block.models[0][...] = 0
        return base(block, weight)

    def idempotent(block: Any, *, weight: PerModel[float]) -> Any:
        return base(block, [2 * w for w in weight])

    def symmetric(block: Any, *, weight: PerModel[float]) -> Any:
        return block.models[0] * 1.0

    def translates(block: Any, *, weight: PerModel[float]) -> Any:
        return base(block, weight) - 0.5 * block.base

    def removable(block: Any, *, weight: PerModel[float]) -> Any:
        return base(block, weight) + block.models[-1]

    def seeded(block: Any, *, weight: PerModel[float]) -> Any:
        return base(block, weight) + block.draw(0)

    def wide_inputs(block: Any, *, weight: PerModel[float]) -> Any:
        return base(block, weight).astype(np.float32).astype(object)

    return {f.__name__: f for f in list(locals().values()) if callable(f) and f is not base}.get(check)


BREAKABLE = ["any_shape", "any_block_size", "idempotent", "symmetric", "translates", "removable", "seeded"]


@pytest.mark.parametrize("check", BREAKABLE)
def test_the_battery_finds_a_method_that_breaks_its_promise(check, monkeypatch):
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    method(
        "broken",
        base="required",
        minimum=1,
        properties=("idempotent", "symmetric", "translates", "removable"),
        example={"weight": 1 / 3},
    )(broken(check))
    failed = {name for name, problem in conformance.run_battery(get_method("broken")) if problem}
    assert check in failed
