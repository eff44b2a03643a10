"""Adapters written by hand: layouts that PEFT does not write, and what does not fit together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import weightsmith as ws
from conftest import write_safetensors
from weightsmith.adapters.adapter import Adapter
from weightsmith.adapters.wavelet_filters import FILTERS, bank
from weightsmith.errors import CheckpointError, PlanError, WeightsmithError

OUT, IN = 8, 6


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def write_adapter(folder: Path, config: dict[str, Any], parts: dict[str, np.ndarray]) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    named = {
        f"base_model.{name}" if "." not in name else f"base_model.model.{name}": part for name, part in parts.items()
    }
    write_safetensors(folder / "adapter_model.safetensors", named)
    return folder


@pytest.fixture
def folded(write_model, tmp_path):
    """Return a function that folds parts of a layer q into a base with a bias."""
    base = {"q.weight": numbers(OUT, IN), "q.bias": numbers(OUT), "plain.weight": numbers(OUT, IN, seed=1)}

    def fold(config: dict[str, Any], parts: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        adapter = write_adapter(tmp_path / "adapter", config, parts)
        model = ws.open(f"{write_model('base', base)}+{adapter}")
        return {name: tensor.numpy() for name, tensor in model.items()}

    return fold


def test_glora_as_its_authors_hold_it_with_paths_of_their_own(folded):
    """A is a product and B a vector, which PEFT's one setting for both cannot say."""
    rank, weight, bias = 2, numbers(OUT, IN).astype(np.float64), numbers(OUT).astype(np.float64)
    down, up, shift, column = numbers(OUT, rank), numbers(rank, IN), numbers(OUT, 1, seed=2), numbers(IN, 1)
    scale, offset = numbers(1, seed=3), numbers(OUT, seed=4)
    parts = {"q.Ad": down, "q.Au": up, "q.glora_B.X": shift, "q.glora_C.X": column, "q.D": scale, "q.E": offset}
    found = folded({"peft_type": "GLORA", "r": rank}, parts)
    expected = weight + weight * (down.astype(np.float64) @ up) + shift
    np.testing.assert_allclose(found["q.weight"], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["q.bias"], bias + bias * scale[0] + offset + weight @ column[:, 0], rtol=1e-5)


def test_circulant_blocks_by_their_entries(folded):
    kernel = numbers(4, 3, 2)
    expected = numbers(OUT, IN).astype(np.float64)
    for row in range(OUT):
        for column in range(IN):
            block = kernel[row // 2, column // 2]
            expected[row, column] += block[(column % 2 - row % 2) % 2] / IN
    found = folded({"peft_type": "C3A", "block_size": 2}, {"q.c3a_kernel": kernel})
    np.testing.assert_allclose(found["q.weight"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("group", [2, 4, 512, 1024])
def test_large_groups_of_outputs_turn_as_small_ones_do(group, write_model, tmp_path):
    """Of 1024 outputs a tile has fewer than a group, and the largest group is worked on whole."""
    outputs, columns = 1024, 600
    weight, theta, alpha = numbers(outputs, columns), numbers(outputs // 2), numbers(outputs // 2, seed=1)
    parts = {"q.road_theta": theta, "q.road_alpha": alpha}
    adapter = write_adapter(tmp_path / "adapter", {"peft_type": "ROAD", "group_size": group}, parts)
    folded = ws.open(f"{write_model('base', {'q.weight': weight})}+{adapter}")["q.weight"]
    expected = np.empty((outputs, columns))
    for pair in range(outputs // 2):
        first = pair // (group // 2) * group + pair % (group // 2)
        second = first + group // 2
        cosine, sine = alpha[pair] * np.cos(theta[pair]), alpha[pair] * np.sin(theta[pair])
        expected[first] = cosine * weight[first] - sine * weight[second]
        expected[second] = cosine * weight[second] + sine * weight[first]
    whole = folded.numpy()
    np.testing.assert_allclose(whole, expected, rtol=1e-4, atol=1e-5)
    pieces = [folded.read(start, min(start + 77_777, folded.size)) for start in range(0, folded.size, 77_777)]
    assert np.concatenate(pieces).tobytes() == whole.tobytes()


def test_places_named_twice_add_up_and_places_may_be_floats(folded):
    indices, values = np.array([[0, 7, 0], [5, 1, 5]], np.float32), np.array([1, 2, 4], np.float32)
    found = folded({"peft_type": "SHIRA"}, {"q.shira_indices": indices, "q.shira_weight": values})
    expected = numbers(OUT, IN)
    expected[0, 5] += 5
    expected[7, 1] += 2
    np.testing.assert_allclose(found["q.weight"], expected, rtol=1e-6)
    assert np.array_equal(found["plain.weight"], numbers(OUT, IN, seed=1))


@pytest.mark.parametrize("family", [family for family in FILTERS if family != "coif4"])
def test_wavelets_are_orthogonal_and_have_their_vanishing_moments(family):
    low, high = bank(family)
    for shift in range(0, len(low), 2):
        assert np.dot(low[shift:], low[: len(low) - shift]) == pytest.approx(float(shift == 0), abs=1e-11)
        assert np.dot(low[shift:], high[: len(low) - shift]) == pytest.approx(0, abs=1e-11)
    order = int(family.lstrip("dbsymcoif"))
    moments = order if family[0] in "ds" else 2 * order
    steps = np.arange(len(low)) / len(low)
    assert all(abs(np.dot(high, steps**moment)) < 1e-6 for moment in range(moments))


BANK = {"vblora_vector_bank": numbers(5, 2)}
LOGITS = {"q.vblora_logits_A": numbers(2, 3, 5), "q.vblora_logits_B": numbers(4, 2, 5)}
OSF = {"q.osf_svd_params.U_low": numbers(OUT, 2), "q.osf_svd_params.S_low": numbers(2)}
GRALORA = {"q.gralora_A": numbers(2, 3, 4), "q.gralora_B": numbers(2, 4, 4)}
TINY = {"q.tinylora_A": numbers(2, IN), "q.tinylora_B": numbers(OUT, 2), "tinylora_v.0": numbers(5)}
FROD = {
    "q.frod_lambda_l": numbers(IN),
    "q.frod_lambda_s_values": numbers(3),
    "frod_V.q": numbers(IN, IN),
    "frod_s_indices.q": np.zeros((2, 3), np.int64),
    "frod_s_size.q": np.full(2, IN, np.int64),
}


@pytest.mark.parametrize(
    ("config", "parts", "message"),
    [
        (
            {"peft_type": "C3A", "block_size": 4},
            {"q.c3a_kernel": numbers(4, 3, 2)},
            "blocks of 4 .block_size., and its",
        ),
        (
            {"peft_type": "C3A", "block_size": 2},
            {"q.c3a_kernel": numbers(4, 2, 2)},
            r"needed is a weight \[m\*b, n\*b\]",
        ),
        (
            {"peft_type": "SHIRA"},
            {"q.shira_indices": np.array([[8], [0]], np.int32), "q.shira_weight": numbers(1)},
            "shira_indices holds places from 0 to 8, and 0 to 7 are there",
        ),
        (
            {"peft_type": "SHIRA"},
            {"q.shira_indices": np.array([[0], [6]], np.int32), "q.shira_weight": numbers(1)},
            r"shira_indices names places outside a weight \[8, 6\]",
        ),
        (
            {"peft_type": "ROAD", "group_size": 6},
            {"q.road_theta": numbers(4), "q.road_alpha": numbers(4)},
            "groups of 6 outputs .group_size., and 8 are there",
        ),
        (
            {"peft_type": "ROAD", "group_size": 4, "variant": "road_2"},
            {"q.road_theta": numbers(4), "q.road_alpha": numbers(4)},
            "of road_2 it needs 8 angles for 8 outputs, and road_theta has 4",
        ),
        (
            {"peft_type": "ROAD", "variant": "road_3"},
            {"q.road_theta": numbers(4), "q.road_alpha": numbers(4)},
            "variant as 'road_3', of which nothing is known",
        ),
        ({"peft_type": "VBLORA", "r": 2, "topk": 6}, {**BANK, **LOGITS}, "mix 6 vectors .topk., and .* holds 5"),
        ({"peft_type": "VBLORA", "r": 3}, {**BANK, **LOGITS}, "gives it rank 3, and its factors have 2"),
        (
            {"peft_type": "VBLORA", "r": 2},
            {"vblora_vector_bank": numbers(4, 2), **LOGITS},
            r"vblora_vector_bank \[4, 2\] do not fit q.weight",
        ),
        ({"peft_type": "VBLORA", "r": 2}, LOGITS, "does not hold vblora_vector_bank, which its layers share"),
        ({"peft_type": "GRALORA", "r": 4, "gralora_k": 4}, GRALORA, "gives it 4 blocks .gralora_k., and it has 2"),
        ({"peft_type": "GRALORA", "r": 4, "hybrid_r": 2}, GRALORA, "rank 2 .hybrid_r., and it has 0"),
        (
            {"peft_type": "OSF"},
            {**OSF, "q.osf_svd_params.V_low": numbers(2, IN - 1)},
            r"V_low \[2, 5\] do not fit q.weight, which is \[8, 6\]",
        ),
        (
            {"peft_type": "DEFT", "r": 2},
            {"q.deft_P": numbers(OUT, 2)},
            "it has no deft_R, and the adapter's config says that there is one .para.",
        ),
        (
            {"peft_type": "DEFT", "r": 2, "decomposition_method": "lu"},
            {"q.deft_P": numbers(OUT, 2)},
            "decomposition_method as 'lu', of which nothing is known.* known are relu, qr",
        ),
        (
            {"peft_type": "PEANUT", "r": 2, "depth": 10**9},
            {"q.peanut_A": numbers(2, OUT), "q.peanut_B": numbers(OUT, 2)},
            "gives it depth 1e.09, and it has 0 peanut_encoders",
        ),
        (
            {"peft_type": "PEANUT", "r": 2, "act_fn": "prelu"},
            {"q.peanut_A": numbers(2, OUT), "q.peanut_B": numbers(OUT, 2)},
            "act_fn as 'prelu', of which nothing is known",
        ),
        (
            {"peft_type": "WAVEFT", "n_frequency": 49},
            {"q.waveft_spectrum": numbers(49)},
            "it holds 49 coefficients, and its weight has 48 elements",
        ),
        ({"peft_type": "WAVEFT"}, {"q.waveft_spectrum": numbers(9)}, "gives it 2592 coefficients .n_frequency."),
        (
            {"peft_type": "WAVEFT", "n_frequency": 9, "wavelet_family": "coif5"},
            {"q.waveft_spectrum": numbers(9)},
            "wavelet_family as 'coif5', of which nothing is known",
        ),
        (
            {"peft_type": "TRAINABLE_TOKENS", "token_indices": [1, 1]},
            {"q.trainable_tokens_delta": numbers(2, IN)},
            "names a token twice",
        ),
        (
            {"peft_type": "TRAINABLE_TOKENS", "token_indices": [1, -1]},
            {"q.trainable_tokens_delta": numbers(2, IN)},
            "names tokens from -1 to 1, and 0 to 7 are there",
        ),
        (
            {"peft_type": "TRAINABLE_TOKENS", "token_indices": "all"},
            {"q.trainable_tokens_delta": numbers(2, IN)},
            "token_indices as 'all', which is no list of whole numbers",
        ),
        (
            {"peft_type": "TRAINABLE_TOKENS"},
            {"q.trainable_tokens_delta": numbers(2, IN)},
            "names 0 tokens .token_indices., and it has 2 rows",
        ),
        ({"peft_type": "BEFT"}, {"plain.beft_bias": numbers(1, OUT)}, "a layer without a bias cannot take it"),
        (
            {"peft_type": "ROAD", "group_size": 2, "fan_in_fan_out": True},
            {"q.road_theta": numbers(3), "q.road_alpha": numbers(3)},
            r"changes the bias of q, .*6 .*q.bias .*\[8\]",
        ),
        ({"peft_type": "GLORA", "r": 2}, {"q.D": numbers(5)}, "glora_D.X has 5 numbers; needed is 1, or one for each"),
        (
            {"peft_type": "GLORA", "r": 2},
            {"q.Cd": numbers(IN, 2)},
            "it has glora_C.Xd, which are no way to hold one path",
        ),
        ({"peft_type": "GLORA", "prompt": 5}, {"q.D": numbers(1)}, "it adds virtual tokens to the input of layers"),
        (
            {"peft_type": "TINYLORA", "projection_seed": 3},
            {**TINY, "q.tinylora_P": numbers(5, 2, 2), "tinylora_v.1": numbers(5)},
            "1 layers with a weight_tying of 0 share 1 vectors.* and the file has 2",
        ),
        (
            {"peft_type": "FROD"},
            {**FROD, "frod_V.q": numbers(IN, IN + 1)},
            r"frod_V.q is \[6, 7\], and needed is \[6, 6\]",
        ),
        (
            {"peft_type": "FROD"},
            {name.replace("q.", "plain.", 1) if name.startswith("q.") else name: part for name, part in FROD.items()},
            "frod_V.plain is not in the adapter's file; save it with save_projection=True",
        ),
        ({"peft_type": "ADAMSS"}, {}, "of the kind ADAMSS, whose file does not hold all .* Merge it with PEFT"),
    ],
)
def test_what_does_not_fit_is_refused(config, parts, message, folded):
    with pytest.raises((CheckpointError, PlanError), match=message):
        folded(config, parts)


def test_a_projection_that_no_seed_gives_is_refused(folded):
    parts = {**TINY, "tinylora_v.1": numbers(5), "q.tinylora_P": numbers(5, 2, 2), "plain.tinylora_A": numbers(2, IN)}
    parts |= {"plain.tinylora_B": numbers(OUT, 2), "plain.tinylora_P": numbers(5, 2, 2, seed=1)}
    with pytest.raises(CheckpointError, match="tinylora_P is none that PyTorch draws from projection_seed 42"):
        folded({"peft_type": "TINYLORA"}, parts)


def test_bad_numbers_in_a_base_or_a_basis_are_one_clear_error(folded):
    broken = FROD | {"frod_V.q": np.full((IN, IN), np.nan, np.float32)}
    with pytest.raises(WeightsmithError, match="frod_V.q has infinite numbers or NaN"):
        folded({"peft_type": "FROD"}, broken)


def test_factors_are_read_without_a_base(tmp_path):
    adapter = write_adapter(tmp_path / "adapter", {"peft_type": "GRALORA", "r": 4, "alpha": 8}, GRALORA)
    ((layer, product),) = Adapter(ws.open(adapter)).low_rank()
    assert layer.shape == (8, 6)
    block = GRALORA["q.gralora_B"][1][:2].T.astype(np.float64) @ GRALORA["q.gralora_A"][0][:, 2:].T
    np.testing.assert_allclose(product.delta(0, 8)[4:, :3], 2 * block, rtol=1e-6)
