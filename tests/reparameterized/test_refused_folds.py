"""What cannot be folded exactly, or is not said, is one clear error that names the place and what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import training_forms as forms
from folded_modules import write_module
from torch import nn

import weightsmith as ws
from conftest import read_safetensors, write_safetensors
from weightsmith.errors import CheckpointError, PlanError, RecipeError

Arrays = dict[str, np.ndarray[Any, Any]]


def arrays_of(module: nn.Module, folder) -> Arrays:
    return dict(read_safetensors(write_module(folder / "module.safetensors", forms.randomise(module))))


def fold(folder, arrays: Arrays, *rules: Any) -> ws.Checkpoint:
    write_safetensors(folder / "model.safetensors", arrays)
    folded = ws.fold_model(folder / "model.safetensors", rules)
    for tensor in folded.values():
        tensor.numpy()
    return folded


class Holder(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block


def drop(*endings: str) -> Callable[[Arrays], Arrays]:
    return lambda arrays: {name: array for name, array in arrays.items() if not name.endswith(endings)}


def put(name: str, array: Any) -> Callable[[Arrays], Arrays]:
    return lambda arrays: {**arrays, name: np.asarray(array)}


REPVGG, MOBILE, MIXER = forms.RepVGGBlock, forms.MobileOneBlock, forms.RepMixer
BROKEN: dict[str, tuple[Callable[[], nn.Module], Callable[[Arrays], Arrays], str]] = {
    "no statistics": (
        lambda: REPVGG(4, 4),
        drop("running_mean", "running_var"),
        r"block\.rbr_1x1\.bn: has no running_mean and no running_var.*training mode",
    ),
    "no statistics of the skip": (
        lambda: REPVGG(4, 4),
        drop("identity.running_mean", "identity.running_var"),
        r"rbr_identity: has no running_mean",
    ),
    "one statistic": (lambda: REPVGG(4, 4), drop("dense.bn.running_var"), r"rbr_dense\.bn: has no running_var\."),
    "negative variance": (
        lambda: REPVGG(4, 4),
        put("block.rbr_dense.bn.running_var", [1.0, -2, 1, 1]),
        r"rbr_dense\.bn\.running_var holds values that are negative",
    ),
    "no branch": (lambda: REPVGG(4, 4), drop("1x1.conv.weight"), r"rbr_dense and no block\.rbr_1x1"),
    "no norm of a branch": (
        lambda: MOBILE(4, 4, 3),
        lambda a: {name: array for name, array in a.items() if ".rbr_conv.1.bn." not in name},
        r"rbr_conv\.1: has no batch norm",
    ),
    "gap": (
        lambda: MOBILE(4, 4, 3, convs=3),
        lambda a: {name: array for name, array in a.items() if not name.startswith("block.rbr_conv.1.conv")},
        r"no block\.rbr_conv\.1: a branch is missing",
    ),
    "another branch": (
        lambda: REPVGG(4, 4),
        put("block.rbr_avg.conv.weight", np.ones((4, 4, 1, 1))),
        "rbr_avg: is no branch",
    ),
    "norm of other length": (
        lambda: REPVGG(4, 4),
        lambda a: {**a, **{n: x[:3] for n, x in a.items() if "identity" in n and x.ndim}},
        "beside the branches has 3 channels, and they have 4",
    ),
    "parts of other lengths": (
        lambda: REPVGG(4, 4),
        put("block.rbr_dense.bn.weight", np.ones(3)),
        r"rbr_dense\.bn: weight is float64 \[3\], and running_mean is \[4\]",
    ),
    "statistics that are codes": (
        lambda: REPVGG(4, 4),
        put("block.rbr_dense.bn.running_mean", np.ones(4, np.int32)),
        r"running_mean is int32",
    ),
    "kernel of codes": (
        lambda: REPVGG(4, 4),
        put("block.rbr_dense.conv.weight", np.ones((4, 4, 3, 3), np.int8)),
        r"rbr_dense\.conv\.weight: is int8: codes",
    ),
    "bias of other length": (
        lambda: REPVGG(4, 4),
        put("block.rbr_dense.conv.bias", np.ones(5)),
        r"rbr_dense\.conv: bias is \[5\], and weight \[4, 4, 3, 3\]",
    ),
    "even kernel": (
        lambda: REPVGG(4, 4),
        put("block.rbr_dense.conv.weight", np.ones((4, 4, 4, 4))),
        "1x1 has no place in the centre of one of 4x4",
    ),
    "folded in part": (lambda: REPVGG(4, 4), put("block.rbr_reparam.weight", np.ones((4, 4, 3, 3))), "folded in part"),
    "scale of other length": (
        lambda: MIXER(4),
        put("block.layer_scale", np.ones((3, 1, 1))),
        r"layer_scale: is \[3, 1, 1\]",
    ),
    "neither chain nor branches": (
        lambda: forms.RepDWConvS(4),
        drop("conv_3_w.bias"),
        "conv_3_w and conv_3_h stand side by side where they have biases",
    ),
    "unknown idle channels": (
        lambda: forms.RePaMlp(4, 16, 4),
        lambda a: a,
        r"nothing in the file shows .* 16 hidden .*idle=0\.75",
    ),
    "vector of another matrix": (
        lambda: forms.SigmaLinear(4, 5),
        put("block.spectral_normed_weight.u", np.ones(3)),
        r"u is \[3\] and weight \[5, 4\]",
    ),
    "two gammas": (lambda: forms.SigmaLinear(4, 5), put("block.sigma", np.ones(2)), r"sigma: is \[2\]; one number"),
    "empty": (lambda: REPVGG(4, 4), put("block.rbr_dense.conv.weight", np.ones((4, 0, 3, 3))), "holds nothing"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_models(tmp_path, case):
    make, change, text = BROKEN[case]
    with pytest.raises((PlanError, CheckpointError), match=text) as raised:
        fold(tmp_path, change(arrays_of(Holder(make()), tmp_path)))
    assert "\n" not in str(raised.value)


RULES: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "biased chain": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, (1, 11), groups=4), nn.Conv2d(4, 4, (11, 1), groups=4)),
        "serial:block,first=0,second=1",
        r"block: the first layer has a bias, and the second, of 11x1, sees zeros beyond the border.*padding=false",
    ),
    "kernels in a row": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 3, bias=False), nn.Conv2d(4, 4, 3)),
        "serial:block,first=0,second=1",
        "must be depthwise, or a linear or 1x1 layer",
    ),
    "one of two": (lambda: nn.Sequential(nn.Linear(4, 4)), "serial:block,first=0,second=1", r"holds no layer block\.1"),
    "layer norm": (
        lambda: nn.ModuleDict({"norm": nn.LayerNorm(4), "fc1": nn.Linear(4, 8), "fc2": nn.Linear(8, 4)}),
        "repavit:*,idle=0.75",
        "no batch norms norm1 and norm2: behind a layer norm",
    ),
    "layer norm for batch norm": (
        lambda: nn.ModuleDict({"a": nn.Conv2d(4, 4, 1), "b": nn.GroupNorm(1, 4)}),
        "conv_bn:block,conv=a,norm=b",
        "a layer or group norm from each input",
    ),
    "norm before a kernel": (
        lambda: nn.ModuleDict({"a": nn.Conv2d(4, 4, 3), "b": nn.BatchNorm2d(4)}),
        "bn_linear:block,linear=a,norm=b",
        "zeros that it sees beyond the border are not normalised",
    ),
    "half a pair": (
        lambda: nn.ModuleDict({"a": nn.Conv2d(4, 4, 3)}),
        "conv_bn:block,conv=a,norm=b",
        r"block: holds block\.a and no block\.b; narrow the rule",
    ),
    "no layer": (
        lambda: nn.ModuleDict({"a": nn.BatchNorm2d(4), "b": nn.BatchNorm2d(4)}),
        "conv_bn:block,conv=a,norm=b",
        "a: is no linear or convolution layer",
    ),
    "too many active": (lambda: forms.RePaMlp(4, 16, 4), "repavit:*,active=17", "active is 17, and there are 16"),
    "part of a channel": (
        lambda: forms.RePaMlp(4, 16, 4),
        "repavit:*,idle=0.7",
        "0.7 of 16 channels is no whole number",
    ),
    "both": (lambda: forms.RePaMlp(4, 16, 4), "repavit:*,idle=0.75,active=4", "nothing in the file shows"),
    "groups, and no channels": (
        lambda: nn.ModuleDict({"a": nn.Conv2d(8, 24, 3, groups=4), "b": nn.Conv2d(8, 24, 3, groups=2)}),
        "branches:block,conv=a+b",
        "see 2 and 4 input channels at a time .* channels=",
    ),
    "missing branch": (
        lambda: nn.ModuleDict({"a": nn.Conv2d(4, 4, 1)}),
        "branches:block,conv=a+b",
        r"holds block\.a and no block\.b",
    ),
    "missing skip": (
        lambda: nn.ModuleDict({"a": nn.Conv2d(4, 4, 1)}),
        "branches:block,conv=a,skip=b",
        r"block\.b: is no batch norm",
    ),
    "missing scale": (
        lambda: nn.ModuleDict({"a": nn.Conv2d(4, 4, 1)}),
        "branches:block,conv=a,scale=s",
        r"block\.s: is not there",
    ),
    "scale of other length": (
        lambda: nn.ModuleDict({"a": nn.Conv2d(4, 4, 1), "s": nn.BatchNorm2d(3)}),
        "branches:block,conv=a,scale=s.weight",
        r"block\.s\.weight: is \[3\]; one value for each of 4 outputs",
    ),
    "of nothing": (lambda: REPVGG(4, 4), "keep:blok*", "is of nothing that is there"),
    "of no module": (lambda: REPVGG(4, 4), "conv_bn:*,conv=x,norm=y", "is of nothing that is there"),
    "conditioned bias": (lambda: nn.Linear(4, 4), "conditioned:*.bias", r"bias: is \[4\]; weight conditioning"),
    "compander's tensor": (lambda: nn.Linear(4, 4), "compander:*.weight,a=alpha,b=1", r"block\.alpha: is not there"),
    "kernel that does not fit": (
        lambda: forms.SigmaLinear(4, 5),
        "sigma_reparam:*,kernel=3",
        "4 is no multiple of a kernel of 3",
    ),
}


@pytest.mark.parametrize("case", RULES)
def test_rules_that_do_not_fit_the_model(tmp_path, case):
    make, rule, text = RULES[case]
    with pytest.raises(PlanError, match=text):
        fold(tmp_path, arrays_of(Holder(make()), tmp_path), rule)


MISWRITTEN = {
    "no colon": ("keep", "write kind:names"),
    "unknown kind": ("conv_nb:*,conv=a,norm=b", "no kind 'conv_nb' .did you mean 'conv_bn'"),
    "no names": ("keep:", "names is ''"),
    "unknown setting": ("eps:*,valu=1", "eps has no setting 'valu' .did you mean 'value'"),
    "setting of none": ("keep:*,value=1", "keep has no setting 'value'; it takes none"),
    "no value": ("eps:*,value", "'value' is not setting=value"),
    "twice": ("eps:*,value=1,value=2", "is given twice"),
    "not YAML": ("eps:*,value=[", "the value of value is not YAML"),
    "negative": ("eps:*,value=-1", "value is -1; it must be a number above 0"),
    "missing": ("eps:*", "eps needs value"),
    "no number": ("eps:*,value=small", "value is 'small'"),
    "beyond": ("repavit:*,idle=1.5", "a share from 0 to 1"),
    "no count": ("repavit:*,active=1.5", "a whole number from 0"),
    "no yes": ("branches:*,conv=a,residual=2", "true or false"),
    "no size": ("sigma_reparam:*,kernel=big", "a kernel's size"),
    "no function": ("stable_ssm:*,function=tan", "one of exp, softplus"),
    "zero": ("compander:*,a=0,b=1", "a number that is not 0"),
    "no names of branches": ("branches:*,conv=a++b", "names with '\\+' between them"),
    "a list": (["keep:*"], "write kind:names,setting=value, or a mapping"),
    "no kind": ({"names": "*"}, "there is no kind None"),
    "names of numbers": ({"kind": "keep", "names": 3}, "names is 3"),
}


@pytest.mark.parametrize("case", MISWRITTEN)
def test_rules_that_are_no_rules(tmp_path, case):
    rule, text = MISWRITTEN[case]
    with pytest.raises(RecipeError, match=text):
        fold(tmp_path, {"a.weight": np.ones((2, 2))}, rule)


FILES = {
    "a list": ("- 1", "mapping of keys"),
    "other keys": ("rulez: []", "must hold one key, rules"),
    "no list": ("rules: 3", "must hold one key, rules"),
    "broken": ("rules: [", "not YAML"),
    "a bad rule": ("rules: [{kind: keep}]", r"rules\[0\]: names is None"),
    "bytes": (b"\xff\xfe", "not text in UTF-8"),
    "large": (b"#" * 1_000_001, "more than 1,000,000 bytes"),
}


@pytest.mark.parametrize("case", FILES)
def test_files_of_rules_that_are_none(tmp_path, case):
    content, text = FILES[case]
    (tmp_path / "rules.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    write_safetensors(tmp_path / "model.safetensors", {"a.weight": np.ones((2, 2))})
    with pytest.raises(RecipeError, match=text):
        ws.fold_model(tmp_path / "model.safetensors", rules_file=tmp_path / "rules.yaml")


def test_a_missing_file_of_rules(tmp_path):
    write_safetensors(tmp_path / "model.safetensors", {"a.weight": np.ones((2, 2))})
    with pytest.raises(RecipeError, match="none.yaml cannot be read"):
        ws.fold_model(tmp_path / "model.safetensors", rules_file=tmp_path / "none.yaml")


def test_nothing_recognised_says_what_is_looked_for(tmp_path):
    arrays = {
        "conv1.weight": np.ones((4, 3, 3, 3)),
        **{f"bn1.{s}": np.ones(4) for s in ("running_mean", "running_var")},
    }
    with pytest.raises(PlanError, match=r"1 batch norms, such as bn1, no name shows.*RepVGG: rbr_dense.*--rule KIND"):
        fold(tmp_path, arrays)


def test_adapters_and_quantised_models_are_refused(tmp_path, write_model):
    folder = write_model("q", {"a.weight": np.ones((2, 2))}, {"quantization_config": {"bits": 4}})
    with pytest.raises(PlanError, match="is quantised"):
        ws.fold_model(folder)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    write_safetensors(adapter / "adapter_model.safetensors", {"a.lora_A.weight": np.ones((2, 2))})
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(PlanError, match="is an adapter"):
        ws.fold_model(adapter)


def test_what_is_kept_is_not_folded_and_not_looked_at(tmp_path):
    arrays = arrays_of(nn.ModuleDict({"a": REPVGG(4, 4), "b": REPVGG(4, 4)}), tmp_path)
    broken = {n: array for n, array in arrays.items() if not n.startswith("b.rbr_dense.bn.running")}
    with pytest.raises(PlanError):
        fold(tmp_path, broken)
    folded = fold(tmp_path, broken, "keep:b.*")
    assert {name for name in folded if name.startswith("b.")} == {name for name in broken if name.startswith("b.")}
    assert {name for name in folded if name.startswith("a.")} == {"a.rbr_reparam.weight", "a.rbr_reparam.bias"}


def test_a_norm_that_may_come_first_is_not_taken(tmp_path):
    """One pair whose batch norm has as many channels as its convolution has inputs speaks for all of its names."""

    def block(i, o):
        return nn.ModuleDict({"bn": nn.BatchNorm2d(i), "conv": nn.Conv2d(i, o, 1)})

    arrays = arrays_of(nn.ModuleDict({"a": block(4, 4), "b": block(4, 8), "c": REPVGG(4, 4)}), tmp_path)
    with pytest.raises(PlanError, match="nothing in .* is recognised"):
        fold(tmp_path, arrays)
    alone = fold(tmp_path, {name: array for name, array in arrays.items() if not name.startswith("b.")})
    assert "a.conv.bias" in alone


def test_a_pair_with_more_in_its_module_is_not_taken(tmp_path):
    """Another convolution beside the two may be added before the norm, as in YOLO's RepConv."""
    arrays = arrays_of(nn.ModuleDict({"a": forms.conv_bn(4, 4, 3), "b": forms.conv_bn(4, 4, 3)}), tmp_path)
    arrays["b.cv2.weight"] = np.ones((4, 4, 1, 1))
    folded = fold(tmp_path, arrays)
    assert "a.conv.bias" in folded
    assert "b.conv.bias" not in folded
    assert any("1 batch norm stays, such as b.bn" in warning for warning in folded.warnings)


def test_a_positional_encoding_elsewhere_is_left_alone(tmp_path):
    """``pe`` is FastViT's name for a convolution that its input is added to; in other models it is another thing."""
    arrays = arrays_of(nn.ModuleDict({"a": REPVGG(4, 4), "b": forms.RepCPE(4)}), tmp_path)
    assert "b.pe.weight" in fold(tmp_path, arrays)


def test_two_heads_without_norms_are_left_alone(tmp_path):
    """DeiT's stand on two different tokens."""
    heads = nn.ModuleDict({"head": nn.Linear(4, 3), "head_dist": nn.Linear(4, 3)})
    arrays = arrays_of(nn.ModuleDict({"a": REPVGG(4, 4), "b": heads}), tmp_path)
    assert {"b.head.weight", "b.head_dist.weight"} < set(fold(tmp_path, arrays))


def test_layers_that_no_rule_is_of_are_not_looked_at(tmp_path):
    """Codes, and biases of another length, are an error where they would be folded, and no matter elsewhere."""
    arrays = arrays_of(nn.ModuleDict({"a": REPVGG(4, 4)}), tmp_path)
    for name in ("fc1", "fc2", "head", "head_dist", "pe"):
        arrays |= {f"b.{name}.weight": np.ones((4, 4), np.int8), f"b.{name}.bias": np.ones(9)}
    arrays |= {"b.w_v": np.ones((4, 4), np.int8), "b.w_g": np.ones((4, 1), np.int8)}
    assert len(fold(tmp_path, arrays)) == 2 + 10 + 2


def test_norms_behind_two_linear_layers_are_not_repavits(tmp_path):
    mlp = nn.ModuleDict(
        {"fc1": nn.Linear(4, 8), "norm1": nn.BatchNorm1d(8), "fc2": nn.Linear(8, 3), "norm2": nn.BatchNorm1d(3)}
    )
    folded = fold(tmp_path, arrays_of(nn.ModuleDict({"a": REPVGG(4, 4), "b": mlp}), tmp_path))
    assert "b.norm2.running_var" in folded


def test_the_rule_that_is_of_nothing_is_named_among_others(tmp_path):
    arrays = arrays_of(Holder(REPVGG(4, 4)), tmp_path)
    with pytest.raises(PlanError, match=r"the rule eps:blocks\*,value=0\.1 is of nothing"):
        fold(tmp_path, arrays, "eps:*dense*,value=0.5", "eps:blocks*,value=0.1")
