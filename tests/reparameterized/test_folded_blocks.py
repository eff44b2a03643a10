"""Every block that is folded computes what its training form computes in evaluation mode, under its authors' names."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import training_forms as forms
from folded_modules import fold_and_save
from torch import nn
from torch.nn.functional import conv2d, conv_transpose2d, gelu, linear

F64 = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture
def fold_module(tmp_path):
    return partial(fold_and_save, tmp_path)


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(2, 6, 13, 12, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def conv(tensors: dict[str, torch.Tensor], name: str, x: torch.Tensor, **options) -> torch.Tensor:
    name = f"{name}." if name else ""
    return conv2d(x, tensors[f"{name}weight"], tensors.get(f"{name}bias"), **options)


class Holder(nn.Module):
    """A model of one block, by the name ``block``."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x)


def check(fold_module, block: nn.Module, x: torch.Tensor, names: set[str], computed, rules=()) -> None:
    model = forms.randomise(Holder(block))
    tensors = fold_module(model, rules)
    assert set(tensors) == {f"block.{name}" for name in names}
    own = {name.removeprefix("block."): tensor for name, tensor in tensors.items()}
    torch.testing.assert_close(computed(own, x), model(x), **F64)


@pytest.mark.parametrize("timm", [False, True])
@pytest.mark.parametrize(("o", "stride", "groups"), [(6, 1, 1), (6, 1, 3), (8, 1, 2), (6, 2, 1), (12, 2, 6)])
def test_repvgg(fold_module, image, o, stride, groups, timm):
    out = "reparam_conv" if timm else "rbr_reparam"
    check(
        fold_module,
        forms.RepVGGBlock(6, o, stride, groups, timm=timm),
        image,
        {f"{out}.weight", f"{out}.bias"},
        lambda t, x: torch.relu(conv(t, out, x, stride=stride, padding=1, groups=groups)),
    )


@pytest.mark.parametrize("timm", [False, True])
@pytest.mark.parametrize(
    ("o", "k", "stride", "groups", "convs"), [(6, 3, 1, 6, 4), (6, 1, 1, 1, 2), (8, 3, 2, 2, 1), (6, 5, 1, 1, 11)]
)
def test_mobileone(fold_module, image, o, k, stride, groups, convs, timm):
    check(
        fold_module,
        forms.MobileOneBlock(6, o, k, stride, groups, convs, timm=timm),
        image,
        {"reparam_conv.weight", "reparam_conv.bias"},
        lambda t, x: conv(t, "reparam_conv", x, stride=stride, padding=k // 2, groups=groups),
    )


@pytest.mark.parametrize("timm", [False, True])
@pytest.mark.parametrize("small", [3, 5, None])
def test_large_kernel(fold_module, image, small, timm):
    out = "reparam_conv" if timm else "lkb_reparam"
    check(
        fold_module,
        forms.LargeKernel(6, 12, 7, small, timm=timm),
        image,
        {f"{out}.weight", f"{out}.bias"},
        lambda t, x: conv(t, out, x, stride=2, padding=3, groups=6),
    )


@pytest.mark.parametrize("timm", [False, True])
@pytest.mark.parametrize("scale", [True, False])
def test_repmixer(fold_module, image, scale, timm):
    check(
        fold_module,
        forms.RepMixer(6, scale=scale, timm=timm),
        image,
        {"reparam_conv.weight", "reparam_conv.bias"},
        lambda t, x: conv(t, "reparam_conv", x, padding=1, groups=6),
    )


@pytest.mark.parametrize("timm", [False, True])
def test_fastvit_as_a_whole(fold_module, timm):
    model = forms.randomise(forms.FastViT(timm=timm))
    x = torch.randn(2, 3, 21, 24, dtype=torch.float64)
    t = fold_module(model)
    patch = "down.proj.0." + ("reparam_conv" if timm else "lkb_reparam")
    layers = ["patch_embed.reparam_conv", "mixer_block.token_mixer.reparam_conv", "ffn.conv.conv", patch]
    layers += ["down.proj.1.reparam_conv", "position.reparam_conv"]
    assert set(t) == {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    y = gelu(conv(t, layers[0], x, stride=2, padding=1))
    y = conv(t, layers[1], y, padding=1, groups=6)
    y = y + gelu(conv(t, layers[2], y, padding=3, groups=6))
    y = conv(t, layers[4], conv(t, layers[3], y, stride=2, padding=3, groups=6))
    torch.testing.assert_close(conv(t, layers[5], y, padding=3, groups=12), model(x), **F64)


def test_repnext_as_a_whole(fold_module):
    model = forms.randomise(forms.RepNeXt())
    x = torch.randn(2, 3, 27, 30, dtype=torch.float64)
    t = fold_module(model)
    folded = ["stem.0", "conv_s", "conv_m", "half_s", "half_m", "head"]
    untouched = {name for name in model.state_dict() if name.startswith(("long", "mixing_norm"))}
    assert set(t) == {f"{layer}.{part}" for layer in folded for part in ("weight", "bias")} | untouched
    y = gelu(conv(t, "stem.0", x, stride=2, padding=1))
    y = conv(t, "conv_m", conv(t, "conv_s", y, padding=1, groups=4), padding=3, groups=4)
    y = model.long(y)
    halves = [conv(t, f"half_{i}", y, stride=2, padding=p, groups=4) for i, p in (("s", 1), ("m", 3))]
    y = model.mixing_norm(torch.cat(halves, dim=1)).mean((2, 3))
    torch.testing.assert_close(linear(y, t["head.weight"], t["head.bias"]), model(x), **F64)


@pytest.mark.parametrize("legacy", [True, False])
def test_repvit(fold_module, image, legacy):
    check(
        fold_module,
        forms.RepVggDw(6, legacy=legacy),
        image,
        {"weight", "bias"},
        lambda t, x: conv(t, "", x, padding=1, groups=6),
    )


@pytest.mark.parametrize(("names", "bias"), [(("norm", "linear"), True), (("bn", "l"), False)])
def test_heads_averaged(fold_module, names, bias):
    x = torch.randn(4, 9, dtype=torch.float64)
    check(
        fold_module,
        forms.TwoHeads(9, 5, names=names, bias=bias),
        x,
        {"weight", "bias"},
        lambda t, x: linear(x, t["weight"], t["bias"]),
    )


@pytest.mark.parametrize(
    ("active", "rule"), [(6, "idle=0.75"), (6, "active=6"), (1, "active=1"), (0, "idle=1"), (24, "idle=0")]
)
@pytest.mark.parametrize("scale", [False, True])
def test_repavit(fold_module, image, active, rule, scale):
    """With a layer scale the authors' own routine is wrong by the bias; this is held against the forward pass."""
    model = forms.randomise(Holder(forms.RePaMlp(6, 24, active, images=True, scale=scale)))
    t = fold_module(model, [f"repavit:*,{rule}"])
    folded = Holder(forms.FoldedRePaMlp(6, active, images=True)).double()
    folded.load_state_dict(t)
    torch.testing.assert_close(folded(image), model(image), **F64)


def test_repavit_of_tokens(fold_module):
    model = forms.randomise(Holder(forms.RePaMlp(8, 32, 8)))
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    folded = Holder(forms.FoldedRePaMlp(8, 8)).double()
    folded.load_state_dict(fold_module(model, ["repavit:block,idle=0.75"]))
    torch.testing.assert_close(folded(x), model(x), **F64)


class Grouped(nn.Module):
    """FMViT's kind of block: branches in different groups, a 1x1 and a batch norm beside them, one behind the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = forms.conv_bn(12, 12, 3, groups=6), forms.conv_bn(12, 12, 5, groups=4)
        self.one, self.skip = nn.Conv2d(12, 12, 1, groups=12), nn.BatchNorm2d(12)
        self.behind = nn.BatchNorm2d(12)
        self.gamma = nn.Parameter(torch.ones(12, 1, 1))

    def forward(self, x):
        return self.behind(x + self.gamma * (self.a(x) + self.b(x) + self.one(x) + self.skip(x)))


def test_branches_in_groups_become_the_smallest_common_layout(fold_module):
    """Groups of 2 and of 3 channels fit into groups of 6: two groups, not one."""
    x = torch.randn(2, 12, 9, 9, dtype=torch.float64)
    rule = "branches:block,conv=a+b+one,skip=skip,norm=behind,scale=gamma,residual=true,out=fused"

    def computed(t, x):
        assert t["fused.weight"].shape == (12, 6, 5, 5)
        return conv(t, "fused", x, padding=2, groups=2)

    check(fold_module, Grouped(), x, {"fused.weight", "fused.bias"}, computed, [rule])


def test_branches_with_more_outputs_than_inputs(fold_module):
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = forms.conv_bn(8, 24, 3, groups=4), forms.conv_bn(8, 24, 3, groups=2)

        def forward(self, x):
            return self.a(x) + self.b(x)

    x = torch.randn(2, 8, 9, 9, dtype=torch.float64)

    def computed(t, x):
        return conv(t, "", x, padding=1, groups=2)

    check(fold_module, Wide(), x, {"weight", "bias"}, computed, ["branches:block,conv=a+b,channels=8"])


class Facelike(nn.Module):
    """FaceLiVT's mixer as its card has it: depthwise convolutions with batch norms, a batch norm of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.dw, self.pw, self.bn = (
            forms.conv_bn(6, 6, 3, groups=6),
            forms.conv_bn(6, 6, 1, groups=6),
            nn.BatchNorm2d(6),
        )

    def forward(self, x):
        return self.dw(x) + self.pw(x) + self.bn(x)


def test_facelivt(fold_module, image):
    def computed(t, x):
        return conv(t, "", x, padding=1, groups=6)

    check(fold_module, Facelike(), image, {"weight", "bias"}, computed, ["branches:block,conv=dw+pw,skip=bn"])


class Serial(nn.Module):
    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.one, self.two = first, second

    def forward(self, x):
        return self.two(self.one(x))


SERIAL = {
    "rows then columns": (
        Serial(
            nn.Conv2d(6, 6, (1, 5), padding=(0, 2), groups=6, bias=False),
            nn.Conv2d(6, 6, (3, 1), padding=(1, 0), groups=6),
        ),
        "",
        {"padding": (1, 2), "groups": 6},
    ),
    "separable": (
        Serial(nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Conv2d(6, 4, 1)),
        ",channels=6",
        {"padding": 1},
    ),
    "dense then 1x1": (Serial(nn.Conv2d(6, 5, 3, padding=1), nn.Conv2d(5, 4, 1)), ",channels=6", {"padding": 1}),
    "without padding": (
        Serial(nn.Conv2d(6, 6, (1, 3), groups=6), nn.Conv2d(6, 6, (3, 1), groups=6)),
        ",padding=false",
        {"groups": 6},
    ),
}


@pytest.mark.parametrize("case", SERIAL)
def test_serial(fold_module, image, case):
    block, more, options = SERIAL[case]
    names = {"weight", "bias"}
    rule = f"serial:block,first=one,second=two{more}"
    check(fold_module, block, image, names, lambda t, x: conv(t, "", x, **options), [rule])


def test_a_sequential_of_linear_layers(fold_module):
    x = torch.randn(3, 7, dtype=torch.float64)
    block = nn.Sequential(nn.Linear(7, 9), nn.Linear(9, 4))
    rule = "serial:block,first=0,second=1,out=0"
    names = {"0.weight", "0.bias"}
    check(fold_module, block, x, names, lambda t, x: linear(x, t["0.weight"], t["0.bias"]), [rule])


def test_pairs_that_a_person_names(fold_module, image):
    """ResNet's names say nothing of the order: a batch norm may as well come first."""

    class Basic(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
            self.norm, self.qkv = nn.BatchNorm2d(6), nn.Conv2d(6, 18, 1, bias=False)

        def forward(self, x):
            return self.qkv(self.norm(torch.relu(self.bn1(self.conv1(x)))))

    def computed(t, x):
        return conv(t, "qkv", torch.relu(conv(t, "conv1", x, padding=1)))

    names = {"conv1.weight", "conv1.bias", "qkv.weight", "qkv.bias"}
    rules = ["conv_bn:*,conv=conv1,norm=bn1", {"kind": "bn_linear", "names": "block", "norm": "norm", "linear": "qkv"}]
    check(fold_module, Basic(), image, names, computed, rules)


@pytest.mark.parametrize(("o", "groups"), [(6, 1), (4, 2), (12, 6)])
def test_transposed_convolution(fold_module, image, o, groups):
    block = nn.Sequential(nn.ConvTranspose2d(6, o, 3, stride=2, groups=groups), nn.BatchNorm2d(o))

    def computed(t, x):
        return conv_transpose2d(x, t["0.weight"], t["0.bias"], stride=2, groups=groups)

    rule = "conv_bn:block,conv=0,norm=1,transposed=true"
    check(fold_module, block, image, {"0.weight", "0.bias"}, computed, [rule])


def test_eps_that_a_person_names(fold_module, image):
    block = forms.RepVGGBlock(6, 6)
    for name, module in block.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.25 if "dense" in name else 0.5

    def computed(t, x):
        return torch.relu(conv(t, "rbr_reparam", x, padding=1))

    names = {"rbr_reparam.weight", "rbr_reparam.bias"}
    check(fold_module, block, image, names, computed, ["eps:*dense*,value=0.25", "eps:*,value=0.5"])


def test_one_dimension_and_three(fold_module):
    for conv_kind, norm, shape in (
        (nn.Conv1d, nn.BatchNorm1d, (2, 4, 11)),
        (nn.Conv3d, nn.BatchNorm3d, (2, 4, 5, 6, 7)),
    ):
        pair = nn.ModuleDict({"conv": conv_kind(4, 6, 3, bias=True), "bn": norm(6, affine=False)})
        model = forms.randomise(nn.ModuleDict({"block": pair}))
        t = fold_module(model)
        assert set(t) == {"block.conv.weight", "block.conv.bias"}
        x = torch.randn(shape, dtype=torch.float64)
        expected = pair["bn"](pair["conv"](x))
        pair["conv"].load_state_dict({"weight": t["block.conv.weight"], "bias": t["block.conv.bias"]})
        torch.testing.assert_close(pair["conv"](x), expected, **F64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_results_are_rounded_once(fold_module, dtype):
    """In the dtype of the checkpoint's kernels, from arithmetic in float64."""
    exact = forms.randomise(forms.FastViT(), dtype=torch.float64)
    stored = forms.randomise(forms.FastViT(), dtype=torch.float64).to(dtype)
    for name, tensor in exact.state_dict().items():
        tensor.copy_(stored.state_dict()[name])
    expected, found = fold_module(exact), fold_module(stored)
    for name, tensor in expected.items():
        assert found[name].dtype == dtype
        if dtype == torch.float32:
            torch.testing.assert_close(found[name], tensor.to(dtype), rtol=0, atol=0)
        else:
            torch.testing.assert_close(found[name].double(), tensor, rtol=2**-11, atol=2**-25)
