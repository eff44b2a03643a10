"""Rules for blocks of one architecture each: which children of a module become which one layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from weightsmith.reparameterized.algebra import (
    absorb,
    absorb_before,
    add,
    dilate,
    identity,
    largest_kernel,
    pad,
    serial,
    take_columns,
    take_rows,
)
from weightsmith.reparameterized.branch_rules import check_skip, scaled_by
from weightsmith.reparameterized.layer import Layer
from weightsmith.reparameterized.model import Model, join


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
        check_skip(model, module, mixer, norm.channels)
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
            change = scaled_by(change, scales)
            consumed.append(scales_name)
        folded = add(nothing, change)
        model.fold_layer("repmixer", module, consumed, {join(module, "reparam_conv"): folded})


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
            second = scaled_by(second, scales)
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
