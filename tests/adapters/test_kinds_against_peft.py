"""Folded weights give the outputs of PEFT's own adapted layers, unmerged, for every kind that PEFT has here."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft.tuners.boft.layer import BOFTLayer
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import weightsmith as ws
from conftest import write_safetensors
from weightsmith.errors import CheckpointError, PlanError

pytestmark = pytest.mark.filterwarnings("ignore")
TOKENS = torch.tensor([[1, 4, 2, 9, 0, 7]])


class Net(torch.nn.Module):
    """Layers of every type, one after the other, of unequal sides."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(11, 6)
        self.wide = torch.nn.Linear(6, 12)
        self.tall = torch.nn.Linear(12, 8, bias=False)
        self.turned = Conv1D(10, 8)
        self.line = torch.nn.Conv1d(10, 6, 3, padding=1)
        self.plane = torch.nn.Conv2d(6, 4, 3, padding=1)
        self.groups = torch.nn.Conv2d(4, 8, 3, padding=1, groups=2)
        self.point = torch.nn.Conv2d(8, 8, 1)
        self.space = torch.nn.Conv3d(8, 5, (1, 3, 2), padding=1)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.turned(torch.tanh(self.tall(torch.tanh(self.wide(self.embed(tokens)))))))
        hidden = torch.tanh(self.line(hidden.transpose(1, 2)))
        hidden = torch.tanh(self.point(self.groups(self.plane(hidden[..., None]))))
        return self.space(hidden[:, :, None])


class Experts(torch.nn.Module):
    """Weights of experts that are no module's weight."""

    def __init__(self, turned: bool, square: bool = False) -> None:
        super().__init__()
        self.is_transposed = turned
        hidden, inner = 6, 6 if square else 5
        up, down = (hidden, 2 * inner), (inner, hidden)
        sides = (up, down) if turned else (up[::-1], down[::-1])
        self.gate_up_proj = torch.nn.Parameter(torch.randn(3, *sides[0]))
        self.down_proj = torch.nn.Parameter(torch.randn(3, *sides[1]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up, down = (w if self.is_transposed else w.transpose(1, 2) for w in (self.gate_up_proj, self.down_proj))
        gate, inner = (x @ up).chunk(2, dim=-1)
        return (torch.tanh(gate) * inner) @ down


class Mixture(torch.nn.Module):
    def __init__(self, turned: bool, square: bool = False) -> None:
        super().__init__()
        self.mlp = torch.nn.Module()
        self.mlp.experts = Experts(turned, square)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp.experts(x)


class Attention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = torch.nn.MultiheadAttention(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attn(x, x, x)[0]


def adapted(tmp_path: Path, net: torch.nn.Module, config: peft.PeftConfig, spread: float = 0.3) -> Any:
    """Attach a random adapter and save it, beside its base."""
    write_base(tmp_path / "base", net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(net, config)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not re.search(r"base_layer\.(weight|bias|in_proj_\w+)$|tokens_delta", name):
                ones = "ia3_l" in name or "boft_s" in name or "magnitude" in name
                parameter.data = float(ones) + spread * torch.randn_like(parameter)
        model.save_pretrained(tmp_path / "adapter")
    return model.eval()


def write_base(folder: Path, net: torch.nn.Module, config: dict[str, Any] | None = None) -> None:
    folder.mkdir(exist_ok=True)
    write_safetensors(folder / "model.safetensors", {n: p.detach().numpy() for n, p in net.state_dict().items()})
    (folder / "config.json").write_text(json.dumps(config or {}))


def folded(tmp_path: Path) -> dict[str, torch.Tensor]:
    opened = ws.open(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}")
    return {name: torch.from_numpy(tensor.numpy().copy()) for name, tensor in opened.items()}


def same_outputs(
    model: Any,
    plain: torch.nn.Module,
    weights: dict[str, torch.Tensor],
    given: torch.Tensor,
    part: Callable[[Any], torch.Tensor] = lambda result: result,
) -> None:
    plain.load_state_dict(weights)
    with torch.no_grad():
        expected, found = part(model(given)), part(plain.eval()(given))
    scale = expected.abs().max().item()
    assert scale > 0
    np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=1e-4, atol=2e-5 * scale)


LINEAR = ["wide", "tall"]
EVERY = ["embed", "wide", "tall", "turned", "line", "plane", "point", "space"]
CONVOLUTIONS = ["wide", "tall", "line", "plane", "groups", "point"]
FLAT = ["wide", "tall", "turned"]
CASES = {
    "lora": peft.LoraConfig(r=2, lora_alpha=7, target_modules=EVERY),
    "rslora": peft.LoraConfig(r=3, lora_alpha=7, use_rslora=True, target_modules=EVERY, rank_pattern={"tall": 2}),
    "dora": peft.LoraConfig(r=2, lora_alpha=7, use_dora=True, target_modules=EVERY),
    "lora_bias": peft.LoraConfig(
        r=2, lora_alpha=5, lora_bias=True, target_modules=["wide", "turned", "line", "plane", "space"]
    ),
    "pissa": peft.LoraConfig(r=2, lora_alpha=5, init_lora_weights="pissa", target_modules=FLAT),
    "olora": peft.LoraConfig(r=2, lora_alpha=5, init_lora_weights="olora", target_modules=LINEAR),
    "orthogonal": peft.LoraConfig(r=2, lora_alpha=5, init_lora_weights="orthogonal", target_modules=LINEAR),
    "mica": peft.LoraConfig(r=2, lora_alpha=5, init_lora_weights="mica", target_modules=LINEAR),
    "kasa": peft.LoraConfig(r=2, lora_alpha=5, kasa_config=peft.tuners.lora.config.KasaConfig(), target_modules=LINEAR),
    "velora": peft.LoraConfig(
        r=2, lora_alpha=5, velora_config=peft.tuners.lora.config.VeloraConfig(num_groups=2), target_modules=LINEAR
    ),
    "monteclora": peft.LoraConfig(
        r=2, lora_alpha=5, monteclora_config=peft.tuners.lora.config.MontecloraConfig(), target_modules=LINEAR
    ),
    "bdlora": peft.LoraConfig(
        r=4,
        lora_alpha=5,
        target_modules=LINEAR,
        use_bdlora=peft.tuners.lora.config.BdLoraConfig(
            target_modules_bd_a=["wide"], target_modules_bd_b=["tall"], nblocks=2
        ),
    ),
    "tokens": peft.LoraConfig(r=2, target_modules=LINEAR, trainable_token_indices={"embed": [9, 2, 4]}),
    "adalora": peft.AdaLoraConfig(
        init_r=4, target_r=2, lora_alpha=7, total_step=10, target_modules=["wide", "tall", "turned", "plane"]
    ),
    "loha": peft.LoHaConfig(r=2, alpha=5, target_modules=CONVOLUTIONS),
    "loha_wide": peft.LoHaConfig(r=4, alpha=5, target_modules=CONVOLUTIONS),
    "loha_effective": peft.LoHaConfig(r=3, alpha=5, use_effective_conv2d=True, target_modules=CONVOLUTIONS),
    "lokr": peft.LoKrConfig(r=8, alpha=5, target_modules=CONVOLUTIONS),
    "lokr_low": peft.LoKrConfig(r=1, alpha=5, target_modules=CONVOLUTIONS),
    "lokr_both": peft.LoKrConfig(r=1, alpha=5, decompose_both=True, decompose_factor=4, target_modules=CONVOLUTIONS),
    # PEFT 0.21.2 itself fails with the first of these on a convolution of one dimension.
    "lokr_effective": peft.LoKrConfig(
        r=1, alpha=5, use_effective_conv2d=True, target_modules=["wide", "plane", "groups", "point"]
    ),
    "lokr_line": peft.LoKrConfig(r=2, alpha=5, use_effective_conv2d=True, target_modules=["line"]),
    "ia3": peft.IA3Config(
        target_modules=["wide", "tall", "turned", "plane", "groups", "point", "space"],
        feedforward_modules=["tall", "groups", "point"],
    ),
    "ia3_pattern": peft.IA3Config(
        target_modules=r".*(turned|plane|groups|point|space)", feedforward_modules=r".*(turned|plane|space)"
    ),
    "vera": peft.VeraConfig(r=3, target_modules=FLAT),
    "randlora": peft.RandLoraConfig(r=3, randlora_alpha=11, target_modules=FLAT),
    "oft": peft.OFTConfig(r=0, oft_block_size=2, target_modules=["embed", "wide", "tall", "point"]),
    "oft_cayley": peft.OFTConfig(r=3, oft_block_size=0, use_cayley_neumann=False, target_modules=["embed", *LINEAR]),
    "oft_shared": peft.OFTConfig(
        r=0, oft_block_size=3, block_share=True, num_cayley_neumann_terms=7, target_modules=["embed", *LINEAR]
    ),
    "oft_three": peft.OFTConfig(r=0, oft_block_size=3, num_cayley_neumann_terms=3, target_modules=LINEAR),
    "coft": peft.OFTConfig(r=0, oft_block_size=3, coft=True, eps=0.5, target_modules=LINEAR),
    "boft": peft.BOFTConfig(boft_block_size=2, target_modules=["wide", "tall", "plane", "point"]),
    "hra": peft.HRAConfig(r=3, target_modules=["wide", "tall", "plane", "point"]),
    "hra_gs": peft.HRAConfig(r=3, apply_GS=True, target_modules=["wide", "tall", "plane", "point"]),
    "miss": peft.MissConfig(r=5, target_modules=LINEAR),
    "bat": peft.MissConfig(r=2, init_weights="bat", target_modules=LINEAR),
    "mini": peft.MissConfig(r=4, init_weights="mini", mini_r=4, target_modules=LINEAR),
    "fourierft": peft.FourierFTConfig(
        n_frequency=20, scaling=30.0, random_loc_seed=2**40 + 3, n_frequency_pattern={"tall": 90}, target_modules=LINEAR
    ),
    "fourierft_turned": peft.FourierFTConfig(n_frequency=20, scaling=30.0, target_modules=["turned"]),
}


@pytest.mark.parametrize("case", CASES)
def test_folded_weights_give_pefts_outputs(case, tmp_path):
    torch.manual_seed(3)
    net, plain = Net(), Net()
    model = adapted(tmp_path, net, CASES[case])
    same_outputs(model, plain, folded(tmp_path), TOKENS)


@pytest.mark.parametrize("case", ["pissa", "olora", "kasa"])
def test_a_base_that_lost_a_part_when_training_began_is_what_peft_loads(case, tmp_path):
    torch.manual_seed(3)
    adapted(tmp_path, Net(), CASES[case])
    plain, again = Net(), Net()
    weights = ws.open(str(tmp_path / "base"))
    again.load_state_dict({name: torch.from_numpy(tensor.numpy().copy()) for name, tensor in weights.items()})
    loaded = peft.PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
    same_outputs(loaded, plain, folded(tmp_path), TOKENS)


def test_adalora_divides_by_its_first_rank_when_ranks_were_taken_away(tmp_path):
    torch.manual_seed(3)
    net, plain = Net(), Net()
    model = adapted(tmp_path, net, CASES["adalora"])
    kept = {"wide": [True, False, True, False], "tall": [False] * 4, "turned": [True] * 4, "plane": [False, True] * 2}
    model.peft_config["default"].rank_pattern = {f"{name}.lora_E.default": mask for name, mask in kept.items()}
    for name, mask in kept.items():
        values = getattr(net, name).lora_E["default"]
        values.data[~torch.tensor(mask)] = 0
    model.save_pretrained(tmp_path / "adapter")
    same_outputs(model, plain, folded(tmp_path), TOKENS)
    model.peft_config["default"].rank_pattern = None
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps({"peft_type": "ADALORA", "init_r": 4, "lora_alpha": 7})
    )
    with pytest.raises(CheckpointError, match="rank 4 at first, and no rank_pattern .*, and its factors have 2"):
        folded(tmp_path)


@pytest.mark.parametrize(
    "targets", [["gate_up_proj", "experts.down_proj"], ["down_proj"], ["mlp.experts.gate_up_proj"]]
)
@pytest.mark.parametrize("turned", [True, False])
def test_parameters_of_experts_are_found_by_their_shapes(turned, targets, tmp_path):
    torch.manual_seed(3)
    net, plain = Mixture(turned), Mixture(turned)
    config = peft.LoraConfig(
        r=2, lora_alpha=5, target_modules=[], target_parameters=targets, rank_pattern={"down_proj": 4}
    )
    model = adapted(tmp_path, net, config)
    same_outputs(model, plain, folded(tmp_path), torch.randn(3, 4, 6))


@pytest.mark.parametrize(("turned", "kind"), [(True, "gpt_oss"), (False, "mixtral")])
def test_square_experts_are_stored_as_their_model_stores_them(turned, kind, tmp_path):
    torch.manual_seed(3)
    net, plain = Mixture(turned, square=True), Mixture(turned, square=True)
    config = peft.LoraConfig(r=2, lora_alpha=5, target_modules=[], target_parameters=["down_proj"])
    model = adapted(tmp_path, net, config)
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": kind}))
    same_outputs(model, plain, folded(tmp_path), torch.randn(3, 4, 6))


def test_pytorchs_own_attention(tmp_path):
    """PEFT adds the change of ``out_proj`` twice, in training and after it."""
    torch.manual_seed(3)
    net, plain = Attention(), Attention()
    model = adapted(tmp_path, net, peft.LoraConfig(r=2, lora_alpha=5, target_modules=["attn"]))
    same_outputs(model, plain, folded(tmp_path), torch.randn(5, 2, 8))


def test_adapters_that_are_no_plain_weights_or_lack_their_random_numbers_are_refused(tmp_path):
    torch.manual_seed(3)
    adapted(tmp_path, Net(), peft.VeraConfig(r=3, target_modules=LINEAR, save_projection=False))
    with pytest.raises(CheckpointError, match=r"vera_A, which all layers share, .* save_projection=True"):
        folded(tmp_path)
    adapted(tmp_path, Net(), peft.LoraConfig(r=4, target_modules=["groups"]))
    with pytest.raises(PlanError, match="do not fit groups.weight"):
        folded(tmp_path)
    adapted(tmp_path, Net(), peft.OFTConfig(r=0, oft_block_size=3, target_modules=["plane"]))
    with pytest.raises(CheckpointError, match="overlapping patches"):
        folded(tmp_path)


@pytest.mark.parametrize("factors", [2, 3])
def test_butterfly_factors_are_applied_between_pefts_permutations(factors, tmp_path):
    """PEFT forms more than one factor on a GPU alone; its permutations are formed anywhere."""
    rng = np.random.default_rng(5)
    blocks, size, width = 8, 4, 32
    weight, raw, scale = (rng.standard_normal(shape) for shape in ((6, width), (factors, blocks, size, size), (6, 1)))
    rotation = np.eye(width)
    for i in range(factors):
        order = BOFTLayer.block_butterfly_perm(None, width, blocks >> i, size // 2, factors - 1)
        permutation = BOFTLayer.perm2mat(None, order).double().numpy()
        diagonal = torch.block_diag(*BOFTLayer.cayley_batch(None, torch.from_numpy(raw[i]))).numpy()
        rotation = permutation @ diagonal @ permutation.T @ rotation
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"peft_type": "BOFT"}))
    parts = {"base_model.model.q.boft_R": raw, "base_model.model.q.boft_s": scale}
    write_safetensors(tmp_path / "adapter" / "adapter_model.safetensors", parts)
    (tmp_path / "base").mkdir()
    write_safetensors(tmp_path / "base" / "model.safetensors", {"q.weight": weight})
    found = folded(tmp_path)["q.weight"].numpy()
    np.testing.assert_allclose(found, weight @ rotation.T * scale, rtol=1e-12, atol=1e-12)


def test_layers_that_peft_stacks_anew_have_weights_of_their_own(tmp_path):
    torch.manual_seed(3)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "vocab_size": 11}
    net = LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, **sizes))
    write_base(tmp_path / "base", net, net.config.to_dict())
    config = peft.LoraConfig(
        r=2, lora_alpha=5, target_modules=["q_proj", "up_proj"], layer_replication=[[0, 2], [1, 3], [0, 1]]
    )
    model = peft.get_peft_model(net, config)
    for name, parameter in model.named_parameters():
        parameter.data += torch.randn_like(parameter) if "lora_" in name else 0
    model.eval().save_pretrained(tmp_path / "adapter")
    opened = ws.open(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}")
    plain = LlamaForCausalLM(LlamaConfig(num_hidden_layers=opened.config["num_hidden_layers"], **sizes))
    same_outputs(model, plain, folded(tmp_path), TOKENS, lambda result: result.logits)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({**settings, "layer_replication": [[0, 4]]}))
    with pytest.raises(CheckpointError, match="pairs of a first layer and one after the last, of 3 layers"):
        folded(tmp_path)
