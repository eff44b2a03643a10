"""Adapters in the base's singular vectors, held against forward passes that decompose and multiply step by step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from one_layer import Case, adapter, check, checkpoint, draw, folded, refused

from weightsmith.adapters.fold import fold
from weightsmith.errors import CheckpointError

OUT, IN, RANK = 9, 14, 3
BASE = Case({}, {}, lambda x, *_: x).base()["m.q.weight"]
UP, VALUES, DOWN = (part.astype(np.float32) for part in np.linalg.svd(BASE, full_matrices=False))


def edora(config: dict[str, Any], scale: float, *, magnitude: bool = True, name: str = "lora_latent_mapping") -> Case:
    parts = {
        "lora_A.weight": draw(1, RANK, IN),
        "lora_B.weight": draw(2, OUT, RANK),
        f"{name}.weight": draw(3, RANK, RANK),
    }
    if magnitude:
        parts["lora_magnitude_vector"] = np.abs(draw(4, OUT))

    def forward(x: Any, weight: Any, bias: Any, parts: Any) -> Any:
        middle = x @ parts["lora_A.weight"].T @ parts[f"{name}.weight"].T
        total = x @ weight.T + scale * middle @ parts["lora_B.weight"].T
        if magnitude:
            delta = scale * parts["lora_B.weight"] @ parts[f"{name}.weight"] @ parts["lora_A.weight"]
            total = total * (parts["lora_magnitude_vector"] / np.linalg.norm(weight + delta, axis=1))
        return total + bias

    return Case({"peft_type": "EDORA", "r": RANK, "lora_alpha": 5, **config}, parts, forward)


def svft(rows: Any, columns: Any, *, gate: bool = True, rank: int = OUT, prefix: str = "svft_layer.") -> Case:
    entries = draw(5, len(rows))
    parts = {"s": entries, "s_row": np.array(rows), "s_col": np.array(columns)}
    parts |= {"u": UP[:, :rank], "v": DOWN[:rank], "s_pre": VALUES[:rank]}
    parts |= {"s_pre_row": np.arange(rank), "s_pre_col": np.arange(rank)}
    if gate:
        parts["gate"] = np.array([-0.7], np.float32)

    def forward(x: Any, weight: Any, bias: Any, parts: Any) -> Any:
        got = {name.removeprefix(prefix): value for name, value in parts.items()}
        middle = np.diag(got["s_pre"])
        open_ = 1 / (1 + np.exp(-got["gate"])) if gate else 1
        for value, row, column in zip(got["s"], rows, columns, strict=True):
            middle[row, column] += np.squeeze(open_ * value)
        return x @ got["v"].T @ middle.T @ got["u"].T + bias

    return Case({"peft_type": "SVFT"}, {f"{prefix}{name}": value for name, value in parts.items()}, forward)


def vectorfit(part: str, *, stored: bool, bias: bool = True) -> Case:
    moved = 0.3 * draw(6, OUT)
    parts = {part: (VALUES if part.endswith("sigma") else 0) + moved}
    if stored:
        parts |= {"vectorfit_u": UP, "vectorfit_v": DOWN}
    if bias:
        parts["vectorfit_bias"] = draw(7, OUT)

    def forward(x: Any, weight: Any, bias: Any, parts: Any) -> Any:
        up, values, down = np.linalg.svd(weight, full_matrices=False)
        return ((x @ down.T) * (values + moved)) @ up.T + bias + parts.get("vectorfit_bias", 0)

    return Case({"peft_type": "VECTORFIT"}, parts, forward)


def pmss() -> Case:
    rows, columns = np.array([7, 0, 4]), np.array([13, 2, 5, 6])
    parts = {"pmss_U": draw(8, 4, 3), "pmss_rows": rows, "pmss_columns": columns}

    def forward(x: Any, weight: Any, bias: Any, parts: Any) -> Any:
        return x @ weight.T + bias + 0.5 * ((x @ weight[rows].T) @ parts["pmss_U"].T) @ weight[:, columns].T

    return Case({"peft_type": "PMSS", "scaling": 0.5}, parts, forward)


BAND = ([0, 1, 2, 1, 5, 8, 0], [0, 1, 2, 2, 4, 8, 1])
CASES = {
    "edora": edora({}, 5 / RANK),
    "edora stabilised": edora({"use_rslora": True}, 5 / np.sqrt(RANK)),
    "edora as its authors save it": edora({}, 5 / RANK, name="default_lora_latent_mapping"),
    "lora-xs": edora({}, 5 / RANK, magnitude=False),
    "svft banded": svft(*BAND),
    "svft, a place twice": svft([3, 3, 0], [2, 2, 8]),
    "svft without a gate, own names": svft(*BAND, gate=False, prefix="svft_"),
    "svft truncated": svft([0, 1, 4], [0, 2, 3], rank=5),
    "vectorfit values": vectorfit("vectorfit_sigma", stored=True),
    "vectorfit moves": vectorfit("vectorfit_delta", stored=True),
    "vectorfit values, vectors found anew": vectorfit("vectorfit_sigma", stored=False),
    "vectorfit moves, vectors found anew": vectorfit("vectorfit_delta", stored=False, bias=False),
    "pmss": pmss(),
}


@pytest.mark.parametrize("name", CASES)
def test_a_fold_gives_what_the_adapted_layer_gives(name):
    check(CASES[name])


def test_a_file_of_edora_is_found_with_its_factor_named_after_the_module():
    """The authors' saving cuts the adapter's name out of ``q.default_lora_latent_mapping``."""
    case = edora({}, 5 / RANK)
    held = dict(adapter(case).items())
    named = {
        key.replace(".q.lora_latent_mapping", ".q_lora_latent_mapping"): tensor.numpy() for key, tensor in held.items()
    }
    found = fold(checkpoint("base", case.base()), checkpoint("adapter", named, case.config))["m.q.weight"].numpy()
    assert np.array_equal(found, folded(case)["m.q.weight"].numpy())


def test_an_svft_diagonal_needs_no_vectors_whatever_their_signs():
    diagonal = list(range(OUT))
    whole, case = svft(diagonal, diagonal), svft(diagonal, diagonal)
    case.parts = {
        name: value for name, value in case.parts.items() if name.split(".")[1] in ("s", "s_row", "s_col", "gate")
    }
    found, expected = folded(case)["m.q.weight"].numpy(), folded(whole)["m.q.weight"].numpy()
    np.testing.assert_allclose(found, expected, atol=2e-6)


def without(case: Case, *parts: str) -> Case:
    case.parts = {name: value for name, value in case.parts.items() if name not in parts}
    return case


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (without(edora({}, 1), "lora_A.weight"), "does not hold lora_A: a decomposition made anew"),
        (edora({"r": 4}, 1), "gives it rank 4, and its factors have 3"),
        (without(svft(*BAND, prefix="svft_"), "svft_u", "svft_v", "svft_s_pre"), "entries off the diagonal"),
        (without(svft(*BAND, prefix="svft_"), "svft_v"), "does not hold svft_v"),
        (svft([0, 9], [0, 1]), "holds places from 0 to 9, and 0 to 8 are there"),
        (
            Case({"peft_type": "VECTORFIT"}, {"vectorfit_sigma": draw(1, 5)}, lambda x, *_: x),
            "it has 5 singular values",
        ),
        (without(pmss(), "pmss_rows"), "does not hold pmss_rows: how the skeleton was chosen"),
    ],
)
def test_what_was_drawn_or_decomposed_must_be_in_the_file(case, message):
    assert message in refused(case)


def test_vectors_are_not_found_anew_where_singular_values_meet():
    """Any rotation of two vectors of one value is as good, and moves of theirs that differ would depend on it."""
    values = VALUES.copy()
    values[4] = values[3]
    alike = {"m.q.weight": (UP * values) @ DOWN, "m.q.bias": np.zeros(OUT, np.float32)}
    case = vectorfit("vectorfit_delta", stored=False, bias=False)
    with pytest.raises(CheckpointError, match=r"leave \d+% of the change open; store the vectors"):
        folded(case, alike)["m.q.weight"].numpy()
    case.parts["vectorfit_delta"][4] = case.parts["vectorfit_delta"][3]
    found = folded(case, alike)["m.q.weight"].numpy()
    np.testing.assert_allclose(found, (UP * (values + case.parts["vectorfit_delta"])) @ DOWN, atol=1e-5)


def test_a_base_that_holds_nan_has_no_vectors():
    broken = {"m.q.weight": np.full((OUT, IN), np.nan, np.float32), "m.q.bias": np.zeros(OUT, np.float32)}
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        folded(vectorfit("vectorfit_delta", stored=False), broken)["m.q.weight"].numpy()
