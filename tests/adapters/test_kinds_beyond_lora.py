"""Folds of PEFT's kinds beyond LoRA's family are held against PEFT: its unmerged forward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import weightsmith as ws
from conftest import write_safetensors
from weightsmith.adapters.adapter import Adapter
from weightsmith.adapters.layer import Weight
from weightsmith.adapters.registry import NOT_IN_FILE, NOT_WEIGHTS, all_parameterizations
from weightsmith.checkpoint.tensor import ArrayTensor
from weightsmith.errors import CheckpointError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


class Tiny(torch.nn.Module):
    """One layer of every sort, none of them square; the base stores ``turned`` as [in, out]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(10, 12)
        self.up = torch.nn.Linear(12, 24)
        self.down = torch.nn.Linear(24, 12, bias=False)
        self.turned = Conv1D(24, 12)
        self.norm = torch.nn.LayerNorm(24)
        self.conv = torch.nn.Conv2d(4, 6, 3)
        self.line = torch.nn.Conv1d(4, 6, 3)

    def forward(self, tokens: Any, image: Any) -> tuple[Any, ...]:
        states = self.embed(tokens)
        wide = self.norm(self.up(states) + self.turned(states))
        return states, wide, self.down(wide), self.conv(image), self.line(image[..., 0])


# Kinds that are folded elsewhere.
OTHERS = {"ADALORA", "LOHA", "LOKR", "IA3", "VERA", "OFT", "BOFT", "HRA", "MISS", "RANDLORA", "FOURIERFT"}
LINEAR = {"target_modules": ["up", "down"]}
TURNED = {"target_modules": ["up", "turned"]}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "shira": ("Shira", {"r": 2, **LINEAR}),
    "supertuning": ("Supertuning", {"sparsity": 0.9, **LINEAR}),
    "supra": ("Supertuning", {"sparsity": 0.8, "r": 3, "lora_alpha": 5, "select_top": False, **LINEAR}),
    "waveft": ("WaveFT", {"n_frequency": 40, "n_frequency_pattern": {"down": 30}, "scaling": 3.0, **LINEAR}),
    "waveft turned": ("WaveFT", {"n_frequency": 40, "target_modules": ["turned"]}),
    "waveft in proportion": ("WaveFT", {"n_frequency": 20, "proportional_parameters": True, **LINEAR}),
    "waveft of entries": ("WaveFT", {"n_frequency": 20, "use_idwt": False, "random_loc_seed": 5, **LINEAR}),
    "c3a": ("C3A", {"block_size": 6, "block_size_pattern": {"down": 4}, **LINEAR}),
    "road 1": ("Road", {"variant": "road_1", "group_size": 4, **LINEAR}),
    "road 2": ("Road", {"variant": "road_2", "group_size": 6, **LINEAR}),
    "road 4": ("Road", {"variant": "road_4", "group_size": 12, **LINEAR}),
    "delora": ("Delora", {"r": 3, "rank_pattern": {"down": 5}, "delora_lambda": 7, **LINEAR}),
    "gralora": ("Gralora", {"r": 6, "gralora_k": 3, "alpha": 20, **TURNED}),
    "gralora hybrid": ("Gralora", {"r": 4, "gralora_k": 2, "hybrid_r": 3, "alpha": 20, **LINEAR}),
    "vblora": ("VBLoRA", {"r": 3, "num_vectors": 9, "vector_length": 4, "topk": 3, **LINEAR}),
    "vblora topk": (
        "VBLoRA",
        {"r": 3, "num_vectors": 9, "vector_length": 4, "topk": 3, "save_only_topk_weights": True, **LINEAR},
    ),
    "vblora top 1": (
        "VBLoRA",
        {"r": 3, "num_vectors": 9, "vector_length": 4, "topk": 1, "save_only_topk_weights": True, **TURNED},
    ),
    "pvera": ("Pvera", {"r": 5, "target_modules": ["up", "down", "turned"]}),
    "unilora": ("UniLora", {"r": 3, "theta_d_length": 20, "save_indices": True, **TURNED}),
    "tinylora": ("TinyLora", {"r": 3, "u": 5, "target_modules": ["embed", "up", "down", "turned"]}),
    "tinylora with few numbers": (
        "TinyLora",
        {
            "r": 2,
            "u": 3,
            "weight_tying": 0.5,
            "projection_seed": 7,
            "target_modules": ["embed", "up", "down", "turned"],
        },
    ),
    "tinylora with one vector": ("TinyLora", {"r": 20, "u": 2, "weight_tying": 1.0, **LINEAR}),
    "hira": (
        "Hira",
        {"r": 3, "rank_pattern": {"conv": 5}, "target_modules": ["up", "turned", "embed", "conv", "line"]},
    ),
    "glora": ("Glora", {"r": 3, **LINEAR}),
    "glora vectors": ("Glora", {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector", **LINEAR}),
    "glora constants": ("Glora", {"config_A_B": "constant", "config_C": "none", "config_D_E": "constant", **LINEAR}),
    "glora none": ("Glora", {"r": 2, "config_A_B": "none", "config_D_E": "none", **LINEAR}),
    "osf": ("OSF", {"effective_rank": 5, "rank_pattern": {"down": 0.25}, **LINEAR}),
    "deft": ("Deft", {"r": 3, "alpha": 5, **TURNED}),
    "deft qr": ("Deft", {"r": 16, "decomposition_method": "qr", "target_modules": ["up", "down", "turned"]}),
    "para": ("Deft", {"r": 3, "decomposition_method": "qr", "para": True, **LINEAR}),
    "frod": ("Frod", {"sparse_rate": 0.1, "progressbar": False, "target_modules": ["up", "down", "turned"]}),
    "frod without a sparse part": ("Frod", {"sparse_rate": 0.0, "progressbar": False, **LINEAR}),
    "peanut": ("Peanut", {"r": 3, "scaling": 0.5, **LINEAR}),
    "ln tuning": ("LNTuning", {"target_modules": ["norm", "down"]}),
    "trainable tokens": ("TrainableTokens", {"token_indices": [7, 1, 4], "target_modules": ["embed"]}),
    "beft": ("Beft", {"target_modules": ["up"]}),
}
for family in ("db2", "db7", "db10", "sym4", "sym9", "coif1", "coif3", "coif4"):
    CASES[f"waveft {family}"] = ("WaveFT", {"n_frequency": 100, "wavelet_family": family, **LINEAR})
for act in (
    "gelu",
    "gelu_10",
    "gelu_new",
    "hardswish",
    "laplace",
    "leaky_relu",
    "linear",
    "mish",
    "quick_gelu",
    "relu2",
    "relu6",
    "sigmoid",
    "silu",
    "sqrtsoftplus",
    "tanh",
):
    CASES[f"peanut {act}"] = ("Peanut", {"r": 3, "depth": 2, "act_fn": act, **LINEAR})


def trained(name: str, settings: dict[str, Any], folder: Path) -> tuple[Any, Any]:
    """Save an adapter of random numbers on a model of random numbers; return the base's tensors and PEFT's model."""
    torch.manual_seed(0)
    base = Tiny().eval()
    tensors = {key: value.numpy().copy() for key, value in base.state_dict().items()}
    model = peft.get_peft_model(base, getattr(peft, f"{name}Config")(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape) * 0.5)
    model.save_pretrained(folder)
    return tensors, model


def write_base(folder: Path, tensors: dict[str, Any]) -> Path:
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text("{}")
    return folder


def outputs(model: Any) -> list[np.ndarray]:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(2, 4, 5, 5, generator=generator)
    with torch.no_grad():
        return [out.numpy() for out in model(torch.arange(10)[None], image)]


def check_that_rows_are_made_by_themselves(adapter: Adapter, tensors: dict[str, Any]) -> None:
    """Tiles begin at any row; these layers are so small that all of them is one tile."""
    for module in adapter.modules:
        weight = Weight(ArrayTensor("w", tensors[f"{module}.weight"]), transposed=module == "turned")
        change, base = adapter.change(module, weight), weight.matrix()
        whole = adapter.kind.whole
        assert change.whole == (whole(adapter.layer(module, weight)) if callable(whole) else whole)
        if not change.whole:
            pieces = [change.rows(base[start : start + 5], start) for start in range(0, len(base), 5)]
            np.testing.assert_allclose(np.concatenate(pieces), change.rows(base, 0), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_the_folded_model_gives_the_outputs_of_the_adapted_one(case, tmp_path):
    tensors, adapted = trained(*CASES[case], tmp_path / "adapter")
    folded = ws.open(f"{write_base(tmp_path / 'base', tensors)}+{tmp_path / 'adapter'}")
    plain = Tiny().eval()
    plain.load_state_dict({name: torch.from_numpy(tensor.numpy().copy()) for name, tensor in folded.items()})
    expected, found = outputs(adapted), outputs(plain)
    untouched = Tiny().eval()
    untouched.load_state_dict({name: torch.from_numpy(value) for name, value in tensors.items()})
    assert any(np.abs(one - other).max() > 0.01 for one, other in zip(outputs(untouched), expected, strict=True))
    check_that_rows_are_made_by_themselves(Adapter(ws.open(tmp_path / "adapter")), tensors)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-5 * max(np.abs(other).max(), 1))


def test_a_tied_head_follows_trained_tokens(tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=40,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(model, peft.TrainableTokensConfig(token_indices=[3, 30])).eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape))
    adapted.save_pretrained(tmp_path / "adapter")
    ws.save(ws.open(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}"), tmp_path / "folded")
    folded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "folded", dtype=torch.float32).eval()
    tokens = torch.tensor([[3, 1, 30, 5]])
    with torch.no_grad():
        np.testing.assert_allclose(folded(tokens).logits, adapted(tokens).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("UniLora", {"r": 3, "theta_d_length": 20}, "holds nothing for any layer; .* save_indices=True"),
        ("Pvera", {"r": 3, "save_projection": False}, "does not hold pvera_A and pvera_B.* save_projection=True"),
        ("Pvera", {"r": 3, "sample_at_inference": True}, "it draws from a distribution for every input"),
        ("Frod", {"save_projection": False, "progressbar": False}, "does not hold frod_V.* save_projection=True"),
        ("TinyLora", {"save_projection": False}, "save_projection=True"),
        ("Supertuning", {"sparsity": 0.9, "save_precomputed_indices": False}, "save_precomputed_indices=True"),
        ("Psoft", {"r": 3}, "of the kind PSOFT, whose file does not hold all .* the signs of singular vectors"),
        ("Lily", {"r": 3}, "of the kind LILY, which no plain weights equal: a router"),
    ],
)
def test_what_the_file_does_not_hold_is_refused_with_the_way_out(name, settings, message, tmp_path):
    tensors, _ = trained(name, {**LINEAR, **settings}, tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=message):
        ws.open(f"{write_base(tmp_path / 'base', tensors)}+{tmp_path / 'adapter'}")


def test_every_kind_of_peft_is_known_and_in_the_guide():
    kinds = {kind.value for kind in peft.PeftType}
    known = set(all_parameterizations()) | set(NOT_WEIGHTS) | set(NOT_IN_FILE)
    assert kinds - known <= OTHERS
    guide = (Path(__file__).parents[2] / "docs/guide/adapters.md").read_text()
    assert not {kind for kind in kinds if f"| `{kind}` |" not in guide}
