"""Fused loops give what the same methods give on NumPy, and every method of ours is fused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from weightsmith.checkpoint.tensor import ArrayTensor, Tensor
from weightsmith.conformance import models_for
from weightsmith.dtypes import DType, promote
from weightsmith.engine import fuse
from weightsmith.engine.arrays import merge_arrays
from weightsmith.engine.backend import NUMPY
from weightsmith.engine.evaluate import Evaluator
from weightsmith.engine.expression import Computed, Group
from weightsmith.kernels import native
from weightsmith.methods import registry, statistics
from weightsmith.methods.registry import Method, PerModel, all_methods, get_method, method
from weightsmith.methods.settings import complete

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

BF16, F16, F32, F64 = (np.dtype(dtype) for dtype in (ml_dtypes.bfloat16, np.float16, np.float32, np.float64))
E4M3, E5M2 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2)


class Stored(ArrayTensor):
    """A tensor that is read into memory that is used again, as those of files are."""

    def read_into(self, start: int, stop: int, buffer: Any) -> Any:
        values = buffer.view(self.dtype)
        values[:] = self.read(start, stop)
        return values


@pytest.fixture
def on_numpy(monkeypatch) -> Callable[[], Any]:
    @contextmanager
    def without() -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr(native, "library", lambda: None)
            yield

    return without


@pytest.fixture(autouse=True)
def fresh_programs(monkeypatch):
    monkeypatch.setattr(fuse, "_SHARED", {})


def computed(
    name: str | Method, given: dict[str, Any], models: list[Any], base: Any, dtype: DType = F32, **more: Any
) -> Computed:
    chosen = get_method(name) if isinstance(name, str) else name

    def tensor(array: Any) -> Tensor:
        return array if isinstance(array, Tensor) else Stored("t", array)

    parts = tuple(tensor(model) for model in models)
    has_base = base is not None and chosen.base != "unused"
    parameters = complete(chosen, given, len(models), has_base=has_base)
    return Computed(
        "t", dtype, chosen, parts, tensor(base) if has_base else None, parameters=parameters, seed=3, **more
    )


def evaluated(tensor: Computed, dtype: DType | None = None, shared: Any = None) -> tuple[bytes, Any, int, Any]:
    """Return a tensor's bytes, values, how many are not finite, and what was reported of the inputs."""
    seen: dict[str, int] = {}

    def note(label: str, count: int) -> None:
        seen[label] = seen.get(label, 0) + count

    evaluator = Evaluator(shared, note)
    evaluator.prepare(tensor)
    seen.clear()
    out, lost = evaluator.result(tensor, 0, tensor.size, dtype or tensor.dtype)
    plain = np.where(np.isnan(out.astype(F64)), np.ones((), out.dtype), out)
    return plain.tobytes(), out.astype(F64), lost, seen


def drawn(name: str | Method, shape: tuple[int, ...], *, models: int = 3, broken: bool = False, seed: int = 0) -> Any:
    """Return models and a base: small changes of many sizes, some of none, many equal ones."""
    chosen = get_method(name) if isinstance(name, str) else name
    rng = np.random.default_rng(seed)
    base = rng.standard_normal(shape).astype(F32)
    made = []
    for _ in range(min(models, chosen.maximum or models)):
        change = rng.standard_normal(shape) * 10.0 ** rng.integers(-4, 0, shape)
        change = np.where(rng.random(shape) < 0.3, rng.choice([0.0, 0.125, -0.125, 0.25], shape), change)
        made.append((base + change).astype(F32))
    if broken and base.size > 3:
        for array, value in zip([base, *made], [np.nan, np.inf, -np.inf, np.nan], strict=False):
            array.reshape(-1)[rng.integers(0, base.size, 3)] = value
    return made, base


# Methods that take matrices apart, and stream other tensors.
MATRICES: list[tuple[str, dict[str, Any]]] = [
    ("tsv", {}),
    ("iso_c", {}),
    ("iso_cts", {}),
    ("star", {"weight": [0.5, 0.0, 1.0]}),
    ("timber", {}),
    ("low_rank", {"weight": [0.5, 1.0, -1.0]}),
    ("subspace_boosting", {}),
    ("knots", {"density": 0.3}),
    ("knots", {"density": [0.3, 0.5], "trim_scope": "model"}),
    ("knots_dare", {"density": 0.3}),
]
# Settings whose statistics are selections, counts or nothing: both ways give the same bits.
EXACT: list[tuple[str, dict[str, Any]]] = [
    ("linear", {"weight": [0.5, 0.3, 0.2]}),
    ("linear", {"weight": [1.0, 0.0, -0.5], "normalize": False}),
    ("passthrough", {}),
    ("passthrough", {"scale": [-0.3]}),
    ("task_arithmetic", {"weight": [0.5, 0.0, -1.0]}),
    ("task_arithmetic", {"weight": 0.7, "normalize": True, "lambda": 1.3}),
    ("ties", {"weight": 1.0, "density": 0.4}),
    ("ties", {"weight": [1.0, 0.0, -0.3], "density": [0.0, 1.0, 0.2], "trim_scope": "layer"}),
    ("ties", {"weight": 0.5, "density": 0.01, "normalize": False, "trim_scope": "model"}),
    ("breadcrumbs", {"weight": 0.5, "density": 0.5, "gamma": 0.1}),
    ("breadcrumbs", {"weight": 0.5, "density": [0.0, 1.0, 0.7], "normalize": True}),
    ("breadcrumbs_ties", {"weight": [0.5, -0.5, 0.0], "density": 0.5, "gamma": 0.2}),
    ("breadcrumbs", {"weight": 0.5, "density": [0.0, 1.0, 0.3], "gamma": 0.05, "trim_scope": "row"}),
    ("breadcrumbs_ties", {"weight": [0.5, -0.5, 0.0], "density": 0.5, "gamma": 0.2, "trim_scope": "row"}),
    ("dare_ties", {"weight": 0.5, "density": 0.3, "object": "weights"}),
    ("dare_linear", {"weight": 0.5, "density": 0.5}),
    ("dare_linear", {"weight": 0.5, "density": [0.0, 1.0, 0.3], "rescale": False}),
    ("dare_ties", {"weight": [0.5, -0.2, 0.0], "density": 0.3, "normalize": True}),
    ("della", {"weight": 0.5, "density": 0.5}),
    ("della", {"weight": 0.5, "density": [0.0, 1.0, 0.4], "rescale": False}),
    ("della", {"weight": 0.5, "density": 0.5, "trim_scope": "tensor"}),
    ("della_linear", {"weight": [0.5, 0.0, -1.0], "density": 0.3, "normalize": True}),
    ("sce", {"select_topk": 0.0}),
    ("ram", {}),
    ("ram", {"epsilon": 0.1}),
    ("ramplus_tl", {"epsilon": 0.01, "r": 0.7, "alpha": 5.0}),
    ("ramplus_tl", {"count_scope": "tensor"}),
    ("emr", {}),
    ("emr", {"weight": [0.5, 0.0, -1.0], "lambda": 0.3}),
    ("magmax", {}),
    ("magmax", {"weight": [0.5, 0.0, -1.0], "lambda": 0.3}),
    ("consensus", {}),
    ("consensus", {"k": 1, "density": 0.3, "mask_lambda": [0.2, 0.4, 0.6], "trim_scope": "tensor"}),
    ("consensus", {"weight": [0.5, 0.0, -1.0], "multi_task": "ties"}),
    ("localize_and_stitch", {"weight": [0.5, 0.0, -1.0], "density": [0.0, 1.0, 0.3]}),
    ("localize_and_stitch", {"trim_scope": "layer"}),
    ("random_select", {"weight": [0.5, 0.0, 1.0]}),
    ("random_select", {}),
    ("nearswap", {"t": 0.01}),
    ("nearswap", {"t": 0.0}),
    ("nuslerp", {"weight": [0.3, 0.7], "nuslerp_flatten": False}),
    ("nuslerp", {"weight": [0.3, 0.7], "nuslerp_flatten": False, "nuslerp_row_wise": True}),
    ("metric_weighted", {"metric": [0.5, 0.7, 2.0], "p": 2.0}),
    ("harmonic", {}),
    ("harmonic", {"weight": [0.5, 0.0, 2.0], "mixed": "sign"}),
    ("sparse_soup", {}),
    ("sparse_soup", {"min_zeros": 0.0, "weight": [0.3, 0.0, 0.9]}),
    ("sparse_soup", {"min_zeros": 0.0, "mask": "union"}),
    ("sparse_soup", {"min_zeros": 0.0, "mask": "first"}),
    ("median", {}),
    ("median", {"weight": [1.0, 1.0, 0.0]}),
    ("median", {"weight": [0.3, 1.0, 0.9]}),
    ("median", {"weight": [0.3, 1.0, 0.9, 0.1, 0.6]}),
    ("trimmed_mean", {}),
    ("trimmed_mean", {"trim": 0}),
    ("transfer", {}),
    ("transfer", {"lambda": 0.3, "target_share": 0.5}),
    ("interpolate", {}),
    ("interpolate", {"lambda": 1.0}),
    ("ama", {}),
    ("bcwi", {"alpha": 0.3}),
    ("ema", {"momentum": 0.9, "interval": 3}),
    ("imm", {}),
    *MATRICES,
]
# ... and those whose statistics or rows are summed, in another order than NumPy's.
SUMMED: list[tuple[str, dict[str, Any]]] = [
    ("slerp", {"t": 0.3}),
    ("nuslerp", {"weight": [0.3, 0.7]}),
    ("multislerp", {"weight": 1.0}),
    ("karcher", {}),
    ("karcher", {"weight": [1.0, 0.0, 2.0]}),
    ("karcher", {"filter_wise": True}),
    ("geometric", {}),
    ("geometric", {"mixed": "sign"}),
    ("geometric", {"weight": [0.5, 0.0, 2.0], "mixed": "zero"}),
    ("variance_corrected", {}),
    ("variance_corrected", {"eps": 0.0, "vectors": True, "self_share": 0.4}),
    ("krum", {"byzantine": 0, "select": 2}),
    ("geometric_median", {}),
    ("rws", {}),
    ("rws_signature", {}),
    ("ties", {"weight": 0.5, "density": 0.3, "rescale": True}),
    ("breadcrumbs", {"weight": 0.5, "density": 0.3, "rescale": True, "trim_scope": "model"}),
    ("breadcrumbs_ties", {"weight": 0.5, "density": 0.3, "rescale": True}),
    ("dare_linear", {"weight": 0.5, "density": 0.3, "rescale_by": "l1"}),
    ("dare_ties", {"weight": 0.5, "density": 0.3, "rescale_by": "l1"}),
    ("della", {"weight": 0.5, "density": 0.3, "rescale_by": "l1"}),
    ("della_linear", {"weight": 0.5, "density": 0.3, "rescale_by": "l1", "trim_scope": "tensor"}),
    ("breadcrumbs", {"weight": 0.5, "density": 0.3, "rescale": True, "trim_scope": "row"}),
    ("dare_linear", {"weight": 0.5, "density": 0.3, "rescale_by": "l1", "object": "weights"}),
    ("sign_only", {}),
    ("sign_only", {"weight": [0.5, 0.0, -1.0], "mean_scope": "model"}),
    ("pcb", {}),
    ("pcb", {"density": [0.5, 0.9, 0.0], "clip": 0.1, "inter": "pairs", "trim_scope": "tensor"}),
    ("sce", {"select_topk": 0.5}),
    ("sce", {}),
    ("model_stock", {}),
    ("model_stock", {"filter_wise": True}),
    ("model_stock", {"filter_wise": True, "clamp": False, "norm_floor": 1e-6}),
    ("arcee_fusion", {}),
    ("widen", {}),
    ("opcm", {}),
]


def models_of(name: str, given: dict[str, Any]) -> int:
    return next((len(value) for value in given.values() if isinstance(value, list)), 2 if name == "nuslerp" else 3)


def test_every_method_is_compared():
    assert {name for name, _ in EXACT + SUMMED} == set(all_methods())


SHAPES = [(24, 80), (6, 67), (30, 5), (3, 4, 2, 20), (700,), (5,), ()]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("name", "given"), EXACT, ids=str)
def test_a_fused_method_gives_the_bits_that_numpy_gives(name, given, shape, on_numpy):
    for broken in (False, True):
        models, base = drawn(name, shape, models=models_of(name, given), broken=broken)
        for wanted in (F32, BF16):
            fused = evaluated(computed(name, given, models, base), wanted)
            with on_numpy():
                plain = evaluated(computed(name, given, models, base), wanted)
            assert fused[0] == plain[0]
            assert fused[2:] == plain[2:]


@pytest.mark.parametrize("shape", [(24, 80), (6, 67), (700,), ()], ids=str)
@pytest.mark.parametrize(("name", "given"), SUMMED, ids=str)
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_a_fused_method_that_sums_agrees_to_rounding(name, given, shape, dtype, on_numpy):
    models, base = drawn(name, shape, models=models_of(name, given))
    models, base = [model.astype(dtype) for model in models], base.astype(dtype)
    _, fused, _, _ = evaluated(computed(name, given, models, base), dtype)
    with on_numpy():
        _, plain, _, _ = evaluated(computed(name, given, models, base), dtype)
    np.testing.assert_allclose(fused, plain, rtol=0, atol=4 * np.finfo(dtype).eps * np.abs(plain).max())


DTYPES = [
    (BF16, BF16, BF16),
    (BF16, F16, F32),
    (F16, F32, E4M3),
    (E4M3, E5M2, E4M3),
    (F32, F32, F64),
    (F64, BF16, E5M2),
]
CASTS = [None, BF16, F16, F32, F64, E4M3]
ANY = [entry for entry in EXACT if entry[0] in ("linear", "ties", "dare_ties", "della", "ramplus_tl", "nearswap")]


@pytest.mark.parametrize("casts", CASTS, ids=str)
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda dtypes: "-".join(map(str, dtypes)))
def test_every_dtype_of_inputs_casts_and_results_gives_the_same_bits(dtypes, casts, on_numpy):
    for (name, given), wanted in zip(ANY, [F32, F64, BF16, F16, E4M3, E5M2] * 3, strict=False):
        models, base = drawn(name, (24, 80), models=models_of(name, given))
        models = [model.astype(dtype) for model, dtype in zip(models, dtypes, strict=False)]
        base = base.astype(dtypes[-1])
        if casts == F64 and F64 not in dtypes:
            continue
        fused = evaluated(computed(name, given, models, base, casts=casts), wanted)
        with on_numpy():
            plain = evaluated(computed(name, given, models, base, casts=casts), wanted)
        assert (fused[0], fused[2:]) == (plain[0], plain[2:]), (name, given)


@pytest.mark.parametrize("name", [name for name in all_methods() if name != "passthrough"])
def test_a_tensor_without_elements_has_no_result(name):
    models, base = drawn(name, (0, 80), models=models_for(get_method(name)))
    given = dict(get_method(name).example)
    assert merge_arrays(name, models, None if get_method(name).base == "unused" else base, parameters=given).size == 0


@pytest.mark.parametrize("way", ["gathered", "sampled", "by digits"])
@pytest.mark.parametrize(
    ("name", "given"), [entry for entry in EXACT if "density" in entry[1] or entry[0] == "ramplus_tl"], ids=str
)
def test_statistics_over_several_tensors_are_the_same(name, given, way, on_numpy, monkeypatch):
    """Blocks of a scope begin anywhere in it, tensors of a scope may be of any shape and dtype."""
    if way != "gathered":
        monkeypatch.setattr(statistics, "_SMALL_SCOPE", 0)
    if way == "by digits":
        monkeypatch.setattr(statistics, "MOST_GATHERED", 0)
    monkeypatch.setattr(type(NUMPY), "sweep", 1000)

    def all_of_them() -> list[Any]:
        group, shared = Group(), {}
        tensors = []
        for i, (shape, dtype) in enumerate(
            [((24, 80), BF16), ((700,), F32), ((), F32), ((30, 5), F32), ((9, 65), F64)]
        ):
            models, base = drawn(name, shape, models=models_of(name, given), seed=i, broken=i == 1)
            models = [model.astype(dtype) for model in models]
            scoped = {} if given.get("trim_scope") in (None, "tensor") else {"group": group}
            tensors.append(computed(name, given, models, base, dtype, **scoped))
        if len({tensor.working for tensor in tensors}) > 1 and group.members:
            # Selection over a scope is among values of one dtype.
            tensors = tensors[:-1]
            group.members.pop()
        return [(found[0], found[2:]) for found in (evaluated(tensor, None, shared) for tensor in tensors)]

    fused = all_of_them()
    with on_numpy():
        assert all_of_them() == fused


def pipeline(*, rounds: bool) -> Computed:
    """Return methods on methods, with inputs of files before and after computed ones."""
    models, base = drawn("ties", (24, 80), models=4)
    files = [model.astype(BF16) for model in models]
    files.append(base.astype(BF16))
    inner = computed("ties", {"weight": 1.0, "density": 0.4}, files[:2], files[4], BF16, rounds=rounds)
    random = computed("dare_linear", {"weight": 0.5, "density": 0.4}, [inner, files[1]], files[4], BF16, rounds=rounds)
    by_rows = computed("della", {"weight": 0.5, "density": 0.4}, [files[2], random], files[0], F32, rounds=rounds)
    return computed("linear", {"weight": [0.3, 0.5, 0.2]}, [files[3], by_rows, files[1]], None, BF16)


@pytest.mark.parametrize("rounds", [True, False])
def test_methods_on_methods_give_the_same_bits(rounds, on_numpy):
    fused = evaluated(pipeline(rounds=rounds))
    with on_numpy():
        assert evaluated(pipeline(rounds=rounds))[0] == fused[0]


def test_an_input_that_is_computed_leaves_those_beside_it_alone(on_numpy):
    """It reads its own inputs into the memory of the thread, where others may wait already."""
    files = [np.full(100, value, F32) for value in (1.0, 10.0, 100.0, 1000.0)]
    inner = computed("linear", {"weight": [1.0, 1.0], "normalize": False}, files[2:], None)
    outer = computed("task_arithmetic", {"weight": [1.0, 1.0]}, [inner, files[1]], files[0])
    assert set(evaluated(outer)[1].tolist()) == {1.0 + 1099.0 + 9.0}


def test_blocks_of_rows_that_begin_within_one_are_read_whole(on_numpy):
    models, base = drawn("della", (24, 80), models=2)
    inner = computed("della", {"weight": 0.5, "density": 0.4}, models, base)
    whole = Evaluator().values(inner, 0, inner.size)
    assert np.array_equal(Evaluator().values(inner, 85, 333), whole[85:333])
    outer = computed("linear", {"weight": 1.0}, [inner, models[0]], None)
    expected = Evaluator().result(outer, 0, outer.size, F32)[0]
    assert np.array_equal(Evaluator().result(outer, 85, 333, F32)[0], expected[85:333])


# -- which methods are fused ---------------------------------------------------------------------------------------

# What is left to NumPy: functions that the machine lacks, tables by rank or column, whole tensors.
PLAIN = [
    ("nuslerp", {"weight": [0.3, 0.7], "nuslerp_flatten": False}),
    ("nuslerp", {"weight": [0.3, 0.7], "nuslerp_flatten": False, "nuslerp_row_wise": True}),
    ("della", {"weight": 0.5, "density": 0.5, "trim_scope": "tensor"}),
    ("della_linear", {"weight": 0.5, "density": 0.3, "rescale_by": "l1", "trim_scope": "tensor"}),
    ("karcher", {"filter_wise": True}),
    ("widen", {}),
    ("opcm", {}),
    *MATRICES,
]


@pytest.fixture
def made(monkeypatch) -> list[Any]:
    """Return the programs that were made, or None for each that could not be."""
    programs: list[Any] = []

    def noted(make: Any) -> Any:
        def call(*arguments: Any) -> Any:
            programs.append(make(*arguments))
            return programs[-1]

        return call

    for maker in ("result_program", "request_program"):
        monkeypatch.setattr(fuse, maker, noted(getattr(fuse, maker)))
    return programs


@pytest.mark.parametrize(("name", "given"), EXACT + SUMMED, ids=str)
def test_methods_and_their_statistics_are_fused(name, given, made, monkeypatch):
    models, base = drawn(name, (24, 80), models=models_of(name, given))
    for dtype in (F32, F64):
        made.clear()
        # Ranks within rows are sorted in float32 alone.
        in_rows = name in ("della", "della_linear") or given.get("trim_scope") == "row"
        plain = (name, given) in PLAIN or (dtype == F64 and in_rows)
        monkeypatch.setenv("WEIGHTSMITH_KERNELS", "" if plain else "strict")
        evaluated(computed(name, given, [model.astype(dtype) for model in models], base), BF16)
        assert all(made) != plain or not any(made)
        assert made


@pytest.mark.parametrize(("name", "given"), MATRICES, ids=str)
def test_tensors_that_are_not_taken_apart_are_fused(name, given, made, monkeypatch):
    monkeypatch.setenv("WEIGHTSMITH_KERNELS", "strict")
    models, base = drawn(name, (700,), models=models_of(name, given))
    evaluated(computed(name, given, models, base), BF16)
    # The statistic over a model asks for what no program answers; the result is one.
    assert made[-1] is not None
    assert all(made) or given.get("trim_scope") == "model"


def test_strict_says_what_could_not_be_recorded(monkeypatch):
    monkeypatch.setenv("WEIGHTSMITH_KERNELS", "strict")
    models, base = drawn("nuslerp", (24, 80), models=2)
    with pytest.raises(fuse.Untraceable, match="acos"):
        evaluated(computed(*PLAIN[0], models, base))
    # Short rows are nothing that a method could change.
    models, base = drawn("della", (24, 8), models=2)
    evaluated(computed("della", {"weight": 0.5, "density": 0.5}, models, base))


# -- methods that look as if they could be recorded ----------------------------------------------------------------


def uses_its_start(block: Any, *, weight: PerModel[float]) -> Any:
    return block.models[0] * (block.start + 1)


def branches_on_its_start(block: Any, *, weight: PerModel[float]) -> Any:
    return block.models[0] if block.start % 7 == 0 else block.base


def uses_its_positions(block: Any, *, weight: PerModel[float]) -> Any:
    return block.models[0] * (block.positions != 3)


def adds_in_place(block: Any, *, weight: PerModel[float]) -> Any:
    first = block.models[0] * 2.0
    total = first
    total += block.base
    return total - first * 0.5


def swallows(block: Any, *, weight: PerModel[float]) -> Any:
    try:
        return block.models[0] * float(block.xp.sum(block.models[0])) * 0.0 + block.base
    except Exception:
        return block.models[0]


def takes_a_total(block: Any, *, weight: PerModel[float]) -> Any:
    total = block.xp.sum(block.xp.astype(block.base, block.xp.float64))
    return block.models[0] if total == 0 else block.base


def is_wide(block: Any, *, weight: PerModel[float]) -> Any:
    xp = block.xp
    return xp.astype(block.models[0], xp.float64) * (1 + 2**-9) * (1 + 2**-30) + 2**-33


def is_narrow(block: Any, *, weight: PerModel[float]) -> Any:
    return block.xp.astype(block.models[0], block.xp.float32)


def is_an_input(block: Any, *, weight: PerModel[float]) -> Any:
    return block.models[1]


def is_constant(block: Any, *, weight: PerModel[float]) -> Any:
    return block.xp.full_like(block.base, 0.1)


def is_a_mask(block: Any, *, weight: PerModel[float]) -> Any:
    return block.models[0] > block.base


def is_as_wide_as_its_shape(block: Any, *, weight: PerModel[float]) -> Any:
    zeros = block.xp.zeros_like(block.base)
    return block.models[0] / zeros.ndim + (zeros.shape[-1] if block.base.ndim == 2 else 0)


def asks_for_the_namespace(block: Any, *, weight: PerModel[float]) -> Any:
    from array_api_compat import array_namespace

    return array_namespace(block.base, *block.models).clip(block.models[0] - block.base, -0.0, 0.0)


def clips_at_zero(block: Any, *, weight: PerModel[float]) -> Any:
    xp = block.xp
    delta = block.models[0] - block.base
    return 1.0 / xp.clip(delta, 0.0, None) + 1.0 / xp.minimum(-0.0, delta) + 1.0 / xp.clip(delta, -1, -0.0)


def scales_by_numbers(block: Any, *, weight: PerModel[float]) -> Any:
    return weight[0] * block.models[0] + True * block.models[1] - 16777217 * block.base


LOOKS = [
    uses_its_start,
    branches_on_its_start,
    uses_its_positions,
    adds_in_place,
    swallows,
    takes_a_total,
    is_wide,
    is_narrow,
    is_an_input,
    is_constant,
    is_a_mask,
    is_as_wide_as_its_shape,
    asks_for_the_namespace,
    clips_at_zero,
    scales_by_numbers,
]


@pytest.fixture
def register(monkeypatch) -> Callable[..., Method]:
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))

    def add(function: Any, **declared: Any) -> Method:
        method("tried", base="required", **declared)(function)
        return get_method("tried")

    return add


@pytest.mark.parametrize("reads", ["elements", "rows"])
@pytest.mark.parametrize("function", LOOKS, ids=lambda function: function.__name__)
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_nothing_is_recorded_that_is_another_method(function, reads, dtype, register, on_numpy):
    tried = register(function, reads=reads)
    models, base = drawn(tried, (24, 80), models=2)
    models = [model.astype(dtype) for model in models]

    def results() -> Any:
        tensor = computed(tried, {"weight": 0.1}, models, base)
        parts = [Evaluator().result(tensor, start, start + 480, BF16)[0].tobytes() for start in range(0, 1920, 480)]
        return [evaluated(tensor, wanted)[0] for wanted in (F32, F64, BF16, F16)], parts

    fused = results()
    with on_numpy():
        assert results() == fused


@pytest.mark.parametrize("function", [is_wide, asks_for_the_namespace, clips_at_zero, scales_by_numbers])
def test_a_method_from_elsewhere_is_fused_as_ours_are(function, register, monkeypatch):
    monkeypatch.setenv("WEIGHTSMITH_KERNELS", "strict")
    tried = register(function)
    models, base = drawn(tried, (24, 80), models=2)
    evaluated(computed(tried, {"weight": 0.5}, models, base))


def test_a_column_is_no_result(register):
    def column(block: Any, *, weight: PerModel[float]) -> Any:
        return block.xp.max(block.base, axis=-1, keepdims=True)

    tried = register(column, reads="rows")
    models, base = drawn(tried, (24, 80), models=1)
    tensor = computed(tried, {"weight": 1.0}, models, base)
    assert fuse.result_program(tensor, None, F32) is None


def test_random_numbers_must_be_declared(register):
    def draws(block: Any, *, weight: PerModel[float]) -> Any:
        return block.base * block.draw(0)

    tried = register(draws)
    models, base = drawn(tried, (24, 80), models=1)
    assert fuse.result_program(computed(tried, {"weight": 1.0}, models, base), None, F32) is None


def test_programs_are_shared_by_tensors_that_are_alike_and_by_no_others():
    models, base = drawn("task_arithmetic", (24, 80), models=2)

    def program(weight: float, *, dtype: DType = F32, kind: DType = F32, name: str = "task_arithmetic") -> Any:
        made = [model.astype(kind) for model in models]
        return fuse.result_program(
            computed(name, {"weight": weight}, made, base.astype(kind), promote([kind])), None, dtype
        )

    assert program(0.5) is program(0.5)
    others = [
        program(0.25),
        program(0.0),
        program(-0.0),
        program(1.0),
        program(0.5, dtype=BF16),
        program(0.5, kind=BF16),
    ]
    assert len({id(one) for one in [program(0.5), *others]}) == 7


def test_zero_and_minus_zero_are_other_parameters(on_numpy):
    """Their products differ in the sign of zeros, and they are equal in Python."""
    models, _ = drawn("passthrough", (24, 80))
    for scale in (0.0, -0.0):
        found = evaluated(computed("passthrough", {"scale": [scale]}, models, None))
        with on_numpy():
            assert evaluated(computed("passthrough", {"scale": [scale]}, models, None))[0] == found[0]


@pytest.mark.parametrize("level", range(len(native.levels())))
def test_every_level_gives_the_same_bytes(level, monkeypatch):
    chosen = [
        ("ties", {"weight": 0.5, "density": 0.3, "rescale": True}),
        ("della", {"weight": 0.5, "density": 0.4, "rescale_by": "l1"}),
        ("arcee_fusion", {}),
        ("karcher", {}),
        ("model_stock", {"filter_wise": True}),
    ]
    for name, given in chosen:
        results = []
        for library in (native.levels()[0], native.levels()[level]):
            monkeypatch.setattr(native, "library", lambda library=library: library)
            monkeypatch.setattr(fuse, "_SHARED", {})
            models, base = drawn(name, (60, 131), models=3)
            results.append(evaluated(computed(name, given, models, base))[0])
            monkeypatch.undo()
        assert results[0] == results[1], name
