"""Branches before, beside and behind a layer, held against the branches themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from one_layer import Case, check, checkpoint, draw, folded, refused

from weightsmith.adapters.fold import fold
from weightsmith.errors import PlanError

OUT, IN = 9, 14


def branch(x: Any, parts: Any, down: str, up: str) -> Any:
    middle = x @ parts[f"{down}.weight"].T + parts.get(f"{down}.bias", 0)
    return middle @ parts[f"{up}.weight"].T + parts.get(f"{up}.bias", 0)


def hydra(
    *,
    parallel: bool = True,
    sequential: bool = True,
    biases: bool = False,
    bias: bool = True,
    own: str = "",
    **config: Any,
) -> Case:
    """``own``: the authors' module that holds a branch; else names are ours."""
    names = {
        side: (f"{own.format(side)}.down_proj", f"{own.format(side)}.up_proj")
        if own
        else (f"hydra_{side}_A", f"hydra_{side}_B")
        for side in ("par", "seq")
    }
    parts: dict[str, Any] = {}
    for side, width, there in (("par", IN, parallel), ("seq", OUT, sequential)):
        if there:
            down, up = names[side]
            parts |= {f"{down}.weight": draw(1, 3, width), f"{up}.weight": draw(2, OUT, 3)}
            parts |= {f"{down}.bias": draw(3, 3), f"{up}.bias": draw(4, OUT)} if biases else {}

    def forward(x: Any, weight: Any, bias: Any, parts: Any) -> Any:
        total = inner = x @ weight.T + bias
        scale = config.get("scale", 1)
        if parallel:
            total = total + scale * branch(x, parts, *names["par"])
        if sequential:
            total = total + scale * branch(inner, parts, *names["seq"])
        return total

    return Case({"peft_type": "HYDRA", **config}, parts, forward, (OUT, IN), bias=bias)


def bottleneck(way: str, *, shape: tuple[int, int] = (OUT, IN), biases: bool = False, **config: Any) -> Case:
    out, width = shape
    first, last = {"before": (width, width), "after": (out, out), "parallel": (width, out)}[way]
    parts = {"adapter_down.weight": draw(1, 3, first), "adapter_up.weight": draw(2, last, 3)}
    parts |= {"adapter_down.bias": draw(3, 3), "adapter_up.bias": draw(4, last)} if biases else {}

    def forward(x: Any, weight: Any, bias: Any, parts: Any) -> Any:
        scale = float(np.squeeze(parts.get("adapter_scaling", config.get("scaling", 1))))
        sides = "adapter_down", "adapter_up"
        if way == "before":
            return (x + scale * branch(x, parts, *sides)) @ weight.T + bias
        inner = x @ weight.T + bias
        return inner + scale * branch(inner if way == "after" else x, parts, *sides)

    return Case({"peft_type": "BOTTLENECK", "non_linearity": "linear", **config}, parts, forward, shape)


def learned(case: Case) -> Case:
    case.parts["adapter_scaling"] = np.array([0.3], np.float32)
    return case


CASES = {
    "hydra": hydra(scale=0.7),
    "hydra without any bias": hydra(bias=False),
    "hydra with biases": hydra(biases=True, scale=0.7),
    "hydra, parallel alone": hydra(sequential=False, biases=True),
    "hydra, sequential alone": hydra(parallel=False, biases=True),
    "hydra as CLIP's layers name it": hydra(biases=True, own="adapter_{}"),
    "bottleneck before": bottleneck("before", biases=True, scaling=0.7),
    "bottleneck after": bottleneck("after", biases=True, scaling=0.7),
    "bottleneck after, no biases": bottleneck("after"),
    "bottleneck beside": bottleneck("parallel", biases=True, use_parallel_adapter=True),
    "bottleneck on a square, before": bottleneck("before", shape=(7, 7), insertion="before"),
    "bottleneck on a square, after": bottleneck("after", shape=(7, 7), biases=True, insertion="after"),
    "bottleneck with a learned scale": learned(bottleneck("after")),
}


@pytest.mark.parametrize("name", CASES)
def test_a_fold_gives_what_the_adapted_layer_gives(name):
    check(CASES[name])


@pytest.mark.parametrize(
    ("spelling", "layer"),
    [
        ("blocks.0.mlp.hydra_mlp_{}.{}_proj", "blocks.0.mlp.fc2"),
        ("blocks.0.attn.hydra_proj_{}.{}_proj", "blocks.0.attn.proj"),
        ("visual.resblocks.0.mlp.ad_lin.adapter_{}.{}_proj", "visual.resblocks.0.mlp.c_proj"),
        ("roberta.layer.0.output.hydra_{}.hydra_{}", "roberta.layer.0.output.dense"),
    ],
)
def test_names_of_all_of_hydras_code_lead_to_the_adapted_layer(spelling, layer):
    case = hydra()
    ends = {"A": "A", "B": "B"} if spelling.endswith("hydra_{}") else {"A": "down", "B": "up"}
    held = {}
    for name, array in case.parts.items():
        _, side, end = name.removesuffix(".weight").split("_")
        held[f"{spelling.format(side, ends[end])}.weight"] = array
    base = case.base()
    tensors = {f"{layer}.weight": base["m.q.weight"], f"{layer}.bias": base["m.q.bias"]}
    if "ad_lin" in spelling:
        # CLIP's state dict holds the frozen layer beside its branches.
        held["visual.resblocks.0.mlp.ad_lin.linear.weight"] = base["m.q.weight"]
    found = fold(checkpoint("base", tensors), checkpoint("adapter", held, case.config))
    expected = folded(case)
    for part in ("weight", "bias"):
        assert np.array_equal(found[f"{layer}.{part}"].numpy(), expected[f"m.q.{part}"].numpy())


def test_a_bias_that_a_layer_has_no_place_for_is_refused():
    case = hydra(biases=True, bias=False)
    assert "changes the bias of m.q, and base has no m.q.bias" in refused(case)


def test_a_bias_of_another_length_is_refused():
    case = hydra()
    with pytest.raises(PlanError, match=r"9 numbers, and base has m.q.bias as \[14\]"):
        folded(case, case.base() | {"m.q.bias": draw(1, IN)})


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (bottleneck("after", non_linearity="relu"), "a non-linear function, relu, stands between its projections"),
        (Case({"peft_type": "BOTTLENECK"}, bottleneck("after").parts, lambda x, *_: x), "a non-linear function, tanh"),
        (bottleneck("before", shape=(7, 7)), "may stand before, after, parallel: give insertion"),
        (bottleneck("before", insertion="after"), "do not stand as config says: after"),
        (bottleneck("after", shape=(5, 6), use_parallel_adapter=True), "do not stand as config says: parallel"),
        (bottleneck("after", insertion="behind"), "known are before, after, parallel"),
        (Case({"peft_type": "ADAPTFORMER"}, {}, lambda x, *_: x), "a non-linear function stands between"),
        (Case({"peft_type": "DOPAMINE"}, {}, lambda x, *_: x), "a gate opens and closes"),
    ],
)
def test_what_no_plain_weights_equal_is_refused(case, message):
    assert message in refused(case)
