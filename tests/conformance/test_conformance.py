"""Every registered method, by what it declares; and the battery itself, on methods that break it."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from references import REFERENCES, VARIANTS

from weightsmith import conformance
from weightsmith.engine.arrays import merge_arrays
from weightsmith.methods import registry
from weightsmith.methods.block import Form
from weightsmith.methods.registry import PerModel, all_methods, get_method, method
from weightsmith.methods.settings import complete

METHODS = sorted(all_methods())


@pytest.mark.parametrize(("name", "check"), list(itertools.product(METHODS, conformance.CHECKS)))
def test_a_method_holds_what_it_declares(name, check):
    conformance.CHECKS[check](get_method(name))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_reference(name):
    assert REFERENCES[name]


def settings_of(name: str) -> list[Any]:
    return [pytest.param(name, given, id=f"{name}-{i}") for i, given in enumerate(REFERENCES[name][1])]


# Working dtype -> how far off the largest result a method may be; and one that takes matrices apart.
PRECISION = {np.float32: 3e-6, np.float64: 1e-12}
SPECTRAL_PRECISION = {np.float32: 1e-4, np.float64: 1e-10}


@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("shape", [(24, 36), (40,), (4, 3, 2, 2), (3, 50_000)], ids=str)
@pytest.mark.parametrize(("name", "given"), [entry for name in METHODS for entry in settings_of(name)])
def test_a_method_agrees_with_a_plain_whole_tensor_computation(name, given, shape, dtype):
    known = get_method(name)
    models, base = conformance.inputs_for(known, shape)
    models = [model.astype(dtype) for model in models]
    base = None if base is None or given.get("no_base") else base.astype(dtype)
    given = {key: value for key, value in given.items() if key != "no_base"}
    count = len(models)
    expected = REFERENCES[name][0]([m.astype(np.float64) for m in models], base, **given)
    parameters = {
        key: [value] * count if known.parameters[key].per_model and not isinstance(value, list) else value
        for key, value in given.items()
    }
    merged = merge_arrays(name, models, base, parameters=parameters, block_size=10_000)
    precision = PRECISION if known.work is None else SPECTRAL_PRECISION
    # Entries on the edge of a selection may fall on either side in float32: none of these settings has one.
    np.testing.assert_allclose(merged, expected, rtol=0, atol=precision[dtype] * np.abs(expected).max())


@pytest.mark.parametrize(("name", "given"), VARIANTS, ids=str)
def test_a_method_holds_what_it_declares_with_other_parameters(name, given):
    known = get_method(name)
    # What scales the result gives neither a model nor a constant back.
    scales = given.get("normalize") is False or "scale" in given
    kept = known.properties - ({"idempotent", "translates"} if scales else set())
    found = dict(conformance.run_battery(replace(known, example=given, properties=kept)))
    assert not {check: problem for check, problem in found.items() if problem}


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    ("name", "given"), [*((name, dict(get_method(name).example)) for name in METHODS), *VARIANTS], ids=str
)
def test_what_is_not_finite_stays_in_its_vector(name, given, value):
    known = replace(get_method(name), example=given)
    models, base = conformance.inputs_for(known, (24, 36))
    models[0][3, 4] = value
    parameters = conformance.parameters_for(known, len(models))
    broken = ~np.isfinite(merge_arrays(name, models, base, parameters=parameters))
    completed = complete(known, parameters, len(models), has_base=base is not None)
    reads = known.reads(completed, Form((24, 36)))
    within = np.zeros((24, 36), bool)
    if known.work is not None and known.work(completed, Form((24, 36)), len(models)) is not None:
        # A matrix with a NaN has no singular vectors.
        within[...] = True
    else:
        # By columns for the one method that takes the whole tensor; elsewhere the vectors are rows.
        within[{"elements": (3, 4), "tensor": (slice(None), 4)}.get(reads, 3)] = True
    assert not (broken & ~within).any()


def good(block: Any, weight: Any) -> Any:
    return sum(w * delta for w, delta in zip(weight, block.deltas, strict=True)) + block.base


def divides_by_zero(block: Any, *, weight: PerModel[float]) -> Any:
    return good(block, weight) / 0.0


def sees_its_block(block: Any, *, weight: PerModel[float]) -> Any:
    return good(block, weight) * block.models[0].sum()


def writes_into_its_input(block: Any, *, weight: PerModel[float]) -> Any:
    block.models[0][...] = 0
    return good(block, weight)


def scales_to_unit_length(block: Any, *, weight: PerModel[float]) -> Any:
    # Not finite where no model changes the base: the trap that real fine-tunes spring.
    delta = good(block, weight) - block.base
    return block.base + delta / np.abs(delta)


def doubles(block: Any, *, weight: PerModel[float]) -> Any:
    return good(block, [2 * w for w in weight])


def takes_the_first(block: Any, *, weight: PerModel[float]) -> Any:
    return block.models[0] * 1.0


def halves_the_base(block: Any, *, weight: PerModel[float]) -> Any:
    return good(block, weight) - 0.5 * block.base


def adds_the_last_unweighted(block: Any, *, weight: PerModel[float]) -> Any:
    return good(block, weight) + block.models[-1]


def counts_its_models(block: Any, *, weight: PerModel[float]) -> Any:
    return good(block, weight) / len(weight)


def draws_undeclared(block: Any, *, weight: PerModel[float]) -> Any:
    return good(block, weight) + block.draw(0)


def rounds_to_float32(block: Any, *, weight: PerModel[float]) -> Any:
    return good(block, weight).astype(np.float32)


def hides_nan(block: Any, *, weight: PerModel[float]) -> Any:
    return np.nan_to_num(good(block, weight))


def refuses_infinity(block: Any, *, weight: PerModel[float]) -> Any:
    if np.isinf(block.models[0]).any():
        raise ZeroDivisionError("too large")
    return good(block, weight)


def calls_what_is_not_there(block: Any, *, weight: PerModel[float]) -> Any:
    return block.no_such_thing


BROKEN = [
    (divides_by_zero, "any_shape"),
    (calls_what_is_not_there, "any_shape"),
    (sees_its_block, "any_block_size"),
    (writes_into_its_input, "inputs_untouched"),
    (scales_to_unit_length, "unchanged_tensor"),
    (doubles, "idempotent"),
    (takes_the_first, "symmetric"),
    (halves_the_base, "translates"),
    (adds_the_last_unweighted, "removable"),
    (counts_its_models, "removable"),
    (draws_undeclared, "seeded"),
    (rounds_to_float32, "wide_inputs"),
    (hides_nan, "nonfinite_inputs"),
    (refuses_infinity, "nonfinite_inputs"),
]


@pytest.fixture
def register(monkeypatch):
    """Return a function that registers a method which declares everything, for this test alone."""
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))

    def add(function: Any, **declared: Any) -> Any:
        everything = ("idempotent", "symmetric", "translates", "removable")
        method(
            "tried",
            **{"base": "required", "properties": everything, "example": {"weight": 1 / 3}, **declared},
        )(function)
        return get_method("tried")

    return add


def failed(tried: Any) -> dict[str, str]:
    return {check: problem for check, problem in conformance.run_battery(tried) if problem}


def weighted_sum(block: Any, *, weight: PerModel[float]) -> Any:
    return good(block, weight)


def test_the_battery_passes_a_method_that_keeps_its_promises(register):
    assert not failed(register(weighted_sum))


@pytest.mark.parametrize(("function", "check"), BROKEN, ids=lambda part: getattr(part, "__name__", part))
def test_the_battery_finds_a_method_that_breaks_its_promise(function, check, register):
    assert check in failed(register(function))


def test_the_battery_finds_a_random_method_that_is_the_same_with_every_seed(register):
    assert list(failed(register(weighted_sum, random=True))) == ["seeded"]


def test_the_battery_finds_narrow_inputs_that_are_not_widened_first(register, monkeypatch):
    def rounding(method_name: str, models: Any, base: Any = None, **options: Any) -> Any:
        merged = merge_arrays(method_name, models, base, **options)
        return merged.astype(models[0].dtype).astype(merged.dtype)

    monkeypatch.setattr(conformance, "merge_arrays", rounding)
    assert list(failed(register(weighted_sum))) == ["narrow_inputs"]


def test_only_what_is_declared_is_tried(register):
    tried = [check for check, _ in conformance.run_battery(register(takes_the_first, properties=("idempotent",)))]
    assert set(conformance.CHECKS) - set(tried) == {"symmetric", "translates", "removable"}


def test_every_check_is_known_to_fail_where_it_should():
    assert set(conformance.CHECKS) == {check for _, check in BROKEN} | {"narrow_inputs"}
