"""The training forms of published models, and what they become, written as their authors name their parts.

Plain PyTorch, and nothing of the package under test: a module here computes its output the long way.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn


def conv_bn(i: int, o: int, k, stride: int = 1, groups: int = 1, padding=None, **options) -> nn.Sequential:
    """RepVGG's and MobileOne's pair."""
    k = (k, k) if isinstance(k, int) else k
    pair = nn.Sequential()
    padding = tuple(s // 2 for s in k) if padding is None else padding
    pair.add_module("conv", nn.Conv2d(i, o, k, stride, padding, groups=groups, bias=False, **options))
    pair.add_module("bn", nn.BatchNorm2d(o))
    return pair


class RepVGGBlock(nn.Module):
    def __init__(self, i: int, o: int, stride: int = 1, groups: int = 1, *, timm: bool = False) -> None:
        super().__init__()
        self.names = ("conv_kxk", "conv_1x1", "identity") if timm else ("rbr_dense", "rbr_1x1", "rbr_identity")
        self.add_module(self.names[0], conv_bn(i, o, 3, stride, groups))
        self.add_module(self.names[1], conv_bn(i, o, 1, stride, groups))
        self.add_module(self.names[2], nn.BatchNorm2d(i) if i == o and stride == 1 else None)

    def forward(self, x: Tensor) -> Tensor:
        dense, one, skip = (getattr(self, name) for name in self.names)
        return torch.relu(dense(x) + one(x) + (0 if skip is None else skip(x)))


class MobileOneBlock(nn.Module):
    def __init__(
        self,
        i: int,
        o: int,
        k: int,
        stride: int = 1,
        groups: int = 1,
        convs: int = 2,
        scale: bool = True,
        *,
        timm: bool = False,
    ) -> None:
        super().__init__()
        self.names = ("conv_kxk", "conv_scale", "identity") if timm else ("rbr_conv", "rbr_scale", "rbr_skip")
        if convs:
            self.add_module(self.names[0], nn.ModuleList(conv_bn(i, o, k, stride, groups) for _ in range(convs)))
        self.add_module(self.names[1], conv_bn(i, o, 1, stride, groups) if k > 1 and scale else None)
        self.add_module(self.names[2], nn.BatchNorm2d(i) if i == o and stride == 1 else None)

    def forward(self, x: Tensor) -> Tensor:
        convs, scale, skip = (getattr(self, name, None) for name in self.names)
        branches = [*(convs or ()), *(one for one in (scale, skip) if one is not None)]
        return sum(branch(x) for branch in branches)


class LargeKernel(nn.Module):
    """RepLKNet's convolution as FastViT's patch embedding has it: depthwise, more outputs than inputs."""

    def __init__(
        self, i: int, o: int, k: int = 7, small: int | None = 3, stride: int = 2, *, timm: bool = False
    ) -> None:
        super().__init__()
        self.large = "large_conv" if timm else "lkb_origin"
        self.add_module(self.large, conv_bn(i, o, k, stride, groups=i))
        if small:
            self.small_conv = conv_bn(i, o, small, stride, groups=i)

    def forward(self, x: Tensor) -> Tensor:
        out = getattr(self, self.large)(x)
        return out + self.small_conv(x) if hasattr(self, "small_conv") else out


class LayerScale(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class RepMixer(nn.Module):
    def __init__(self, channels: int, k: int = 3, *, scale: bool = True, timm: bool = False) -> None:
        super().__init__()
        self.norm = MobileOneBlock(channels, channels, k, groups=channels, convs=0, scale=False, timm=timm)
        self.mixer = MobileOneBlock(channels, channels, k, groups=channels, convs=1, timm=timm)
        if scale and timm:
            self.layer_scale = LayerScale(channels)
        elif scale:
            self.layer_scale = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        change = self.mixer(x) - self.norm(x)
        if isinstance(getattr(self, "layer_scale", None), nn.Module):
            return x + self.layer_scale(change)
        return x + (self.layer_scale * change if hasattr(self, "layer_scale") else change)


class RepCPE(nn.Module):
    def __init__(self, channels: int, *, timm: bool = False) -> None:
        super().__init__()
        self.child = "pos_enc" if timm else "pe"
        self.add_module(self.child, nn.Conv2d(channels, channels, 7, padding=3, groups=channels))

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.child)(x) + x


class FastViT(nn.Module):
    """One of each of FastViT's parts."""

    def __init__(self, channels: int = 6, *, timm: bool = False) -> None:
        super().__init__()
        self.patch_embed = MobileOneBlock(3, channels, 3, stride=2, convs=1, timm=timm)
        self.mixer_block = nn.ModuleDict({"token_mixer": RepMixer(channels, timm=timm)})
        self.ffn = nn.ModuleDict({"conv": conv_bn(channels, channels, 7, groups=channels)})
        self.down = nn.ModuleDict(
            {
                "proj": nn.Sequential(
                    LargeKernel(channels, 2 * channels, timm=timm),
                    MobileOneBlock(2 * channels, 2 * channels, 1, convs=1, timm=timm),
                )
            }
        )
        self.position = RepCPE(2 * channels, timm=timm)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mixer_block["token_mixer"](nn.functional.gelu(self.patch_embed(x)))
        x = x + nn.functional.gelu(self.ffn["conv"](x))
        return self.position(self.down["proj"](x))


class ConvNorm(nn.Sequential):
    """RepNeXt's pair."""

    def __init__(self, i: int, o: int, k: int = 1, stride: int = 1, padding: int = 0, *, bias: bool = False) -> None:
        super().__init__()
        self.add_module("conv", nn.Conv2d(i, o, k, stride, padding, bias=bias))
        self.add_module("norm", nn.BatchNorm2d(o))


class NormLinear(nn.Sequential):
    def __init__(self, i: int, o: int, *, bias: bool = True, names: tuple[str, str] = ("norm", "linear")) -> None:
        super().__init__()
        self.add_module(names[0], nn.BatchNorm1d(i))
        self.add_module(names[1], nn.Linear(i, o, bias=bias))


class RepDWConvS(nn.Module):
    def __init__(self, channels: int, stride: int = 1) -> None:
        super().__init__()

        def conv(k, stride, padding, bias=True, dilation=1):
            return nn.Conv2d(channels, channels, k, stride, padding, dilation, groups=channels, bias=bias)

        self.stride = stride
        self.conv_3_3 = conv(3, stride, 1)
        self.conv_3_w = conv((1, 3), (1, stride), (0, 1), stride == 1)
        self.conv_3_h = conv((3, 1), (stride, 1), (1, 0), stride == 1)
        self.conv_2_2 = conv(2, stride, 1, dilation=2)

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            return self.conv_3_3(x) + self.conv_3_h(x) + self.conv_3_w(x) + self.conv_2_2(x)
        return self.conv_3_3(x) + self.conv_3_h(self.conv_3_w(x)) + self.conv_2_2(x)


class RepDWConvM(nn.Module):
    def __init__(self, channels: int, stride: int = 1) -> None:
        super().__init__()

        def conv(k, stride, padding, bias=True):
            return nn.Conv2d(channels, channels, k, stride, padding, groups=channels, bias=bias)

        self.conv_7_7 = conv(7, stride, 3)
        self.conv_5_3 = conv((5, 3), stride, (2, 1))
        self.conv_3_5 = conv((3, 5), stride, (1, 2))
        self.conv_7_w = conv((1, 7), (1, stride), (0, 3), bias=False)
        self.conv_7_h = conv((7, 1), (stride, 1), (3, 0), bias=False)
        self.conv_5_w = conv((1, 5), (1, stride), (0, 2), bias=False)
        self.conv_5_h = conv((5, 1), (stride, 1), (2, 0), bias=False)

    def forward(self, x: Tensor) -> Tensor:
        sums = self.conv_7_7(x) + self.conv_5_3(x) + self.conv_3_5(x)
        return sums + self.conv_7_h(self.conv_7_w(x)) + self.conv_5_h(self.conv_5_w(x))


class TwoHeads(nn.Module):
    def __init__(self, i: int, o: int, **options) -> None:
        super().__init__()
        self.head = NormLinear(i, o, **options)
        self.head_dist = NormLinear(i, o, **options)

    def forward(self, x: Tensor) -> Tensor:
        return (self.head(x) + self.head_dist(x)) / 2


class RepNeXt(nn.Module):
    def __init__(self, channels: int = 4, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Sequential(ConvNorm(3, channels, 3, 2, 1), nn.GELU())
        self.conv_s, self.conv_m = RepDWConvS(channels), RepDWConvM(channels)
        self.long = nn.Sequential(
            nn.Conv2d(channels, channels, (1, 11), padding=(0, 5), groups=channels),
            nn.Conv2d(channels, channels, (11, 1), padding=(5, 0), groups=channels),
        )
        self.half_s, self.half_m = RepDWConvS(channels, 2), RepDWConvM(channels, 2)
        self.mixing_norm = nn.BatchNorm2d(2 * channels)
        self.head = TwoHeads(2 * channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.long(self.conv_m(self.conv_s(x)))
        x = self.mixing_norm(torch.cat((self.half_s(x), self.half_m(x)), dim=1))
        return self.head(x.mean((2, 3)))


class RepVggDw(nn.Module):
    """RepViT's token mixer."""

    def __init__(self, channels: int, k: int = 3, *, legacy: bool = False) -> None:
        super().__init__()
        self.conv = self.pair(channels, k)
        self.conv1 = self.pair(channels, 1) if legacy else nn.Conv2d(channels, channels, 1, groups=channels)
        self.bn = nn.Identity() if legacy else nn.BatchNorm2d(channels)

    @staticmethod
    def pair(channels: int, k: int) -> nn.Sequential:
        pair = nn.Sequential()
        pair.add_module("c", nn.Conv2d(channels, channels, k, padding=k // 2, groups=channels, bias=False))
        pair.add_module("bn", nn.BatchNorm2d(channels))
        return pair

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x) + self.conv1(x) + x)


class RePaMlp(nn.Module):
    """RePaViT's feed-forward layer with idle channels; of images, and with a layer scale, as RePaPoolFormer's."""

    def __init__(self, channels: int, hidden: int, active: int, *, images: bool = False, scale: bool = False) -> None:
        super().__init__()
        layer: Callable[[int, int], nn.Module] = (lambda i, o: nn.Conv2d(i, o, 1)) if images else nn.Linear
        norm = nn.BatchNorm2d if images else nn.BatchNorm1d
        self.fc1, self.fc2 = layer(channels, hidden), layer(hidden, channels)
        self.norm1, self.norm2 = norm(channels), norm(hidden)
        self.active, self.images = active, images
        if scale:
            self.ls = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        if self.images:
            hidden = self.fc1(self.norm1(x))
            hidden = torch.cat((nn.functional.gelu(hidden[:, : self.active]), hidden[:, self.active :]), dim=1)
            out = self.fc2(self.norm2(hidden))
            return x + (out * self.ls[:, None, None] if hasattr(self, "ls") else out)
        hidden = self.fc1(self.norm1(x.mT).mT)
        hidden = torch.cat((nn.functional.gelu(hidden[..., : self.active]), hidden[..., self.active :]), dim=-1)
        return x + self.fc2(self.norm2(hidden.mT).mT)


class FoldedRePaMlp(nn.Module):
    """What RePaViT's layer becomes."""

    def __init__(self, channels: int, active: int, *, images: bool = False) -> None:
        super().__init__()
        layer = nn.Conv2d if images else nn.Linear
        size = (1,) if images else ()
        self.fc1 = layer(channels, channels, *size)
        if active:
            self.fc2 = layer(channels, active, *size)
            self.fc3 = layer(active, channels, *size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.fc1(x)
        return out + self.fc3(nn.functional.gelu(self.fc2(x))) if hasattr(self, "fc2") else out


class SigmaLinear(nn.Linear):
    """apple/ml-sigma-reparam's layer, in evaluation mode."""

    def __init__(self, i: int, o: int, *, kernel: int | None = None, stats_only: bool = False) -> None:
        super().__init__(i * (kernel or 1) ** 2, o)
        self.kernel = kernel
        self.spectral_normed_weight = nn.Module()
        self.spectral_normed_weight.weight = self.weight
        self.spectral_normed_weight.register_buffer("u", torch.linalg.svd(self.weight.detach())[2][0])
        self.spectral_normed_weight.register_buffer("spectral_norm", torch.ones(1))
        if not stats_only:
            self.sigma = nn.Parameter(torch.full((1,), 1.7))
        self.register_buffer("effective_spectral_norm", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if hasattr(self, "sigma"):
            v = nn.functional.normalize(weight.mv(self.spectral_normed_weight.u), dim=0)
            u = nn.functional.normalize(weight.T.mv(v), dim=0)
            weight = self.sigma * weight / torch.einsum("c,cd,d->", v, weight, u)
        if self.kernel is None:
            return nn.functional.linear(x, weight, self.bias)
        return nn.functional.conv2d(x, weight.view(len(weight), -1, self.kernel, self.kernel), self.bias)


def randomise(module: nn.Module, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Give every tensor values of its own, as training would: gains of both signs, statistics far from 0 and 1."""
    made = torch.Generator().manual_seed(seed)
    module = module.to(dtype).eval()
    with torch.no_grad():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if not tensor.is_floating_point():
                tensor.fill_(1000)
            elif name.endswith("running_var"):
                tensor.copy_(torch.rand(tensor.shape, generator=made, dtype=dtype) * 2 + 0.05)
            elif name.endswith(("sigma", "spectral_norm")) or ".spectral_normed_weight.u" in f".{name}":
                continue
            else:
                spread = 1 / math.sqrt(max(tensor[0].numel(), 1)) if tensor.dim() > 1 else 0.7
                tensor.copy_(torch.randn(tensor.shape, generator=made, dtype=dtype) * spread)
    return module
