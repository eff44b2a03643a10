"""Sparse changes, held against layers that keep their deltas dense, and SNELL's against PyTorch's own operations."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from one_layer import Case, check, draw, folded, refused

from weightsmith.errors import CheckpointError

OUT, IN = 9, 14


def sparse(kind: str, *, mask: bool, replacing: bool, **config: Any) -> Case:
    rng = np.random.default_rng(1)
    places = np.sort(rng.permutation(OUT * IN)[:20])
    values = draw(2, 20)
    parts = {"sparse_values": values}
    if mask:
        parts["sparse_mask"] = np.isin(np.arange(OUT * IN), places).reshape(OUT, IN)
    else:
        shuffled = rng.permutation(20)
        parts |= {"sparse_values": values[shuffled], "sparse_indices": places[shuffled]}

    def forward(x: Any, weight: Any, bias: Any, parts: Any) -> Any:
        total = x @ weight.T + bias
        for place, value in zip(places, values, strict=True):
            row, column = divmod(int(place), IN)
            total[:, row] += x[:, column] * (value - replacing * weight[row, column])
        return total

    return Case({"peft_type": kind, **config}, parts, forward)


def snell(model: str, share: float, norm: float = 2.0, heads: int = 2) -> Case:
    config = {"peft_type": "SNELL", "tuning_model": model, "init_thres": share, "norm_p": norm}
    name = "additional_q.learnable."
    parts = {f"{name}In_Qs": draw(1, heads, IN, 4), f"{name}Out_Qs": draw(2, heads, OUT, 4)}
    parts[f"{name}shared_coeff_fc"] = np.array([0.3, -0.2, 0.1][:heads], np.float32).reshape(-1, 1, 1)
    if model in ("mixk", "snella"):
        parts |= {
            f"{name}{part}": np.array([value], np.float32)
            for part, value in zip(("alpha", "beta", "gamma"), (0.7, 0.1, 0.5), strict=True)
        }

    def forward(x: Any, weight: Any, bias: Any, parts: Any) -> Any:
        torch = pytest.importorskip("torch")
        got = {key.removeprefix(name): torch.tensor(value, dtype=torch.float64) for key, value in parts.items()}
        distances = torch.cdist(got["In_Qs"], got["Out_Qs"], p=norm, compute_mode="donot_use_mm_for_euclid_dist")
        delta = (got["shared_coeff_fc"] * distances).sum(dim=0)
        if "alpha" in got:
            delta = delta + got["alpha"] * torch.softmax(delta / got["gamma"], dim=-1) + got["beta"]
        if model == "snella" or (model == "snell" and share):
            sizes = delta.abs()
            threshold = torch.quantile(sizes.float().flatten(), share)
            delta = delta * torch.nn.functional.threshold(sizes, float(threshold), 0)
        return x @ weight.T + bias + x @ delta.numpy()

    return Case(config, parts, forward)


CASES = {
    "lift at indices": sparse("LIFT", mask=False, replacing=False),
    "lift in a mask": sparse("LIFT", mask=True, replacing=False),
    "fish, replacing": sparse("FISH", mask=False, replacing=True, sparse_replace=True),
    "sara in a mask": sparse("SARA", mask=True, replacing=True),
    "sara, added": sparse("SARA", mask=False, replacing=False, sparse_replace=False),
    "snell": snell("snell", 0.8),
    "snell of distances that are sums": snell("snell", 0.35, norm=1.0, heads=3),
    "snell that drops nothing is a klora": snell("snell", 0.0),
    "klora": snell("klora", 0.9),
    "mixk": snell("mixk", 0.9),
    "snella": snell("snella", 0.5),
}


@pytest.mark.parametrize("name", CASES)
def test_a_fold_gives_what_the_adapted_layer_gives(name):
    check(CASES[name])


@pytest.mark.parametrize(("active", "score"), [(True, 0.1), (True, 0.7), (False, 0.0999)])
@pytest.mark.parametrize("shape", [(5, 4, 3, 3), (6,)])
def test_taps_changes_layers_whose_score_reaches_the_threshold(active, score, shape):
    base = {"m.q.weight": draw(1, *shape), "m.q.bias": draw(2, shape[0])}
    parts = {"taps_delta": draw(3, *shape), "taps_delta_bias": draw(4, shape[0]), "taps_score": np.float64(score)}
    case = Case({"peft_type": "TAPS"}, parts, lambda x, *_: x)
    found = folded(case, base)
    expected = {"weight": parts["taps_delta"], "bias": parts["taps_delta_bias"]}
    for name, delta in expected.items():
        np.testing.assert_allclose(found[f"m.q.{name}"].numpy(), base[f"m.q.{name}"] + active * delta, rtol=1e-6)


def test_sparse_deltas_fit_kernels_and_norms():
    for shape in ((5, 4, 3, 3), (20,)):
        base = {"m.q.weight": draw(1, *shape)}
        places = np.array([3, 19, 7])
        case = Case({"peft_type": "LIFT"}, {"sparse_values": draw(2, 3), "sparse_indices": places}, lambda x, *_: x)
        expected = base["m.q.weight"].reshape(-1).copy()
        expected[places] += case.parts["sparse_values"]
        assert np.array_equal(folded(case, base)["m.q.weight"].numpy().reshape(-1), expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_sara_finds_its_entries_below_the_threshold_in_the_dtype_of_the_base(dtype):
    """PyTorch compares a half-precision weight with the threshold rounded to it, in the order of its storage."""
    torch = pytest.importorskip("torch")
    from_numpy = torch.tensor(draw(1, OUT, IN) * 0.02)
    weight = from_numpy.to({np.float32: torch.float32, np.float16: torch.float16}.get(dtype, torch.bfloat16))
    weight[2, 3] = 0.01
    mask = (weight.abs() < 0.01).numpy()
    values = draw(2, int(mask.sum()))
    stored = weight.float().numpy().astype(dtype)
    case = Case({"peft_type": "SARA", "threshold": 0.01}, {"sparse_values": values}, lambda x, *_: x)
    expected = stored.copy()
    expected[mask] = values.astype(dtype)
    assert np.array_equal(folded(case, {"m.q.weight": stored})["m.q.weight"].numpy(), expected)
    turned = Case({**case.config, "fan_in_fan_out": True}, case.parts, case.forward)
    assert np.array_equal(folded(turned, {"m.q.weight": stored})["m.q.weight"].numpy(), expected)
    case.parts["sparse_values"] = values[1:]
    assert f"{len(values) - 1} values for {len(values)} places" in refused_on(case, stored)


def refused_on(case: Case, weight: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        folded(case, {"m.q.weight": weight})["m.q.weight"].numpy()
    return str(caught.value)


def changed(case: Case, **parts: Any) -> Case:
    case.parts |= parts
    return case


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (changed(sparse("LIFT", mask=False, replacing=False), sparse_indices=np.full(20, 3)), "holds 3 twice"),
        (
            changed(sparse("LIFT", mask=False, replacing=False), sparse_indices=np.arange(107, 127)),
            "0 to 125 are there",
        ),
        (changed(sparse("FISH", mask=True, replacing=False), sparse_values=draw(1, 19)), "19 values for 20 places"),
        (changed(sparse("FISH", mask=True, replacing=False), sparse_mask=np.full((OUT, IN), 2)), "places from 2 to 2"),
        (Case({"peft_type": "SARA"}, {"sparse_values": draw(1, 3)}, lambda x, *_: x), "must give threshold"),
        (snell("snell", 1.5), "it is a share, from 0 to 1"),
        (snell("snell", 0.5, norm=0.0), "which is no norm"),
        (changed(snell("mixk", 0.5), In_Qs=draw(1, 2, IN, 5)), "holds In_Qs of"),
    ],
)
def test_what_does_not_fit_is_refused(case, message):
    assert message in refused(case)


def test_snellas_numbers_must_belong_to_the_variant():
    case = snell("snella", 0.5)
    case.config["tuning_model"] = "snell"
    assert "alpha, beta and gamma are there" in refused(case)
