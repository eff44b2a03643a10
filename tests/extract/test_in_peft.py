"""What is written is loaded by PEFT, and does there what it does here: extracted adapters, and ones to begin with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import weightsmith as ws
from conftest import read_safetensors

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
IDS = {"input_ids": torch.tensor([[1, 5, 9, 2, 30, 17, 4], [3, 3, 8, 21, 0, 11, 39]])}


def llama(*, tied: bool = False) -> Any:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=40,
            tie_word_embeddings=tied,
        )
    )


def gpt2() -> Any:
    config = transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=4, vocab_size=40, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def bert() -> Any:
    config = transformers.BertConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=40,
        max_position_embeddings=16,
        num_labels=3,
    )
    return transformers.BertForSequenceClassification(config)


def t5() -> Any:
    config = transformers.T5Config(d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4, vocab_size=40)
    return transformers.T5ForConditionalGeneration(config)


def resnet() -> Any:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5
    )
    return transformers.ResNetForImageClassification(config)


def vit() -> Any:
    config = transformers.ViTConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
        num_labels=5,
    )
    return transformers.ViTForImageClassification(config)


PIXELS = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)}
MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (llama, "AutoModelForCausalLM", IDS),
    "tied llama": (lambda: llama(tied=True), "AutoModelForCausalLM", IDS),
    "gpt2": (gpt2, "AutoModelForCausalLM", IDS),
    "bert": (bert, "AutoModelForSequenceClassification", IDS),
    "t5": (t5, "AutoModelForSeq2SeqLM", {**IDS, "decoder_input_ids": IDS["input_ids"]}),
    "vit": (vit, "AutoModelForImageClassification", PIXELS),
    "resnet": (resnet, "AutoModelForImageClassification", PIXELS),
}


def output(model: Any, inputs: dict[str, Any]) -> Any:
    with torch.no_grad():
        return model.eval()(**inputs)[0].double()


def lost(found: Any, wanted: Any, base: Any) -> float:
    return float((found - wanted).norm() / (base - wanted).norm())


class Pair:
    """A base and a fine-tune of it whose every parameter changed, in folders."""

    def __init__(self, name: str, folder: Path) -> None:
        make, auto, self.inputs = MODELS[name]
        self.auto = getattr(transformers, auto)
        torch.manual_seed(0)
        model = make()
        self.base, self.tuned, self.out = folder / "base", folder / "tuned", folder / "out"
        model.save_pretrained(self.base)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape))
        model.save_pretrained(self.tuned)

    def load(self, path: Path) -> Any:
        return self.auto.from_pretrained(path)

    def extracted(self, **settings: Any) -> Any:
        adapter = ws.extract(self.tuned, self.base, threads=1, **settings)
        adapter.save(self.out, threads=1)
        return adapter.report()

    def in_peft(self) -> Any:
        return peft.PeftModel.from_pretrained(self.load(self.base), self.out)


@pytest.fixture(scope="module", params=[name for name in MODELS if name != "vit"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(request.param, tmp_path_factory.mktemp("pair"))


@pytest.fixture
def one(request: pytest.FixtureRequest, tmp_path: Path) -> Pair:
    return Pair(request.param, tmp_path)


def folded(pair: Pair, folder: Path) -> Any:
    """Load the fine-tune that our own folding makes of what was extracted."""
    ws.save(ws.open(f"{pair.base}+{pair.out}"), folder, threads=1)
    return pair.load(folder)


def test_a_lora_of_full_rank_does_what_the_fine_tune_does(pair, tmp_path):
    pair.out = tmp_path / "out"
    report = pair.extracted(energy=1.0)
    assert report.error < 1e-6
    found, wanted, base = (
        output(model, pair.inputs) for model in (pair.in_peft(), pair.load(pair.tuned), pair.load(pair.base))
    )
    assert lost(found, wanted, base) < 1e-5
    assert lost(output(folded(pair, tmp_path / "folded"), pair.inputs), wanted, base) < 1e-5


def test_what_is_lost_in_peft_is_what_was_told(pair, tmp_path):
    pair.out = tmp_path / "out"
    told = {one.name: one for one in pair.extracted(rank=3).matrices}
    base, tuned = read_safetensors(pair.base), read_safetensors(pair.tuned)
    seen = 0
    for name, module in pair.in_peft().base_model.model.named_modules():
        if not hasattr(module, "get_delta_weight") or f"{name}.weight" not in tuned:
            continue
        change = tuned[f"{name}.weight"].astype(np.float64) - base[f"{name}.weight"]
        rest = change - module.get_delta_weight("default").detach().double().numpy().reshape(change.shape)
        error = np.linalg.norm(rest) / np.linalg.norm(change)
        entry = told[f"{name}.weight"]
        assert module.r["default"] == entry.rank == min(3, change.shape[0], change[0].size)
        assert entry.error == pytest.approx(error, rel=1e-4, abs=1e-6)
        assert entry.energy == pytest.approx(1 - error**2, rel=1e-4, abs=1e-6)
        seen += 1
    assert seen == len(told)


@pytest.mark.parametrize("one", ["llama", "tied llama", "gpt2", "resnet"], indirect=True)
def test_dora_and_ranks_of_their_own_fold_to_what_peft_computes(one, tmp_path):
    plain = one.extracted(budget=9_000 if "llama" in str(one.load(one.base).config.model_type) else 40_000)
    assert len({matrix.rank for matrix in plain.matrices}) > 1
    wanted, base = output(one.load(one.tuned), one.inputs), output(one.load(one.base), one.inputs)
    found = output(one.in_peft(), one.inputs)
    assert lost(output(folded(one, tmp_path / "folded"), one.inputs), found, base) < 1e-5
    one.out = tmp_path / "dora"
    one.extracted(rank=2, dora=True)
    found = output(one.in_peft(), one.inputs)
    assert lost(output(folded(one, tmp_path / "folded dora"), one.inputs), found, base) < 1e-5
    assert lost(found, wanted, base) < 1.2


@pytest.mark.parametrize("one", ["llama", "tied llama"], indirect=True)
def test_the_largest_entries_are_a_shira_in_peft(one, tmp_path):
    report = one.extracted(kind="sparse", rank=4)
    base, tuned = read_safetensors(one.base), read_safetensors(one.tuned)
    model = one.in_peft()
    layers = {
        name: module for name, module in model.base_model.model.named_modules() if hasattr(module, "shira_weight")
    }
    assert set(layers) == {matrix.name.removesuffix(".weight") for matrix in report.matrices}
    for matrix in report.matrices:
        change = tuned[matrix.name] - base[matrix.name]
        kept = layers[matrix.name.removesuffix(".weight")].get_delta_weight("default").to_dense().detach().numpy()
        assert np.count_nonzero(kept) == 4 * sum(change.shape)
        assert np.abs(change[kept == 0]).max() <= np.abs(change[kept != 0]).min()
        np.testing.assert_array_equal(kept[kept != 0], change[kept != 0])
        assert matrix.error == pytest.approx(np.linalg.norm(change - kept) / np.linalg.norm(change), rel=1e-5)
    wanted, before = output(one.load(one.tuned), one.inputs), output(one.load(one.base), one.inputs)
    found = output(model, one.inputs)
    assert lost(found, wanted, before) < 0.9
    assert lost(output(folded(one, tmp_path / "folded"), one.inputs), found, before) < 1e-5


@pytest.mark.parametrize("one", ["llama"], indirect=True)
def test_a_longer_vocabulary_is_kept_whole_and_loads_once_the_base_has_room_for_it(one):
    longer = one.load(one.tuned)
    torch.manual_seed(2)
    longer.resize_token_embeddings(45)
    longer.save_pretrained(one.tuned)
    adapter = ws.extract(one.tuned, one.base, energy=1.0, threads=1)
    assert sum("resize_token_embeddings" in warning for warning in adapter.warnings) == 2
    adapter.save(one.out, threads=1)
    base = one.load(one.base)
    base.resize_token_embeddings(45)
    found = output(peft.PeftModel.from_pretrained(base, one.out), one.inputs)
    torch.testing.assert_close(found, output(one.load(one.tuned), one.inputs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("one", ["bert"], indirect=True)
def test_a_head_that_peft_keeps_whole_is_there_even_where_it_did_not_change(one):
    tuned = one.load(one.base)
    with torch.no_grad():
        tuned.bert.encoder.layer[0].attention.self.query.weight.add_(0.05)
    tuned.save_pretrained(one.tuned)
    report = one.extracted(rank=1, only_matrices=True)
    assert [matrix.name for matrix in report.matrices] == ["bert.encoder.layer.0.attention.self.query.weight"]
    found = output(one.in_peft(), one.inputs)
    torch.testing.assert_close(found, output(one.load(one.tuned), one.inputs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("one", ["vit"], indirect=True)
def test_modules_get_the_names_that_a_model_is_loaded_under(one):
    if "vit.layers.0.mlp.fc1.weight" not in one.load(one.base).state_dict():
        pytest.skip("this version of transformers loads the model under the names of its file")
    rename = [
        r"vit\.encoder\.layer\.=vit.layers.",
        r"attention\.attention\.(query|key|value)=attention.\1",
        r"attention\.(q|k|v)(uery|ey|alue)=attention.\1_proj",
        r"attention\.output\.dense=attention.o_proj",
        r"intermediate\.dense=mlp.fc1",
        r"output\.dense=mlp.fc2",
    ]
    one.extracted(energy=1.0, rename=rename)
    wanted, base = output(one.load(one.tuned), one.inputs), output(one.load(one.base), one.inputs)
    assert lost(output(one.in_peft(), one.inputs), wanted, base) < 1e-5


# Adapters to begin with.


def gathered(model: Any, path: Path, inputs: dict[str, Any]) -> Path:
    """Save what goes into every linear layer."""
    import safetensors.torch

    found: dict[str, Any] = {}
    hooks = [
        module.register_forward_hook(
            lambda module, given, result, name=name: found.__setitem__(name, given[0].detach().flatten(0, -2).clone())
        )
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"
    ]
    output(model, inputs)
    for hook in hooks:
        hook.remove()
    safetensors.torch.save_file(found, path)
    return path


@pytest.mark.parametrize("one", ["llama", "gpt2"], indirect=True)
@pytest.mark.parametrize("alpha", [None, 8])
def test_pissa_and_olora_begin_as_they_do_in_peft(one, alpha, tmp_path):
    for method in ("pissa", "olora"):
        if method == "olora" and isinstance(one.load(one.base), transformers.GPT2LMHeadModel):
            # PEFT takes Conv1D's weight as it is stored, and ends with factors that fit no layer.
            continue
        adapter = ws.initialize_adapter(one.base, method=method, rank=4, alpha=alpha, threads=1)
        adapter.save(tmp_path / method, threads=1)
        adapter.residual().save(tmp_path / f"{method} base", threads=1)
        settings = json.loads((tmp_path / method / "adapter_config.json").read_text())
        config = peft.LoraConfig(
            r=4,
            lora_alpha=alpha or 4,
            init_lora_weights=method,
            target_modules=settings["target_modules"],
            fan_in_fan_out=settings["fan_in_fan_out"],
        )
        theirs = peft.get_peft_model(one.load(one.base), config).state_dict()
        ours = peft.PeftModel.from_pretrained(one.load(tmp_path / f"{method} base"), tmp_path / method).state_dict()
        assert set(ours) == set(theirs)
        for name, tensor in theirs.items():
            # Singular vectors have no sign of their own.
            side = (lambda one: one.abs()) if method == "pissa" and ".lora_" in name else (lambda one: one)
            torch.testing.assert_close(side(ours[name]), side(tensor), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("one", ["llama", "gpt2"], indirect=True)
def test_at_the_start_the_function_is_that_of_the_base(one, tmp_path):
    model = one.load(one.base)
    inputs = gathered(model, tmp_path / "inputs.safetensors", one.inputs)
    wanted = output(model, one.inputs)
    ways: list[dict[str, Any]] = [
        {"method": "kaiming"},
        {"method": "pissa"},
        {"method": "pissa", "decomposition": "randomized"},
        {"method": "milora"},
        {"method": "olora", "alpha": 8},
        {"method": "eva"},
        {"method": "eva", "activations": inputs, "rho": 2},
        {"method": "corda", "smallest": True},
        {"method": "corda", "activations": inputs},
        {"method": "corda", "activations": inputs, "smallest": True, "alpha": 1},
    ]
    for number, way in enumerate(ways):
        adapter = ws.initialize_adapter(one.base, rank=4, threads=1, **way)
        adapter.save(tmp_path / f"adapter {number}", threads=1)
        base = one.base
        if way["method"] not in ("kaiming", "eva"):
            base = tmp_path / f"base {number}"
            adapter.residual().save(base, threads=1)
            assert lost(output(one.load(base), one.inputs), wanted, 0) > 1e-3
        found = peft.PeftModel.from_pretrained(one.load(base), tmp_path / f"adapter {number}")
        ranks = {module.r["default"] for module in found.modules() if hasattr(module, "lora_A")}
        assert ranks == {4} or way.get("rho") == 2
        torch.testing.assert_close(output(found, one.inputs), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("one", ["llama"], indirect=True)
def test_corda_begins_as_it_does_in_peft(one, tmp_path):
    # One sample, which PEFT's own gathering takes as it is.
    inputs = {"input_ids": one.inputs["input_ids"][:1]}
    module = "model.layers.1.mlp.down_proj"
    config = peft.LoraConfig(
        r=3,
        lora_alpha=3,
        init_lora_weights="corda",
        corda_config=peft.tuners.lora.config.CordaConfig(corda_method="ipm"),
        target_modules=[module],
    )
    from peft.tuners.lora.corda import preprocess_corda

    theirs = one.load(one.base)
    preprocess_corda(theirs, config, run_model=lambda: output(theirs, inputs))
    layer = peft.get_peft_model(theirs, config).base_model.model.get_submodule(module)
    found = gathered(one.load(one.base), tmp_path / "inputs.safetensors", inputs)
    adapter = ws.initialize_adapter(one.base, method="corda", rank=3, targets=[module], activations=found, threads=1)
    down, up = (adapter[f"base_model.model.{module}.lora_{side}.weight"].numpy().astype(np.float64) for side in "AB")
    wanted = layer.get_delta_weight("default").detach().double().numpy()
    np.testing.assert_allclose(up @ down, wanted, rtol=1e-3, atol=1e-5)
