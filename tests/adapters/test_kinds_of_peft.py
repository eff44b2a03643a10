"""What PEFT itself does not show of its kinds: what is streamed, what is refused, older files, and hostile ones."""

from __future__ import annotations

import json
import math
import random
import re
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import weightsmith as ws
from conftest import write_safetensors
from weightsmith.adapters.change import LowRank
from weightsmith.adapters.fold import fold
from weightsmith.adapters.folded import FoldedTensor
from weightsmith.adapters.kinds.spectrum import shuffled
from weightsmith.adapters.layer import Weight
from weightsmith.adapters.norms import row_norms
from weightsmith.checkpoint.checkpoint import Checkpoint, Companions
from weightsmith.checkpoint.tensor import ArrayTensor
from weightsmith.errors import CheckpointError, PlanError

Arrays = dict[str, np.ndarray[Any, Any]]


def draw(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def opened(
    base: Arrays, parts: Arrays, config: dict[str, Any], base_config: dict[str, Any] | None = None
) -> Checkpoint:
    """Fold an adapter that is in memory; parts are named from the module on."""
    tensors = {f"base_model.model.{name}": value for name, value in parts.items()}
    adapter = Checkpoint(
        "adapter", {n: ArrayTensor(n, v) for n, v in tensors.items()}, Companions(config), is_adapter=True
    )
    model = Checkpoint("base", {n: ArrayTensor(n, v) for n, v in base.items()}, Companions(base_config or {}))
    return fold(model, adapter)


@pytest.mark.parametrize("transposed", [False, True])
def test_norms_from_factors_are_those_of_the_sum_even_where_it_cancels(transposed):
    base, left, right = draw(300, 500), draw(300, 4), draw(4, 500)
    # Rows that the product nearly takes away: their norms are a millionth of the base's.
    base[:40] = -left[:40] @ right + 1e-6 * draw(40, 500)
    tensor = ArrayTensor("w", np.ascontiguousarray(base.T) if transposed else base)
    found = row_norms(Weight(tensor, transposed=transposed), LowRank(left, right))
    np.testing.assert_allclose(found, np.linalg.norm(base + left @ right, axis=1), rtol=1e-8)


@pytest.mark.parametrize("block", [777, 4001, 60_000])
def test_dora_of_a_layer_stored_transposed_is_streamed(block):
    down, up, magnitude = draw(4, 200), draw(300, 4), np.abs(draw(300))
    weight = draw(300, 200)
    parts = {"q.lora_A.weight": down, "q.lora_B.weight": up, "q.lora_magnitude_vector": magnitude}
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "use_dora": True}
    tensor = opened({"q.weight": np.ascontiguousarray(weight.T)}, parts, config)["q.weight"]
    assert isinstance(tensor, FoldedTensor)
    assert not tensor.whole
    changed = weight + 1.5 * up @ down
    expected = changed * (magnitude / np.linalg.norm(changed, axis=1))[:, None]
    pieces = [tensor.read(i, min(i + block, tensor.size)) for i in range(0, tensor.size, block)]
    assert np.concatenate(pieces).tobytes() == tensor.numpy().tobytes()
    np.testing.assert_allclose(tensor.numpy().T, expected, rtol=1e-10)


def test_kinds_that_work_by_rows_fold_layers_stored_transposed_whole():
    blocks, weight = draw(5, 3), draw(8, 15)
    config = {"peft_type": "OFT", "oft_block_size": 3, "use_cayley_neumann": False}
    straight = opened({"q.weight": weight}, {"q.oft_R.weight": blocks}, config)["q.weight"]
    turned = opened({"q.weight": weight.T.copy()}, {"q.oft_R.weight": blocks}, config)["q.weight"]
    assert turned.whole
    assert not straight.whole
    np.testing.assert_allclose(turned.numpy().T, straight.numpy(), rtol=1e-12)


def test_what_several_kinds_do_to_the_base_alone_is_added(tmp_path, write_model):
    base = {"q.weight": draw(8, 12)}
    adapters = {
        "oft": ({"peft_type": "OFT", "oft_block_size": 3}, {"q.oft_R.weight": draw(4, 3)}),
        "lora": ({"peft_type": "LORA", "r": 2}, {"q.lora_A.weight": draw(2, 12), "q.lora_B.weight": draw(8, 2)}),
        "ia3": ({"peft_type": "IA3"}, {"q.ia3_l": draw(8, 1)}),
    }
    changes = []
    for name, (config, parts) in adapters.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config))
        named = {f"base_model.model.{part}": value for part, value in parts.items()}
        write_safetensors(tmp_path / name / "adapter_model.safetensors", named)
        changes.append(opened(base, parts, config)["q.weight"].numpy() - base["q.weight"])
    reference = f"{write_model('base', base)}+0.5*{tmp_path / 'oft'}+{tmp_path / 'lora'}+-2*{tmp_path / 'ia3'}"
    expected = base["q.weight"] + 0.5 * changes[0] + changes[1] - 2 * changes[2]
    np.testing.assert_allclose(ws.open(reference)["q.weight"].numpy(), expected, rtol=1e-10, atol=1e-12)


def test_places_of_frequencies_are_those_that_pytorch_draws():
    torch = pytest.importorskip("torch")
    rng = random.Random(0)
    for _ in range(300):
        size = rng.choice([1, 2, 3, 4096, rng.randint(1, 30_000)])
        count, seed = rng.randint(1, size), rng.choice([0, 777, 2**32 - 1, 2**32 + 5, -3, rng.randint(0, 2**60)])
        expected = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:count]
        assert list(shuffled(size, count, seed)) == expected.tolist()


@pytest.mark.parametrize("entries", [3, 40])
def test_few_frequencies_and_many_give_the_same_change_as_the_transform(entries):
    spectrum, places = draw(entries), np.array(shuffled(8 * 12, entries, 5))
    full = np.zeros(96)
    full[places] = spectrum
    config = {"peft_type": "FOURIERFT", "scaling": 3.0, "random_loc_seed": 5}
    found = opened({"q.weight": draw(8, 12)}, {"q.fourierft_spectrum": spectrum}, config)["q.weight"].numpy()
    expected = draw(8, 12) + 3 * np.fft.ifft2(full.reshape(8, 12)).real
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("kind", "shift"), [("FEDPARA", 0), ("PFEDPARA", 1)])
@pytest.mark.parametrize("config", [{}, {"added": True}, {"use_tanh": True}])
def test_fedpara_is_the_weight_itself(kind, shift, config):
    x, y, z, w = draw(8, 3), draw(3, 12), draw(8, 3, seed=1), draw(3, 12, seed=1)
    parts = {"q.hada_w1_a": x, "q.hada_w1_b": y, "q.hada_w2_a": z, "q.hada_w2_b": w}
    found = opened({"q.weight": draw(8, 12)}, parts, {"peft_type": kind, **config})["q.weight"].numpy()
    one, other = (np.tanh(part) if config.get("use_tanh") else part for part in (x @ y, z @ w))
    expected = one * (other + shift) + (draw(8, 12) if config.get("added") else 0)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_adapters_of_older_pefts_fold_as_they_were_trained():
    weight, block = draw(8, 12), draw(5, 8)
    found = opened({"q.weight": weight}, {"q.bone_block": block}, {"peft_type": "BONE", "r": 5})["q.weight"].numpy()
    expected = weight + np.concatenate([block, block, block[:2]]).T
    np.testing.assert_allclose(found, expected, rtol=1e-12)

    entries = 0.1 * draw(4, 3)
    for version, last in (("0.17.1", 2), ("0.18.0", 1), (None, 2)):
        config = {"peft_type": "OFT", "oft_block_size": 3, "num_cayley_neumann_terms": 5, "peft_version": version}
        found = opened({"q.weight": weight}, {"q.oft_R.weight": entries}, config)["q.weight"].numpy()
        expected = weight.copy()
        for i, (a, b, c) in enumerate(entries):
            q = np.array([[0, a, b], [-a, 0, c], [-b, -c, 0]])
            turn = np.eye(3) + 2 * q + 2 * q @ q + 2 * q @ q @ q + last * q @ q @ q @ q
            expected[:, 3 * i : 3 * i + 3] = weight[:, 3 * i : 3 * i + 3] @ turn.T
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("both", [False, True])
def test_trained_tokens_change_a_tied_head_as_well(both):
    embeddings, rows = draw(10, 4), draw(2, 4, seed=1)
    config = {"peft_type": "LORA", "trainable_token_indices": [7, 3]}
    base_config = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    name = "{}.token_adapter.trainable_tokens_delta"
    parts = {name.format("model.embed_tokens"): rows}
    parts |= {name.format("lm_head"): rows} if both else {}
    folded = opened({"model.embed_tokens.weight": embeddings}, parts, config, base_config)
    embeddings[[7, 3]] = rows
    assert set(folded) == {"model.embed_tokens.weight"}
    np.testing.assert_array_equal(folded["model.embed_tokens.weight"].numpy(), embeddings)


def test_tokens_that_were_added_are_trained_in_a_longer_table():
    longer, rows = draw(13, 4), draw(3, 4, seed=1)
    at = "model.embed_tokens.token_adapter"
    parts = {f"{at}.base_layer.weight": longer, f"{at}.trainable_tokens_delta": rows}
    config = {"peft_type": "LORA", "trainable_token_indices": {"embed_tokens": [12, 2, 10]}}
    folded = opened({"model.embed_tokens.weight": draw(10, 4)}, parts, config, {"vocab_size": 10})
    longer[[12, 2, 10]] = rows
    np.testing.assert_array_equal(folded["model.embed_tokens.weight"].numpy(), longer)
    assert folded.config["vocab_size"] == 13


def test_embeddings_that_tokens_were_added_to_are_changed_in_their_longer_form():
    """PEFT saves such a table beside the factors; a head that is tied to it gets its rows, and not the change."""
    longer, down, up = draw(13, 4), draw(2, 13), draw(4, 2)
    name = "model.embed_tokens"
    parts = {
        f"{name}.base_layer.weight": longer,
        f"{name}.lora_embedding_A": down,
        f"{name}.lora_embedding_B": up,
    }
    base_config = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True, "vocab_size": 10}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6}
    folded = opened({f"{name}.weight": draw(10, 4)}, parts, config, base_config)
    np.testing.assert_allclose(folded[f"{name}.weight"].numpy(), longer + 3 * (up @ down).T, rtol=1e-12)
    np.testing.assert_array_equal(folded["lm_head.weight"].numpy(), longer)
    assert folded.config["vocab_size"] == 13
    assert folded.config["tie_word_embeddings"] is False


LORA = {"q.lora_A.weight": draw(2, 12), "q.lora_B.weight": draw(8, 2)}
TOKENS = {"q.token_adapter.trainable_tokens_delta": draw(2, 12)}
REFUSED = [
    ("LORA", {"use_qalora": True}, LORA, "its base is quantised in groups"),
    ("LORA", {"arrow_config": {}, "alora_invocation_tokens": [1]}, LORA, "it acts on some tokens alone"),
    ("LORA", {"r": 2, "layer_replication": [[0, 2]]}, LORA, "base has 0 stacks of layers"),
    ("LORA", {"r": 2, "init_lora_weights": "pissa_niter_16"}, LORA, "random directions that no file holds"),
    ("LORA", {"r": 2, "init_lora_weights": "corda"}, LORA, "activations that the adapter does not hold"),
    ("LORA", {"r": 2, "init_lora_weights": "loftq"}, LORA, "what a quantised base lost"),
    ("LORA", {"r": 2, "init_lora_weights": 5}, LORA, "init_lora_weights as 5, which is no true, false or text"),
    ("LORA", {"r": 2, "kasa_config": {"beta": 1}}, LORA, "it has no singular values (lora_diag)"),
    (
        "LORA",
        {"trainable_token_indices": [1, 1]},
        TOKENS,
        "trainable_token_indices in adapter_config.json gives 1 tokens",
    ),
    ("LORA", {}, TOKENS, "does not say which"),
    ("ADALORA", {"init_r": 4}, LORA | {"q.lora_E": draw(2, 1)}, "rank 4 at first, and no rank_pattern"),
    (
        "LOHA",
        {"r": 3},
        {f"q.hada_w{i}_{s}": draw(*d) for i in (1, 2) for s, d in (("a", (8, 2)), ("b", (2, 12)))},
        "rank 3",
    ),
    (
        "LOKR",
        {},
        {"q.lokr_w1": draw(2, 3), "q.lokr_w2": draw(4, 5)},
        "Kronecker product is 8 by 15, and its weight 8 by 12",
    ),
    ("LOKR", {"r": 0}, {"q.lokr_w1": draw(2, 3), "q.lokr_w2": draw(4, 4)}, "rank 0, by which alpha is divided"),
    ("VERA", {}, {"q.vera_lambda_b": draw(8), "q.vera_lambda_d": draw(2)}, "save it with save_projection=True"),
    ("OFT", {"oft_block_size": 2}, {"q.oft_R.weight": draw(3, 1)}, "3 blocks of side 2, and 12 inputs"),
    ("OFT", {"oft_block_size": 2}, {"q.oft_R.weight": draw(6, 2)}, "2 is no number of entries above a diagonal"),
    ("OFT", {}, {"q.oft_R.weight": draw(6, 1)}, "PEFT before 0.14"),
    ("BOFT", {}, {"q.boft_R": draw(2, 4, 3, 3), "q.boft_s": draw(8, 1)}, "2 butterfly factors do not fit"),
    ("HRA", {"r": 2}, {"q.hra_u": draw(11, 2)}, "11 rows, and 12 inputs"),
    ("HRA", {"r": 2}, {"q.hra_u": np.zeros((12, 2))}, "column 0 of hra_u is zero"),
    ("HRA", {"r": 2, "apply_GS": True}, {"q.hra_u": np.ones((12, 2))}, "a mixture of the columns before it"),
    ("MISS", {}, {"q.miss_block": draw(4, 2, 2)}, "init_weights in its config is not bat"),
    ("MISS", {}, {"q.miss_block": draw(3, 4)}, "only with init_weights: mini"),
    ("FOURIERFT", {}, {"q.fourierft_spectrum": draw(97)}, "97 entries of a spectrum, and its weight has 96"),
    ("IA3", {"feedforward_modules": 3}, {"q.ia3_l": draw(8, 1)}, "neither a list of modules nor a pattern"),
]


@pytest.mark.parametrize(("kind", "config", "parts", "message"), REFUSED, ids=range(len(REFUSED)))
def test_what_does_not_fit_or_cannot_be_known_is_refused(kind, config, parts, message):
    with pytest.raises((CheckpointError, PlanError), match=re.escape(message)):
        opened({"q.weight": draw(8, 12)}, parts, {"peft_type": kind, **config})["q.weight"].numpy()


def test_parameters_that_shapes_do_not_tell_apart_are_refused():
    base = {"x.w1": draw(6, 4), "x.v1": draw(6, 4)}
    parts = {"x.lora_A.weight": draw(2, 4), "x.lora_B.weight": draw(6, 2)}
    parts |= {f"x.base_layer.{name.removeprefix('x.')}": value for name, value in parts.items()}
    config = {"peft_type": "LORA", "r": 2, "target_parameters": ["w1", "v1"]}
    with pytest.raises(
        PlanError, match="changes 2 parameters of x, .* x.w1, x.v1: their shapes do not tell which is which"
    ):
        opened(base, parts, config)
    with pytest.raises(PlanError, match="their shapes fit none of them"):
        opened({"x.w1": draw(6, 5), "x.v1": draw(6, 4)}, parts, config)


HOSTILE = [
    ("LORA", {"r": 10**9}, LORA),
    ("LORA", {"r": 2, "lora_alpha": 10**17}, LORA),
    ("LORA", {"r": 2000, "use_bdlora": True}, {"q.lora_A.weight": draw(2000, 1), "q.lora_B.weight": draw(8, 2000)}),
    ("OFT", {"oft_block_size": 10**12, "num_cayley_neumann_terms": 10**9}, {"q.oft_R.weight": draw(6, 1)}),
    ("MISS", {"init_weights": "mini", "mini_r": 10**12, "r": 10**12}, {"q.miss_block": draw(12, 1)}),
    ("FOURIERFT", {"n_frequency": 10**15, "random_loc_seed": 10**17}, {"q.fourierft_spectrum": draw(96)}),
    ("RANDLORA", {"r": 10**9}, {"q.randlora_lambda": draw(2, 4), "q.randlora_gamma": draw(4, 8)}),
    ("HRA", {"r": 10**9}, {"q.hra_u": draw(12, 2)}),
]


@pytest.mark.parametrize(("kind", "config", "parts"), HOSTILE, ids=range(len(HOSTILE)))
def test_no_number_in_a_config_decides_how_much_memory_is_taken(kind, config, parts):
    tracemalloc.start()
    try:
        opened({"q.weight": draw(8, 12)}, parts, {"peft_type": kind, **config})["q.weight"].numpy()
    except (CheckpointError, PlanError):
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 2_000_000


@pytest.mark.parametrize(
    ("kind", "config", "parts", "shape"),
    [
        # A change that is long one way alone would take the square of its length as two factors.
        ("MISS", {"init_weights": "mini"}, {"q.miss_block": draw(3000, 1)}, (1, 3000)),
        ("FOURIERFT", {"scaling": 1}, {"q.fourierft_spectrum": draw(3000)}, (3000, 1)),
        ("FOURIERFT", {"scaling": 1}, {"q.fourierft_spectrum": draw(3000)}, (1, 3000)),
    ],
)
def test_long_weights_do_not_take_the_square_of_their_length(kind, config, parts, shape):
    tracemalloc.start()
    found = opened({"q.weight": draw(*shape)}, parts, {"peft_type": kind, **config})["q.weight"].numpy()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.isfinite(found).all()
    assert peak < 64 * math.prod(shape) * 8


def test_square_files_of_real_folders_open(tmp_path: Path, write_model):
    """The names under which PEFT saves parts: with and without .weight, with an adapter's name, with base_layer."""
    base = {"model.q.weight": draw(8, 12), "model.k.weight": draw(8, 12)}
    names = ("model.q.lora_{}.weight", "model.k.base_layer.lora_{}.default.weight")
    down, up = draw(2, 12), draw(8, 2)
    tensors = {f"base_model.model.{name.format(side)}": v for name in names for side, v in (("A", down), ("B", up))}
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2}))
    write_safetensors(tmp_path / "adapter" / "adapter_model.safetensors", tensors)
    folded = ws.open(f"{write_model('base', base)}+{tmp_path / 'adapter'}")
    for name, weight in base.items():
        np.testing.assert_allclose(folded[name].numpy(), weight + 4 * up @ down, rtol=1e-12)
