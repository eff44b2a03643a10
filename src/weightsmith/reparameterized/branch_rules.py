"""Rules for a layer and its batch norm, and for layers side by side: tables of their names, and how they become one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from weightsmith.checkpoint.tensor import Tensor
from weightsmith.reparameterized.algebra import (
    absorb,
    absorb_before,
    absorb_transposed,
    add,
    identity,
    largest_kernel,
    pad,
    regroup,
    scale,
)
from weightsmith.reparameterized.instructions import Instruction
from weightsmith.reparameterized.layer import Layer, Norm, Once, vector
from weightsmith.reparameterized.model import Model, join


@dataclass(frozen=True)
class Pair:
    """A layer and a batch norm beside each other in a module.

    Attributes:
        layer: the layer's name in the module.
        norm: the batch norm's name in the module.
        out: what the folded layer is called in the module; None for the module itself.
        before: whether the batch norm comes first.
        always: whether the norm can be nothing but a batch norm, so that one without statistics is an error.
        transposed: whether the layer is a transposed convolution.
    """

    layer: str
    norm: str
    out: str | None = None
    before: bool = False
    always: bool = False
    transposed: bool = False


# Where authors' own code folds a pair, the layer takes the pair's place (out is None); else it keeps its name.
PAIRS = (
    Pair("conv", "bn", "conv", always=True),  # timm, RepVGG, MobileOne, FastViT, mmcv, YOLO
    Pair("convolution", "normalization", "convolution"),  # ResNet, RegNet and MobileNet of transformers
    Pair("convolution", "batch_norm", "convolution", always=True),  # LeViT of transformers
    Pair("conv", "norm"),  # RepNeXt
    Pair("c", "bn", always=True),  # RepViT, LeViT
    Pair("linear", "norm", before=True),  # RepNeXt
    Pair("l", "bn", before=True, always=True),  # RepViT, LeViT
)


@dataclass(frozen=True)
class Branches:
    """Layers side by side whose outputs are added.

    Attributes:
        kind: the kind of rule.
        convs: names of the branches in the module; one that ends in ``.*`` stands for a list of them.
        out: what the folded layer is called in the module; None for the module itself.
        optional: further branches, which may be missing.
        skip: a batch norm of the input beside them, which may be missing.
        residual: whether the input itself is added.
        norm: a batch norm of the sum, which may be missing.
        scale: a tensor that multiplies the sum before the input is added.
        channels: input channels, where nothing shows how many there are.
        own_norms: whether every branch ends in a batch norm of its own.
        said: what a person said, if they are named so: whatever is named must be there.
    """

    kind: str
    convs: tuple[str, ...]
    out: str | None
    optional: tuple[str, ...] = ()
    skip: str | None = None
    residual: bool = False
    norm: str | None = None
    scale: str | None = None
    channels: int | None = None
    own_norms: bool = True
    said: Instruction | None = None


BRANCHES = (
    # Ding et al., RepVGG, 2021, arXiv:2101.03697: DingXiaoH/RepVGG, and timm.
    Branches("repvgg", ("rbr_dense", "rbr_1x1"), "rbr_reparam", skip="rbr_identity"),
    Branches("repvgg", ("conv_kxk", "conv_1x1"), "reparam_conv", skip="identity"),
    # Vasu et al., MobileOne, 2022, arXiv:2206.04040: apple/ml-mobileone and apple/ml-fastvit, and timm.
    Branches("mobileone", ("rbr_conv.*",), "reparam_conv", ("rbr_scale",), skip="rbr_skip"),
    Branches("mobileone", ("conv_kxk.*",), "reparam_conv", ("conv_scale",), skip="identity"),
    # Ding et al., RepLKNet, 2022, arXiv:2203.06717, as FastViT's patch embedding has it, and timm.
    Branches("large_kernel", ("lkb_origin",), "lkb_reparam", ("small_conv",)),
    Branches("large_kernel", ("large_conv",), "reparam_conv", ("small_conv",)),
    # Wang et al., RepViT, 2023, arXiv:2307.09283: THU-MIG/RepViT, and timm.
    Branches("repvit", ("conv", "conv1"), None, residual=True, norm="bn", own_norms=False),
)

_NAMES = {
    name.removesuffix(".*")
    for form in BRANCHES
    for name in (*form.convs, *form.optional, form.skip, form.out)
    if name is not None
}


def fold_pairs(model: Model) -> None:
    """Fold every layer and batch norm that a person names, and those that names show to follow each other."""
    for module in model.modules():
        said = model.first_said("conv_bn", module)
        if said is not None:
            out = said["out"] or said["conv"]
            pair = Pair(said["conv"], said["norm"], out, transposed=said["transposed"])
            _fold_said_pair(model, module, pair, said)
        said = model.first_said("bn_linear", module)
        if said is not None:
            out = said["out"] or said["linear"]
            _fold_said_pair(model, module, Pair(said["linear"], said["norm"], out, before=True), said)
    for pair in PAIRS:
        # A module that holds more may add or apply something between the two.
        found = [module for module in model.modules() if model.children(module) == {pair.layer, pair.norm}]
        if all(_fits(model, module, pair) for module in found):
            for module in found:
                model.place = module
                _fold_pair(model, module, pair)


def _fits(model: Model, module: str, pair: Pair) -> bool:
    """Whether the shapes allow for the order that the names are taken for.

    One pair of a model that is in the other order (a batch norm before its convolution) speaks for all.
    """
    weight, mean = model.get(join(module, f"{pair.layer}.weight")), model.get(join(module, f"{pair.norm}.running_mean"))
    if weight is None or mean is None or len(weight.shape) < 2:
        return True
    return mean.size == weight.shape[1 if pair.before else 0]


def _fold_said_pair(model: Model, module: str, pair: Pair, said: Instruction) -> None:
    layer, norm = join(module, pair.layer), join(module, pair.norm)
    found = [path for path in (layer, norm) if model.names(path)]
    if not found:
        return
    model.use(said)
    missing = next((path for path in (layer, norm) if path not in found), None)
    if missing is not None:
        raise model.error(module or "the model", f"holds {found[0]} and no {missing}; narrow the rule's names")
    if not _fold_pair(model, module, replace(pair, always=True)):
        raise model.error(layer, "is no linear or convolution layer: it has no weight of two axes or more")


def _fold_pair(model: Model, module: str, pair: Pair) -> bool:
    path, norm_path = join(module, pair.layer), join(module, pair.norm)
    if model.get(f"{path}.weight") is None or model.made_by(f"{path}.weight") in ("conv_bn", "bn_linear"):
        return False
    norm = model.norm(norm_path, needed=pair.always)
    layer = None if norm is None else model.layer(path, outputs=norm.channels if pair.transposed else None)
    if layer is None or norm is None:
        return False
    if pair.before:
        folded = absorb_before(norm, layer)
    else:
        folded = absorb_transposed(layer, norm) if pair.transposed else absorb(layer, norm)
    kind = "bn_linear" if pair.before else "conv_bn"
    model.fold_layer(kind, module, model.names(path, norm_path), {join(module, pair.out): folded})
    return True


def fold_branches(model: Model) -> None:
    """Fold branches that names show, and those that a person names."""
    for module in model.modules():
        said = model.first_said("branches", module)
        if said is not None:
            _fold_branches(
                model,
                module,
                Branches(
                    "branches",
                    tuple(said["conv"].split("+")),
                    said["out"],
                    skip=said["skip"],
                    residual=said["residual"],
                    norm=said["norm"],
                    scale=said["scale"],
                    channels=said["channels"],
                    own_norms=False,
                    said=said,
                ),
            )
        for form in BRANCHES:
            _fold_branches(model, module, form)


def _fold_branches(model: Model, module: str, form: Branches) -> None:
    paths = _paths(model, module, form.convs)
    found = [path for path in paths if _branch(model, path) is not None]
    if not found or (form.own_norms and not any(_has_norm(model, path) for path in found)):
        return
    if form.kind == "repvit" and not _is_repvit(model, module):
        return
    missing = next((path for path in paths if path not in found), None)
    if missing is not None:
        raise model.error(module or "the model", f"holds {found[0]} and no {missing}: a branch is missing")
    strange = sorted(name for name in model.children(module) if name.startswith("rbr_") and name not in _NAMES)
    if strange and not form.said:
        raise model.error(join(module, strange[0]), f"is no branch of the form {form.kind} that is known here")
    found += [path for path in _paths(model, module, form.optional) if _branch(model, path) is not None]
    if form.said is not None:
        model.use(form.said)
    layers, consumed = [], []
    for path in found:
        layer, name = _need_branch(model, path, form)
        layers.append(layer)
        consumed += model.names(name)
    skip = _norm_of(model, module, form.skip, form)
    channels = form.channels or (skip.channels if skip else layers[0].out if form.residual else None)
    layers = _alike(model, module, layers, channels)
    shape, dtype = layers[0].shape, layers[0].dtype
    if skip is not None:
        check_skip(model, module, layers[0], skip.channels)
        layers.append(absorb(identity(shape[0], shape[1], shape[2:], dtype), skip))
        consumed += model.names(join(module, form.skip))
    total = add(*layers)
    scales = _scale_of(model, module, form, shape[0])
    if scales is not None:
        total = scaled_by(total, scales)
        consumed.append(scales.name)
    if form.residual:
        total = add(total, identity(shape[0], shape[1], shape[2:], dtype))
    norm = _norm_of(model, module, form.norm, form)
    if norm is not None:
        total = absorb(total, norm)
        consumed += model.names(join(module, form.norm))
    model.fold_layer(form.kind, module, list(dict.fromkeys(consumed)), {join(module, form.out): total})


def _paths(model: Model, module: str, names: Sequence[str]) -> list[str]:
    """Return the paths of branches; those of a list in order."""
    paths = []
    for name in names:
        stem = join(module, name.removesuffix(".*"))
        if name.endswith(".*"):
            paths += [f"{stem}.{i}" for i in sorted(int(one) for one in model.children(stem) if one.isdecimal())]
        else:
            paths.append(stem)
    return paths


def _branch(model: Model, path: str) -> str | None:
    """Return where the layer of a branch is: in its place, or in the pair that it was."""
    for name in (path, f"{path}.conv", f"{path}.c"):
        weight = model.get(f"{name}.weight")
        if weight is not None and len(weight.shape) >= 2:
            return name
    return None


def _has_norm(model: Model, path: str) -> bool:
    """Whether a branch is a layer with a batch norm of its own, which is folded by now."""
    name = _branch(model, path)
    return name is not None and model.made_by(f"{name}.weight") == "conv_bn"


def _need_branch(model: Model, path: str, form: Branches) -> tuple[Layer, str]:
    name = _branch(model, path)
    layer = None if name is None else model.layer(name)
    if name is None or layer is None:
        raise model.error(path, "holds no linear or convolution layer")
    if form.own_norms and not _has_norm(model, path):
        raise model.error(path, "has no batch norm behind its convolution, and the others have: is the file whole?")
    return layer, name


def _norm_of(model: Model, module: str, name: str | None, form: Branches) -> Norm | None:
    if name is None:
        return None
    path = join(module, name)
    norm = model.norm(path, needed=True)
    if norm is None and form.said:
        raise model.error(path, "is no batch norm: it has no running_mean and running_var")
    return norm


def _scale_of(model: Model, module: str, form: Branches, channels: int) -> Tensor | None:
    if form.scale is None:
        return None
    name = join(module, form.scale)
    tensor = model.get(name)
    if tensor is None:
        raise model.error(name, "is not there; scale names a tensor of the module")
    if tensor.size != channels:
        raise model.error(name, f"is {list(tensor.shape)}; one value for each of {channels} outputs fits")
    return tensor


def _alike(model: Model, module: str, layers: Sequence[Layer], channels: int | None) -> list[Layer]:
    """Return layers with one kernel size, in the smallest common group layout."""
    kernel = largest_kernel(layers)
    widths = {layer.width for layer in layers}
    if len(widths) > 1:
        outs = {layer.out for layer in layers}
        if channels is None:
            raise model.error(
                module,
                f"its branches see {' and '.join(map(str, sorted(widths)))} input channels at a time (they are in "
                f"groups) and have {' and '.join(map(str, sorted(outs)))} outputs; say how many input channels there "
                "are in all: channels=…",
            )
        width = math.lcm(*widths)
        layers = [regroup(layer, width, channels) for layer in layers]
    return [pad(layer, kernel) for layer in layers]


def check_skip(model: Model, module: str, layer: Layer, channels: int) -> None:
    """Check that a batch norm of the input has as many channels as a layer beside it has outputs."""
    if channels != layer.out:
        raise model.error(
            module, f"the batch norm beside the branches has {channels} channels, and they have {layer.out} outputs"
        )


def _is_repvit(model: Model, module: str) -> bool:
    """Whether a module is RepViT's token mixer: depthwise, 1x1 beside it, a batch norm behind the first."""
    conv, one = (_branch(model, join(module, name)) for name in ("conv", "conv1"))
    if conv is None or one is None or not _has_norm(model, join(module, "conv")):
        return False
    shapes = [model.tensors[f"{name}.weight"].shape for name in (conv, one)]
    return all(len(shape) == 4 and shape[1] == 1 for shape in shapes) and shapes[1] == (shapes[0][0], 1, 1, 1)


def scaled_by(layer: Layer, scales: Tensor) -> Layer:
    """Return a layer whose outputs a stored tensor multiplies, a value for each."""
    return scale(layer, Once(lambda: vector(scales)))
