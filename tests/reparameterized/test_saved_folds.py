"""Folded models are written as every other result is: whole, with companions and a manifest, the same however run."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import training_forms as forms
import yaml
from click.testing import CliRunner
from folded_modules import write_module
from torch import nn

import weightsmith as ws
from conftest import read_safetensors, write_safetensors
from weightsmith.checkpoint.safetensors import StoredTensor
from weightsmith.cli.main import cli
from weightsmith.engine import backend

CONFIG = {"architecture": "repvgg_a0", "model_type": "timm_wrapper"}


class Small(nn.Module):
    """Some of each: blocks, weight normalisation, and layers that stay."""

    def __init__(self, channels: int = 12) -> None:
        super().__init__()
        self.stem = forms.RepVGGBlock(3, channels, 2)
        self.blocks = nn.ModuleList(forms.RepVGGBlock(channels, channels) for _ in range(3))
        self.mix = forms.RepMixer(channels)
        self.head = nn.utils.parametrizations.weight_norm(nn.Linear(channels, 5))
        self.table = nn.Embedding(40, channels)


def write(folder, module: nn.Module | None = None, dtype=torch.float32):
    folder.mkdir()
    write_module(folder / "model.safetensors", forms.randomise(module or Small(), dtype=dtype))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def run(*arguments: object) -> str:
    result = CliRunner().invoke(cli, [str(one) for one in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_fuse_without_adapters_prints_what_it_recognised_and_writes_all_that_belongs_to_it(tmp_path):
    model = write(tmp_path / "model")
    output = run("fuse", model, tmp_path / "out")
    lines = [line.split() for line in output.splitlines()]
    assert ["kind", "folded", "tensors", "become"] in lines
    # Two pairs of six tensors and a norm of five; the stem has none. A mixer: its pairs, two norms and a layer scale.
    assert ["repvgg", "4", str(4 * 12 + 3 * 5), "8"] in lines
    assert ["weight_norm", "1", "2", "1"] in lines
    assert not any(line[0] in ("conv_bn", "mobileone") for line in lines if line)
    assert "batch norms are taken to add 1e-05" in output
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == CONFIG
    found = read_safetensors(tmp_path / "out")
    assert "mix.reparam_conv.bias" in found
    np.testing.assert_array_equal(found["table.weight"], read_safetensors(model)["table.weight"])


def test_a_manifest_verifies_and_its_recipe_makes_the_same_again(tmp_path):
    model = write(tmp_path / "model")
    run("fuse", model, tmp_path / "out", "--rule", "eps:*,value=0.001", "--rule", "keep:head*", "--dtype", "bfloat16")
    assert ws.verify(tmp_path / "out").ok
    made = ws.reproduce(tmp_path / "out")
    assert made.ok
    assert not made.notes
    ws.unfold_weight_norm(tmp_path / "out", "table*", axis=1).save(tmp_path / "unfolded")
    assert ws.reproduce(tmp_path / "unfolded").ok
    ws.unfold_compander(tmp_path / "model", "table*", a=10, b=1).save(tmp_path / "companded")
    assert ws.reproduce(tmp_path / "companded").ok
    (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:-8] + b"\1\2\3\4\5\6\7\0")
    assert not ws.reproduce(tmp_path / "companded").ok


def test_rules_from_a_file_are_as_good_as_those_of_the_command_line(tmp_path):
    model = write(tmp_path / "model")
    rules = [{"kind": "eps", "names": "stem*", "value": 0.01}, {"kind": "keep", "names": "mix*"}]
    for name, text in (("r.yaml", yaml.safe_dump({"rules": rules})), ("r.json", json.dumps({"rules": rules}))):
        (tmp_path / name).write_text(text)
        run("fuse", model, tmp_path / "one", "--rules", tmp_path / name, "--quiet", "--overwrite")
        run("fuse", model, tmp_path / "two", "--rule", "eps:stem*,value=0.01", "--rule", "keep:mix*", "--overwrite")
        one, two = (read_safetensors(tmp_path / folder) for folder in ("one", "two"))
        assert one.keys() == two.keys()
        assert all(np.array_equal(one[key], two[key]) for key in one)
        assert "mix.layer_scale" in one


def test_the_same_bytes_however_it_is_run(tmp_path, monkeypatch):
    """Kernels have more rows than a tile and tensors more elements than a block; threads share them."""
    torch.manual_seed(0)
    model = write(tmp_path / "model", Small(160))
    written = []
    for threads, block in ((1, None), (3, None), (2, 4096)):
        if block is not None:
            monkeypatch.setattr(backend.NUMPY, "block", block)
        target = tmp_path / f"{threads}-{block}.safetensors"
        folded = ws.fold_model(model)
        assert folded["blocks.0.rbr_reparam.weight"].size > 3 * 65_536
        folded.save(target, threads=threads)
        written.append(read_safetensors(target))
    for name, array in written[0].items():
        assert all(np.array_equal(array, other[name]) for other in written[1:]), name


def test_nothing_but_headers_is_read_to_recognise(tmp_path, monkeypatch):
    model = write(tmp_path / "model")

    def refuse(*arguments):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(StoredTensor, "read", refuse)
    folded = ws.fold_model(model)
    assert folded.plan().parameters < ws.open(model).parameters
    assert {count.kind: count.folds for count in folded.counts()} == {"weight_norm": 1, "repvgg": 4, "repmixer": 1}


def test_a_killed_fold_goes_on(tmp_path):
    folded = ws.fold_model(write(tmp_path / "model"))

    class Stops:
        def start(self, *arguments):
            pass

        def advance(self, *arguments):
            pass

        def tensor_done(self, name):
            raise KeyboardInterrupt

        def finish(self):
            pass

    with pytest.raises((ws.WeightsmithError, KeyboardInterrupt)):
        folded.save(tmp_path / "out", progress=Stops(), threads=1)
    assert not (tmp_path / "out").exists()
    folded.save(tmp_path / "out")
    assert ws.verify(tmp_path / "out").ok


def test_a_pipelines_component_is_folded_where_it_is(tmp_path):
    pipeline = tmp_path / "pipe"
    write(pipeline)
    (pipeline / "model.safetensors").unlink()
    (pipeline / "config.json").unlink()
    (pipeline / "model_index.json").write_text("{}")
    for part in ("unet", "vae"):
        (pipeline / part).mkdir()
        block = nn.ModuleDict({"a": forms.conv_bn(4, 4, 3)}) if part == "vae" else nn.ModuleDict({"b": nn.Linear(3, 3)})
        write_module(pipeline / part / "diffusion_pytorch_model.safetensors", forms.randomise(block))
    ws.fold_model(pipeline).save(tmp_path / "out")
    found = read_safetensors(tmp_path / "out" / "vae" / "diffusion_pytorch_model.safetensors")
    assert set(found) == {"a.conv.weight", "a.conv.bias"}
    assert set(read_safetensors(tmp_path / "out" / "unet")) == {"b.weight", "b.bias"}


def test_a_folded_model_is_a_checkpoint_like_any_other(tmp_path):
    """It merges, and it folds again where there is something left: here a second pass finds nothing."""
    models = []
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        folder.mkdir()
        write_module(folder / "model.safetensors", forms.randomise(Small(), seed))
        models.append(folder)
    folded = [ws.fold_model(model) for model in models]
    for i, one in enumerate(folded):
        one.save(tmp_path / f"folded{i}")
    merged = ws.average([tmp_path / "folded0", tmp_path / "folded1"])
    name = "blocks.1.rbr_reparam.weight"
    expected = (folded[0][name].numpy() + folded[1][name].numpy()) / 2
    np.testing.assert_allclose(merged[name].numpy(), expected, rtol=1e-12)
    with pytest.raises(ws.WeightsmithError, match="nothing in .* is recognised"):
        ws.fold_model(tmp_path / "folded0")


def test_log_lines_are_json(tmp_path):
    output = run("fuse", write(tmp_path / "model"), tmp_path / "out", "--json-log")
    events = [json.loads(line) for line in output.splitlines()]
    assert {"event": "recognised", "kind": "weight_norm", "folds": 1, "tensors": 2, "results": 1} in events
    assert events[-1]["event"] == "done"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--weight", "0.5"), "--weight is of adapters"),
        (("--rule", "keep"), "write kind:names"),
        (("--rule", "repavit:*,idle=0.5"), "is of nothing that is there"),
    ],
)
def test_wrong_usage_without_adapters(tmp_path, arguments, text):
    model = write(tmp_path / "model")
    result = CliRunner().invoke(cli, ["fuse", str(model), str(tmp_path / "out"), *arguments])
    assert result.exit_code != 0
    assert text in result.output + str(result.exception)
    assert not (tmp_path / "out").exists()


def test_an_output_that_was_forgotten_is_not_an_adapter_that_is_overwritten(tmp_path):
    model = write(tmp_path / "model")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    write_safetensors(adapter / "adapter_model.safetensors", {"head.lora_A.weight": np.ones((2, 2), np.float32)})
    (adapter / "adapter_config.json").write_text("{}")
    result = CliRunner().invoke(cli, ["fuse", str(model), str(adapter), "--overwrite"])
    assert result.exit_code == 2
    assert "give BASE ADAPTER OUT" in result.output
    result = CliRunner().invoke(cli, ["fuse", str(model), str(adapter), str(tmp_path / "out"), "--rule", "keep:a"])
    assert result.exit_code == 2
    assert "without adapters" in result.output


def test_a_plan_knows_what_products_hold_and_keeps_their_sums_to_one_thread(tmp_path):
    """The executor gives linear algebra one thread in each of ours where a tensor says that it holds something."""
    write_module(tmp_path / "model.safetensors", forms.randomise(nn.ModuleDict({"m": forms.RePaMlp(8, 32, 8)})))
    folded = ws.fold_model(tmp_path / "model.safetensors", ["repavit:m,active=8"])
    assert folded["m.fc1.weight"].held >= 24 * 8 * 8
    assert folded["m.fc1.bias"].held
    write_module(tmp_path / "plain.safetensors", forms.randomise(Small()))
    assert not any(tensor.held for tensor in ws.fold_model(tmp_path / "plain.safetensors").values())
