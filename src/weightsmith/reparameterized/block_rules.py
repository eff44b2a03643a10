"""Rules for layers that follow each other or stand side by side: which children of a module become which one layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from weightsmith.checkpoint.tensor import Tensor
from weightsmith.reparameterized.instructions import Instruction
from weightsmith.reparameterized.layer import (
    Layer,
    Norm,
    Once,
    absorb,
    absorb_before,
    absorb_transposed,
    add,
    dilate,
    identity,
    largest_kernel,
    pad,
    regroup,
    scale,
    serial,
    take_columns,
    take_rows,
    vector,
)
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
        _check_skip(model, module, layers[0], skip.channels)
        layers.append(absorb(identity(shape[0], shape[1], shape[2:], dtype), skip))
        consumed += model.names(join(module, form.skip))
    total = add(*layers)
    scales = _scale_of(model, module, form)
    if scales is not None:
        total = _scaled_by(total, scales)
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


def _scale_of(model: Model, module: str, form: Branches) -> Tensor | None:
    if form.scale is None:
        return None
    name = join(module, form.scale)
    tensor = model.get(name)
    if tensor is None:
        raise model.error(name, "is not there; scale names a tensor of the module")
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


def _check_skip(model: Model, module: str, layer: Layer, channels: int) -> None:
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


def fold_rep_mixers(model: Model) -> None:
    """Fold FastViT's token mixer: ``x + s (mixer(x) - norm(x))``, depthwise.

    Vasu et al., FastViT, 2023, arXiv:2303.14189. ``norm`` is a batch norm of the input, ``s`` a layer scale.
    """
    for module in model.modules():
        mixer_path = join(module, "mixer.reparam_conv")
        skip_path = next(
            (path for path in (join(module, f"norm.{name}") for name in ("rbr_skip", "identity")) if model.names(path)),
            None,
        )
        mixer = None if skip_path is None else model.layer(mixer_path)
        if skip_path is None or mixer is None:
            continue
        norm = model.norm(skip_path, needed=True)
        if norm is None:
            continue
        _check_skip(model, module, mixer, norm.channels)
        nothing = identity(mixer.out, mixer.width, mixer.kernel, mixer.dtype)
        change = add(mixer, absorb(nothing, norm), signs=(1, -1))
        consumed = model.names(mixer_path, skip_path)
        scales_name = next(
            (name for name in (join(module, "layer_scale"), join(module, "layer_scale.gamma")) if model.get(name)), None
        )
        if scales_name is not None:
            scales = model.tensors[scales_name]
            if scales.size != mixer.out:
                raise model.error(scales_name, f"is {list(scales.shape)}; [{mixer.out}, 1, 1] fits")
            change = _scaled_by(change, scales)
            consumed.append(scales_name)
        folded = add(nothing, change)
        model.fold_layer("repmixer", module, consumed, {join(module, "reparam_conv"): folded})


def _scaled_by(layer: Layer, scales: Tensor) -> Layer:
    return scale(layer, Once(lambda: vector(scales)))


def fold_positions(model: Model) -> None:
    """Fold FastViT's positional encoding, ``x + pe(x)``, depthwise.

    The name ``pe`` alone says little, so a model is taken for one of FastViT's only where its token mixers are there.
    """
    if not any(fold.kind == "repmixer" for fold in model.folds):
        return
    for module in model.modules():
        for child in ("pe", "pos_enc"):
            path = join(module, child)
            layer = model.layer(path)
            if layer is None or layer.width != 1 or len(layer.kernel) != 2 or layer.bias is None:
                continue
            folded = add(layer, identity(layer.out, 1, layer.kernel, layer.dtype))
            model.fold_layer("position", module, model.names(path), {join(module, "reparam_conv"): folded})


def fold_chunks(model: Model) -> None:
    """Fold RepNeXt's chunk convolutions, depthwise: Zhao et al., RepNeXt, 2024, arXiv:2406.16004.

    The small one is 3x3 + 1x3 + 3x1 + 2x2 with dilation 2; where it halves the image, 1x3 and 3x1 stand one behind the
    other, without biases. The medium one is 7x7 + 5x3 + 3x5, and two such chains, of 7 and of 5.
    """
    for module in model.modules():
        small = _children(model, module, ("conv_3_3", "conv_3_w", "conv_3_h", "conv_2_2"))
        if small:
            square, row, column, corners = small
            biases = [layer.bias is not None for layer in (square, row, column)]
            if biases[1] != biases[2] or (biases[1] and not biases[0]) or not any(biases):
                raise model.error(
                    module,
                    "conv_3_w and conv_3_h stand side by side where they have biases, and one behind the other where "
                    "conv_3_3 alone has; here neither is so",
                )
            chain = [row, column] if biases[1] else [serial(row, column)]
            layers = [square, *chain, dilate(corners, 2)]
            _fold_sum(model, module, layers, ("conv_3_3", "conv_3_w", "conv_3_h", "conv_2_2"))
        names = ("conv_7_7", "conv_5_3", "conv_3_5", "conv_7_w", "conv_7_h", "conv_5_w", "conv_5_h")
        medium = _children(model, module, names)
        if medium:
            layers = [*medium[:3], serial(medium[3], medium[4]), serial(medium[5], medium[6])]
            _fold_sum(model, module, layers, names)


def _fold_sum(model: Model, module: str, layers: Sequence[Layer], names: Sequence[str]) -> None:
    kernel = largest_kernel(layers)
    consumed = model.names(*(join(module, name) for name in names))
    model.fold_layer("repnext", module, consumed, {module: add(*(pad(layer, kernel) for layer in layers))})


def _children(model: Model, module: str, names: Sequence[str]) -> list[Layer]:
    """Return the layers of a module's children, or none if one of them is missing."""
    found = [model.layer(join(module, name)) for name in names] if module else []
    return [layer for layer in found if layer is not None] if all(layer is not None for layer in found) else []


def fold_heads(model: Model) -> None:
    """Fold a head and its twin for distillation, on the same input, whose outputs are averaged (RepNeXt, RepViT)."""
    for module in model.modules():
        paths = [join(module, name) for name in ("head", "head_dist")]
        # Those of DeiT stand on two tokens, and none behind a batch norm.
        if not module or not all(model.made_by(f"{path}.weight") == "bn_linear" for path in paths):
            continue
        one, other = (layer for layer in map(model.layer, paths) if layer is not None)
        mean = add(_halved(one), _halved(other))
        model.fold_layer("two_heads", module, model.names(*paths), {module: mean})


def _halved(layer: Layer) -> Layer:
    bias = layer.bias
    return replace(
        layer,
        rows=lambda start, stop: layer.rows(start, stop) / 2,
        bias=None if bias is None else lambda: bias() / 2,
    )


def fold_idle_channels(model: Model) -> None:
    """Fold RePaViT's feed-forward layers: Xu et al., 2025, arXiv:2505.21847.

    ``y = x + s fc2(norm2(act(fc1(norm1(x)))))``, where the activation is applied to the first channels alone. The rest
    is linear: ``fc1 = fc2[:, C:] fc1[C:] + 1``, and ``fc2``, ``fc3`` are what is left of the first C channels. The
    layer scale multiplies fc2's bias as well as its weight, which the published routine leaves out.
    """
    for module in model.modules():
        first_path, second_path, before_path, behind_path = (
            join(module, name) for name in ("fc1", "fc2", "norm1", "norm2")
        )
        said = model.first_said("repavit", module)
        if said is None and not _is_repavit(model, module):
            continue
        first, second = model.layer(first_path), model.layer(second_path)
        if first is None or second is None or not first.pointwise or not second.pointwise:
            continue
        before, behind = (model.norm(path, needed=True) for path in (before_path, behind_path))
        if before is None or behind is None:
            raise model.error(
                module,
                "has no batch norms norm1 and norm2: behind a layer norm, which takes its statistics from each "
                "input, the idle channels are not linear",
            )
        if second.out != first.width:
            raise model.error(module, f"fc1 has {first.width} inputs and fc2 {second.out} outputs: no shortcut fits")
        active = _active(model, module, first.out)
        if said is not None:
            model.use(said)
        first, second = absorb_before(before, first), absorb_before(behind, second)
        scales = model.get(join(module, "ls"))
        if scales is not None:
            if scales.shape != (second.out,):
                raise model.error(join(module, "ls"), f"is {list(scales.shape)}; [{second.out}] fits")
            second = _scaled_by(second, scales)
        rest = take_rows(first, active, first.out), replace(take_columns(second, active, first.out), bias=second.bias)
        idle = serial(*rest, channels=first.width)
        layers = {first_path: add(idle, identity(second.out, second.out, first.kernel, first.dtype))}
        if active:
            layers[second_path] = take_rows(first, 0, active)
            layers[join(module, "fc3")] = take_columns(second, 0, active)
        also = [] if scales is None else [join(module, "ls")]
        consumed = model.names(first_path, second_path, before_path, behind_path, also=also)
        model.fold_layer("repavit", module, consumed, layers)


def _is_repavit(model: Model, module: str) -> bool:
    """Whether a module holds a batch norm of the inputs of ``fc1``, and one of its outputs."""
    weight, *means = (
        model.get(join(module, name)) for name in ("fc1.weight", "norm1.running_mean", "norm2.running_mean")
    )
    if weight is None or len(weight.shape) < 2 or any(mean is None for mean in means):
        return False
    return [mean.shape for mean in means if mean is not None] == [weight.shape[1:2], weight.shape[:1]]


def _active(model: Model, module: str, hidden: int) -> int:
    """Return how many hidden channels have an activation: nothing in the file shows it."""
    said = model.first_said("repavit", module)
    if said is None or (said["idle"] is None) == (said["active"] is None):
        raise model.error(
            module,
            f"is RePaViT's, and nothing in the file shows how many of its {hidden} hidden channels have no activation: "
            "say so with --rule repavit:*,idle=0.75 (its authors' default) or active=N, or leave it with --rule keep:*",
        )
    active = said["active"]
    if active is None:
        # Where this is no whole number, the authors' models round it up, or down.
        exact = hidden * (1 - said["idle"])
        active = round(exact)
        if abs(active - exact) > 1e-6 * max(hidden, 1):
            raise model.error(module, f"{said['idle']:g} of {hidden} channels is no whole number; say active=N")
    if active > hidden:
        raise model.error(module, f"active is {active}, and there are {hidden} hidden channels")
    return int(active)


def fold_serial(model: Model) -> None:
    """Fold two layers of which a person says that they follow each other, with nothing between."""
    if not any(model.said("serial")):
        return
    for module in model.modules():
        said = model.first_said("serial", module)
        if said is None:
            continue
        paths = [join(module, said[name]) for name in ("first", "second")]
        first, second = (model.layer(path) for path in paths)
        if first is None and second is None:
            continue
        if first is None or second is None:
            missing = paths[0] if first is None else paths[1]
            raise model.error(module or "the model", f"holds no layer {missing}; narrow the rule's names")
        model.use(said)
        folded = serial(first, second, channels=said["channels"], padded=said["padding"])
        model.fold_layer("serial", module, model.names(*paths), {join(module, said["out"]): folded})
