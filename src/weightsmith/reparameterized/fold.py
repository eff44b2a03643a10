"""Folding a model's structure: what is recognised becomes plain layers, the rest stays as it is."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from weightsmith.checkpoint.checkpoint import Checkpoint
from weightsmith.checkpoint.source import Source
from weightsmith.errors import PlanError, did_you_mean
from weightsmith.reparameterized.algebra import NotExact
from weightsmith.reparameterized.block_rules import (
    fold_chunks,
    fold_heads,
    fold_idle_channels,
    fold_positions,
    fold_rep_mixers,
    fold_serial,
)
from weightsmith.reparameterized.branch_rules import fold_branches, fold_pairs
from weightsmith.reparameterized.instructions import Given, Instruction, read_instructions
from weightsmith.reparameterized.model import EPS, Model
from weightsmith.reparameterized.result import Restructured, opened
from weightsmith.reparameterized.weight_rules import (
    fold_said_weights,
    fold_sigma_reparam,
    fold_spectral_norm,
    fold_weight_norm,
)

# Inner structure before what is made of it. Each rule may fold what an earlier one made.
RULES: tuple[Callable[[Model], None], ...] = (
    fold_weight_norm,
    fold_spectral_norm,
    fold_sigma_reparam,
    fold_said_weights,
    fold_pairs,
    fold_branches,
    fold_rep_mixers,
    fold_positions,
    fold_chunks,
    fold_serial,
    fold_heads,
    fold_idle_channels,
)

# Kind -> what it is, in the order of the rules.
KINDS = {
    "weight_norm": "weight normalisation: weight_g and weight_v, or PyTorch's parametrization",
    "spectral_norm": "spectral normalisation: weight_orig, weight_u and weight_v, or PyTorch's parametrization",
    "sigma_reparam": "sigmaReparam: sigma and spectral_normed_weight.u beside a weight",
    "compander": "Weight Compander (must be said)",
    "conditioned": "weight conditioning (must be said)",
    "stable_ssm": "StableSSM's recurrent weights (must be said)",
    "conv_bn": "a convolution and its batch norm: conv and bn or norm, c and bn, convolution and normalization",
    "bn_linear": "a batch norm and the linear layer behind it: norm and linear, bn and l",
    "repvgg": "RepVGG: rbr_dense, rbr_1x1 and rbr_identity; timm's conv_kxk, conv_1x1 and identity",
    "mobileone": "MobileOne: rbr_conv.0 …, rbr_scale and rbr_skip; timm's conv_kxk.0 …, conv_scale and identity",
    "large_kernel": "RepLKNet: lkb_origin and small_conv; timm's large_conv and small_conv",
    "repvit": "RepViT: conv, conv1 and bn of a token mixer",
    "branches": "layers side by side (must be said)",
    "repmixer": "FastViT's RepMixer: mixer, norm and layer_scale",
    "position": "FastViT's positional encoding: pe, or pos_enc",
    "repnext": "RepNeXt: conv_3_3, conv_3_w, conv_3_h, conv_2_2; conv_7_7, conv_5_3 …",
    "serial": "one layer behind another (must be said)",
    "two_heads": "a head and its twin for distillation, averaged: head and head_dist behind batch norms",
    "repavit": "RePaViT: norm1, fc1, norm2, fc2, with idle channels that must be said",
}


@dataclass(frozen=True)
class Count:
    """What one kind of rule did.

    Attributes:
        kind: the kind.
        folds: how many layers or blocks it folded.
        sources: tensors that they were.
        results: tensors that they are.
    """

    kind: str
    folds: int
    sources: int
    results: int


class FoldedModel(Restructured):
    """A model whose structure is folded: its layers are computed as they are written.

    Attributes:
        folds: what was folded.
        instructions: what a person said of it.
    """

    def __init__(self, model: Checkpoint, instructions: Sequence[Instruction] = (), dtype: str | None = None) -> None:
        """Recognise what can be folded.

        Args:
            model: the model.
            instructions: what a person says of it.
            dtype: the dtype in which floats are written; None for their own.

        Raises:
            PlanError: if nothing is recognised, an instruction is of nothing that is there, or something that is
                recognised cannot be folded exactly.
        """
        working = Model(model.name, dict(model), instructions)
        for rule in RULES:
            try:
                rule(working)
            except NotExact as error:
                raise working.error(working.place or "the model", str(error)) from None
        _check_used(working, model)
        self.instructions = tuple(instructions)
        self.folds = tuple(fold for fold in working.folds if fold.results)
        if not self.folds:
            raise _nothing(working)
        super().__init__(model, f"{model.name} (folded)", working.tensors, tuple(_warnings(working)), dtype)

    def counts(self) -> list[Count]:
        """Return what was folded, by kind."""
        counts = []
        for kind in KINDS:
            found = [fold for fold in self.folds if fold.kind == kind]
            if found:
                sources = {name for fold in found for name in fold.sources}
                counts.append(Count(kind, len(found), len(sources), sum(len(fold.results) for fold in found)))
        return counts

    def how(self) -> dict[str, Any]:
        """See :meth:`Restructured.how`."""
        return {"rules": [one.to_json() for one in self.instructions]}


def fold_model(
    model: Source,
    rules: Sequence[Given] = (),
    *,
    rules_file: str | os.PathLike[str] | None = None,
    dtype: str | None = None,
) -> FoldedModel:
    """Fold the structure of a model that is trained in another form than it is used in, lazily.

    Recognised by names and shapes are weight and spectral normalisation, sigmaReparam, batch norms behind
    convolutions, and the blocks of RepVGG, MobileOne, FastViT, RepLKNet, RepViT, RepNeXt and RePaViT. The result
    computes in evaluation mode what the model does, under the names that its authors' inference form has.

    >>> import weightsmith as ws
    >>> folded = ws.fold_model("repvgg-a0")                                       # doctest: +SKIP
    >>> folded = ws.fold_model("vit", ["repavit:*,idle=0.75", "eps:*,value=1e-6"])  # doctest: +SKIP
    >>> folded.save("out")                                                        # doctest: +SKIP

    Args:
        model: the model: a reference or a checkpoint.
        rules: what names do not show, each as ``kind:names,setting=value`` or as a mapping.
        rules_file: a YAML or JSON file of further rules.
        dtype: the dtype in which floats are written; None for their own.

    Returns:
        A checkpoint whose folded layers are computed when they are read; ``.save(path)`` writes it, ``.folds`` says
        what was folded.

    Raises:
        RecipeError: if a rule is not understood.
        PlanError: if nothing is recognised, a rule is of nothing that is there, or something cannot be folded exactly;
            the message says why.
        CheckpointError: if the model cannot be read.
    """
    instructions = read_instructions(rules, rules_file)
    return FoldedModel(opened(model), instructions, dtype)


def _check_used(working: Model, model: Checkpoint) -> None:
    for one in working.instructions:
        if id(one) not in working.used:
            names = dict.fromkeys(model) | {name.rpartition(".")[0]: None for name in model}
            raise PlanError(
                f"{working.name}: the rule {one} is of nothing that is there, or that an earlier rule left"
                f"{did_you_mean(one.names, names)}"
            )


def _warnings(working: Model) -> Iterator[str]:
    if working.norms:
        yield (
            f"batch norms are taken to add {EPS:g} to the variance (PyTorch's default; no file of weights says it): "
            f"{working.norms} of them; where a model's code has another, say so with --rule eps:*,value=…"
        )
    left = working.remaining_norms()
    if left:
        yield (
            f"{len(left)} batch norm{'s stay' if len(left) > 1 else ' stays'}, such as {left[0]}: no name shows which "
            "layer it follows; --rule conv_bn:MODULE,conv=…,norm=… says so"
        )


def _nothing(working: Model) -> PlanError:
    left = working.remaining_norms()
    also = f"; of its {len(left)} batch norms, such as {left[0]}, no name shows which layer they follow" if left else ""
    known = "; ".join(about for about in KINDS.values() if "must be said" not in about)
    return PlanError(
        f"nothing in {working.name} is recognised as a training form that folds into plain layers{also}. Looked for "
        f"are: {known}. What no name shows is said with --rule KIND:NAMES,SETTING=VALUE"
    )
