"""Combinations are held against PEFT: its own under ``compat: peft``, and ours as it loads them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lora_files import deltas, relative, true_sum

import weightsmith as ws
from weightsmith.errors import CheckpointError, MethodError, PlanError

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
WEIGHTS = ([1.0, 1.0], [0.5, 0.5], [1.0, -1.0])


class Tiny(torch.nn.Module):
    """An embedding, two linear layers and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb = torch.nn.Embedding(20, 12)
        self.q = torch.nn.Linear(12, 16, bias=False)
        self.v = torch.nn.Linear(16, 12)
        self.conv = torch.nn.Conv1d(12, 10, 3)

    def forward(self, ids: Any) -> Any:
        """Return ``[batch, 10, length - 2]``."""
        return self.conv(self.v(torch.relu(self.q(self.emb(ids)))).mT)


IDS = torch.arange(14).reshape(2, 7)


def adapters(tmp_path: Path, settings: list[dict[str, Any]], targets: tuple[str, ...] = ("q", "v", "emb")) -> Any:
    """Return a model with adapters a, b, … and their folders."""
    model, folders = None, []
    for name, own in zip("abcd", settings, strict=False):
        config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": list(targets), **own})
        if model is None:
            model = peft.get_peft_model(Tiny(), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        generator = torch.Generator().manual_seed(ord(name))
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if f".{name}" in key or (own.get("bias") and key.endswith("base_layer.bias")):
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(tmp_path / "inputs", selected_adapters=[name], save_embedding_layers=False)
        folders.append(tmp_path / "inputs" / name)
    return model, folders


def theirs(model: Any, folder: Path, method: str, weights: list[float], **options: Any) -> dict[str, np.ndarray]:
    """Return the deltas of PEFT's own combination."""
    names = sorted(model.peft_config)
    model.add_weighted_adapter(names, weights, "both", combination_type=method, **options)
    model.save_pretrained(folder, selected_adapters=["both"], save_embedding_layers=False)
    model.delete_adapter("both")
    return deltas(folder / "both")


def off(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> float:
    """Return the relative error of all deltas together."""
    apart = sum(np.sum((found[module] - delta) ** 2) for module, delta in wanted.items())
    return math.sqrt(apart / sum(np.sum(delta**2) for delta in wanted.values()))


@pytest.mark.parametrize("weights", WEIGHTS)
def test_pefts_linear_is_another_thing_and_ours_is_the_sum(tmp_path, weights):
    """The probes: PEFT's ``linear`` is off by 100 %, its ``cat`` is exact, its ``svd`` is cut."""
    model, folders = adapters(tmp_path, [{"r": 8}, {"r": 8}], ("q", "v"))
    wanted = true_sum(folders, weights)
    errors = {
        method: off(theirs(model, tmp_path / method, method, weights), wanted) for method in ("linear", "cat", "svd")
    }
    assert 0.7 < errors["linear"] < 1.5
    assert errors["cat"] < 1e-6
    for method, error in errors.items():
        ws.adapters.merge(folders, method, weight=weights).save(tmp_path / f"ours-{method}")
        ours = off(deltas(tmp_path / f"ours-{method}"), wanted)
        assert ours < 1e-6 if method != "svd" else ours == pytest.approx(error, rel=1e-5)
        compat = ws.adapters.merge(folders, method, weight=weights, compat="peft")
        if method == "linear":
            assert compat.report().from_sum == pytest.approx(error, rel=1e-5)


@pytest.mark.parametrize("weights", [[0.7, 0.4], [1.5, -0.5]])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("linear", {}),
        ("cat", {}),
        ("svd", {}),
        ("svd", {"svd_rank": 2}),
        ("ties", {"density": 0.5}),
        ("ties", {"density": 0.4, "majority_sign_method": "frequency"}),
        ("ties_svd", {"density": 0.5}),
        ("magnitude_prune", {"density": 0.3}),
        ("magnitude_prune_svd", {"density": 0.3}),
    ],
)
def test_compat_gives_pefts_numbers(tmp_path, method, options, weights):
    model, folders = adapters(tmp_path, [{}, {"lora_alpha": 3, "use_rslora": True}])
    wanted = theirs(model, tmp_path / "theirs", method, weights, **options)
    rank = {"rank": options["svd_rank"]} if "svd_rank" in options else {}
    own = {name: value for name, value in options.items() if name != "svd_rank"}
    merged = ws.adapters.merge(folders, method, weight=weights, compat="peft", **rank, **own)
    merged.save(tmp_path / "ours")
    assert set(deltas(tmp_path / "ours")) == set(wanted)
    assert off(deltas(tmp_path / "ours"), wanted) < 1e-5
    assert off(wanted, true_sum(folders, weights)) == pytest.approx(merged.report().from_sum, rel=1e-3, abs=1e-6)
    assert not ws.reproduce(tmp_path / "ours").problems


def test_of_different_ranks_and_layers_too(tmp_path):
    model, folders = adapters(tmp_path, [{"r": 4}, {"r": 2, "target_modules": ["q"]}], ("q", "v"))
    for method in ("cat", "svd"):
        wanted = theirs(model, tmp_path / method, method, [1.0, 2.0])
        ws.adapters.merge(folders, method, weight=[1, 2], compat="peft").save(tmp_path / f"ours-{method}")
        assert off(deltas(tmp_path / f"ours-{method}"), wanted) < 1e-5


def test_rslora_is_inflated_by_peft_and_not_by_us(tmp_path):
    model, folders = adapters(tmp_path, [{"use_rslora": True}], ("q", "v"))
    own = deltas(folders[0])
    wanted = theirs(model, tmp_path / "theirs", "linear", [1.0])
    assert relative(wanted["q"], 2 * own["q"]) < 1e-6
    ws.adapters.merge(folders, compat="peft").save(tmp_path / "compat")
    assert off(deltas(tmp_path / "compat"), wanted) < 1e-6
    ws.adapters.merge(folders).save(tmp_path / "ours")
    assert off(deltas(tmp_path / "ours"), own) < 1e-6


@pytest.mark.parametrize(
    ("method", "options"),
    [("linear", {}), ("linear", {"rank": 3}), ("cat", {}), ("ties", {"density": 0.5}), ("lego", {})],
)
def test_peft_loads_what_we_write_and_computes_the_same(tmp_path, method, options):
    """Ranks that differ by layer, other targets, an embedding and a convolution are all loaded as they are meant."""
    settings = [{"r": 4, "rank_pattern": {"v": 2}}, {"r": 3, "use_rslora": True}, {"target_modules": ["v"]}]
    _, folders = adapters(tmp_path, settings, ("q", "v", "emb", "conv"))
    merged = ws.adapters.merge(folders, method, weight=[1, 0.5, -2], **options)
    merged.save(tmp_path / "out")
    loaded = peft.PeftModel.from_pretrained(Tiny(), tmp_path / "out").eval()
    plain = Tiny()
    with torch.no_grad():
        for module, delta in deltas(tmp_path / "out").items():
            weight = plain.get_submodule(module).weight
            weight += torch.from_numpy(delta).reshape(weight.shape).float()
        np.testing.assert_allclose(loaded(IDS).numpy(), plain(IDS).numpy(), rtol=1e-4, atol=1e-3)
        assert (loaded(IDS) - Tiny()(IDS)).abs().max() > 0.1
    if method == "linear" and not options:
        ranks = {layer.module: layer.rank for layer in merged.report().layers}
        assert ranks == {"q": 7, "v": 9, "emb": 7, "conv": 7}
        assert off(deltas(tmp_path / "out"), true_sum(folders, [1, 0.5, -2])) < 1e-6


def test_peft_loads_saved_modules_and_biases(tmp_path):
    settings = {"bias": "lora_only", "modules_to_save": ["conv"]}
    folders = [adapters(tmp_path / str(rank), [{**settings, "r": rank}], ("q", "v"))[1][0] for rank in (2, 3)]
    ws.adapters.merge(folders, weight=[0.25, 0.75]).save(tmp_path / "out")
    loaded = peft.PeftModel.from_pretrained(Tiny(), tmp_path / "out").eval()
    stored = ws.open(tmp_path / "out")
    state = {key: value.numpy() for key, value in loaded.state_dict().items()}
    found = state["base_model.model.conv.modules_to_save.default.weight"]
    assert np.array_equal(found, stored["base_model.model.conv.weight"].numpy())
    key = "base_model.model.v.base_layer.bias"
    assert np.array_equal(state[key], stored[key].numpy())
    assert not np.array_equal(state[key], Tiny().v.bias.detach().numpy())


def test_what_peft_refuses_or_draws_is_refused(tmp_path):
    _, folders = adapters(tmp_path, [{"r": 4}, {"r": 2}], ("q", "v"))
    for method in ("dare_linear", "dare_ties"):
        with pytest.raises(MethodError, match="draws its masks from PyTorch's generator"):
            ws.adapters.merge(folders, method, compat="peft", density=0.5)
    with pytest.raises(PlanError, match="these have different ranks"):
        ws.adapters.merge(folders, "linear", compat="peft")
    with pytest.raises(MethodError, match="PEFT has no combination 'lego'"):
        ws.adapters.merge(folders, "lego", compat="peft")
    with pytest.raises(MethodError, match="takes no rank"):
        ws.adapters.merge(folders, "cat", compat="peft", rank=3)
    with pytest.raises(MethodError, match="needs the parameter 'density'"):
        ws.adapters.merge(folders[:1] * 2, "ties", compat="peft")
    config = json.loads((folders[0] / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"


def test_saved_modules_are_left_out_as_peft_leaves_them_and_told_of(tmp_path):
    _, folders = adapters(tmp_path / "one", [{"modules_to_save": ["conv"]}], ("q", "v"))
    _, others = adapters(tmp_path / "two", [{}], ("q", "v"))
    merged = ws.adapters.merge([*folders, *others], compat="peft")
    assert any("left out, as PEFT leaves them" in warning for warning in merged.warnings)
    assert not any("conv" in name for name in merged)
    with pytest.raises(PlanError, match="which PEFT cannot combine"):
        ws.adapters.merge(folders * 2, compat="peft")


KINDS = {
    "lora": lambda: peft.LoraConfig(r=3, target_modules=["q", "v"]),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=["q"]),
    "adalora": lambda: peft.AdaLoraConfig(init_r=4, target_r=4, total_step=10, target_modules=["q", "v"]),
    "loha": lambda: peft.LoHaConfig(r=2, target_modules=["q", "v"]),
    "lokr": lambda: peft.LoKrConfig(r=2, target_modules=["q", "v"]),
    "ia3": lambda: peft.IA3Config(target_modules=["q"], feedforward_modules=[]),
    "oft": lambda: peft.OFTConfig(r=0, oft_block_size=4, target_modules=["q"]),
}


def of_kind(folder: Path, kind: str) -> dict[str, np.ndarray]:
    """Save an adapter of a kind, and return what PEFT's merge of it changes."""
    model = peft.get_peft_model(Tiny(), KINDS[kind]())
    torch.manual_seed(len(kind))
    with torch.no_grad():
        for parameter in (one for one in model.parameters() if one.requires_grad and one.is_floating_point()):
            parameter.add_(0.5 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    merged, plain = model.merge_and_unload(), Tiny()
    return {
        name: (merged.get_submodule(name).weight - plain.get_submodule(name).weight).detach().double().numpy()
        for name in ("q", "v")
    }


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "lora"])
def test_kinds_are_mixed_through_the_base_where_they_need_it(tmp_path, write_model, kind):
    base = write_model("base", {name: value.numpy() for name, value in Tiny().state_dict().items()})
    parts = [of_kind(tmp_path / "lora", "lora"), of_kind(tmp_path / "other", kind)]
    given = [tmp_path / "lora", tmp_path / "other"]
    ws.adapters.merge(given, weight=[0.5, 1], base=base, rank=12).save(tmp_path / "out")
    for name, found in deltas(tmp_path / "out").items():
        assert relative(found, 0.5 * parts[0][name] + parts[1][name]) < 1e-4
    if kind in ("adalora", "loha"):
        ws.adapters.merge(given, weight=[0.5, 1]).save(tmp_path / "alone")
        assert off(deltas(tmp_path / "alone"), deltas(tmp_path / "out")) < 1e-5
    else:
        with pytest.raises(CheckpointError, match="name the base"):
            ws.adapters.merge(given)
    norm = np.sqrt(sum(np.sum(one**2) for one in parts[1].values()))
    assert ws.adapters.inspect(given[1], base).norm == pytest.approx(norm, rel=1e-4)


def test_fedpara_clients_are_averaged_factor_by_factor(tmp_path):
    given = []
    for seed in (1, 2):
        model = peft.get_peft_model(Tiny(), KINDS["loha"]())
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in (one for one in model.parameters() if one.requires_grad):
                parameter.copy_(torch.randn_like(parameter))
        model.save_pretrained(tmp_path / str(seed))
        given.append(tmp_path / str(seed))
    ws.adapters.merge(given, "fedavg", weight=[1, 3], average="factors").save(tmp_path / "out")
    own = [ws.open(folder) for folder in given]
    loaded = peft.PeftModel.from_pretrained(Tiny(), tmp_path / "out").state_dict()
    for name, tensor in ws.open(tmp_path / "out").items():
        wanted = 0.25 * own[0][name].numpy() + 0.75 * own[1][name].numpy()
        np.testing.assert_allclose(tensor.numpy(), wanted, rtol=1e-6, atol=1e-7)
        head, _, part = name.rpartition(".")
        assert np.array_equal(loaded[f"{head}.{part}.default"].numpy(), tensor.numpy())
