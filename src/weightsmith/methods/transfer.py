"""Arithmetic on task vectors between bases, and interpolation between two models."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from weightsmith.errors import MethodError
from weightsmith.methods.block import Array, Block, Scope, Statistic
from weightsmith.methods.registry import Param, PerModel, TrimScope, method
from weightsmith.methods.statistics import totals


@method(
    base="required",
    minimum=2,
    maximum=2,
    roles=("the model to change", "the source's fine-tune", "the source's base"),
    properties=("translates",),
    also=("analogy", "chat_vector", "fine_tuning_transfer", "re_adapt"),
    source="Ilharco et al., Editing models with task arithmetic, ICLR 2023, arXiv:2212.04089 (analogies); "
    "Huang et al., Chat Vector, ACL 2024, arXiv:2310.04799; Lin et al., Efficient model development through "
    "fine-tuning transfer, EMNLP 2025, arXiv:2503.20110; Fleshman and Van Durme, RE-Adapt, 2024, arXiv:2405.15007",
)
def transfer(
    block: Block,
    *,
    lambda_: Annotated[float, Param("factor on the source's change")] = 1.0,
    target_share: Annotated[float, Param("factor on how the target differs from the source's base")] = 1.0,
) -> Array:
    """What fine-tuning changed in one model, added to another: a is to b as c is to the result.

    With the target T as base_model, and the source's fine-tune F and the source's base S as the models, in this order:
    ``T + lambda (F - S)``. So an instruction-tuned model's change goes onto a further pre-trained one (Chat Vector),
    onto the next version of its base (fine-tuning transfer), or onto another task's model (analogy).

    RE-Adapt with partial adaptation scales the knowledge as well: the target is S further trained on documents, and the
    result ``S + lambda (F - S) + target_share (T - S)``; the paper's default for either is 0.5. Its low-rank form
    truncates the instruction's change: see the method that is also known as ``lore_adapt``.

    Several sources are added one after another, in steps, or, where all have T's own base, by ``task_arithmetic``,
    whose negative weights take a change out (negation). Files beside the weights come from the target. Where the
    fine-tune has more tokens, ``on_shape_mismatch: pad`` gives the others rows of zeros, as the authors of fine-tuning
    transfer do, and the fine-tune's tokenizer belongs to the result; Chat Vector leaves embeddings and head of a target
    with another vocabulary alone, which ``on_shape_mismatch: base`` does.
    """
    fine_tuned, source = block.models
    result = block.base + lambda_ * (fine_tuned - source)
    return result if target_share == 1.0 else result + (target_share - 1.0) * (block.base - source)


@method(
    base="required",
    minimum=1,
    maximum=1,
    properties=("idempotent", "translates"),
    also=("wise_ft", "mi", "bang"),
    source="Wortsman et al., Robust fine-tuning of zero-shot models, CVPR 2022, arXiv:2109.01903 (WiSE-FT); Wu et al., "
    "Revisiting model interpolation for efficient reasoning, 2025, arXiv:2510.10977 (MI)",
)
def interpolate(
    block: Block,
    *,
    lambda_: Annotated[float, Param("0 is the base, 1 the model; beyond them it extrapolates")] = 0.5,
) -> Array:
    """The straight line between the base and one model.

    ``B + lambda (W - B)``, every tensor alike, heads included. WiSE-FT's base is the zero-shot model, its default half
    way; MI's is an Instruct model, the other a Thinking model, and lambda, which has no default there, sets how long
    answers think: the paper finds three stages along it. BANG is WiSE-FT with a fine-tune that was trained not to be
    more certain than the base, by label smoothing or Mixup, which no merge can make up for. Goedel-Prover-V2 averages
    the model that a stage began from with what came of it in the same way. At lambda 0 and 1 the result is exactly the
    base and the model.
    """
    if lambda_ == 1.0:
        # Not base + delta, which is rounded; where the base is not finite, neither is the result, as everywhere.
        return block.models[0] + 0.0 * block.base
    return block.base + lambda_ * block.deltas[0]


# Linear layers are all that the authors mix; these tensors stay as they were before RLHF.
_NOT_LINEAR = ("embedding", "norm")


@method(
    base="required",
    minimum=1,
    maximum=1,
    properties=("idempotent", "translates"),
    also=("hma", "adaptive_model_averaging"),
    source="Lin et al., Mitigating the alignment tax of RLHF, EMNLP 2024, arXiv:2309.06256 (adaptive, in later "
    "versions heterogeneous model averaging), with ratios that are given",
)
def ama(
    block: Block,
    *,
    ratio: Annotated[float, Param("share of the base, the model before RLHF, in this tensor's group of layers")] = 0.2,
    mean_ratio: Annotated[float, Param("the same for the head: the mean over the groups")] = 0.2,
    mixed: Annotated[Literal["linear", "all"], Param("which tensors are mixed")] = "linear",
) -> Array:
    """Average of a model before RLHF, the base, and after it, with a ratio for each group of layers.

    ``a_k B + (1 - a_k) W``: mind that a_k weighs the model *before*. Embeddings and norms stay the base's, the head
    takes mean_ratio (the authors also try 0), all else is taken for linear layers. With ``mixed: all``, embeddings
    and norms are mixed by ratio too, as the authors' script for fixed groups does. Ratios may lie outside 0 and 1, as
    theirs may. Groups are conditions in the recipe, here three of a model of 26 layers:

        parameters:
          mean_ratio: 0.2
          ratio:
          - {scope: {layers: [0, 9]}, value: 0.3}
          - {scope: {layers: [9, 17]}, value: 0.2}
          - {scope: {layers: [17, 26]}, value: 0.1}
          - {value: 0.2}

    The paper finds the ratios by training them, with their mean held at 0.2; that search is not part of the merge.
    """
    share = mean_ratio if block.role == "head" else ratio
    if mixed == "linear" and block.role in _NOT_LINEAR:
        share = 1.0
    return block.base + (1.0 - share) * block.deltas[0]


def _mean_importance(scope: Scope) -> Statistic[float | None]:
    """Return the mean of the old model's importances over all entries that have one; None without any.

    Raises:
        MethodError: if models have importances, and the base has none.
    """
    if not scope.fishers:
        return None

    def sums(block: Block) -> list[Any]:
        fisher, xp = block.base_fisher, block.xp
        if fisher is None:
            return [0.0, 0]
        return [xp.sum(xp.astype(fisher, xp.float64)), xp.count_nonzero(fisher == fisher)]

    total, count = yield from totals(sums)
    if not count:
        raise MethodError("bcwi weighs the old model by its own importances: give base_fisher, not those of a model")
    return total / count


@method(
    base="required",
    minimum=1,
    statistic=_mean_importance,
    scope="fisher_scope",
    fisher="optional",
    properties=("symmetric", "translates"),
    source="Schumann et al., Backward compatibility during data updates by weight interpolation, EACL 2024, "
    "arXiv:2301.10546",
    example={"alpha": 0.5},
)
def bcwi(
    block: Block,
    mean_importance: float | None,
    *,
    alpha: Annotated[
        float, Param("share of the base, the old model: 1 is the old one, 0 the new", minimum=0, maximum=1)
    ],
    fisher_scope: Annotated[TrimScope, Param("what the mean of the importances, to be 1, is taken over")] = "model",
) -> Array:
    """Between an old model, the base, and what retraining made of it, so that fewer answers turn wrong.

    ``alpha B + (1 - alpha) W``: mind that alpha weighs the *old* model. W is the mean of the models that are given
    (the paper's multi variant has up to 16 retrained ones). Where the base has a Fisher checkpoint (``base_fisher``;
    of its own predictions, one example at a time), its entries count by their importance F, divided by the mean of all:
    ``(alpha F B + (1 - alpha) W) / (alpha F + 1 - alpha)``; where that is 0/0, the old weight stays. Tensors without
    importances count as F = 1.

    alpha has no default: the paper takes, from 0 to 1 in steps of 0.1 (with Fisher denser near 1), the one with the
    fewest negative flips whose accuracy is still the new model's. The authors leave buffers at the old values: give
    those ``{filter: running_, value: 1.0}``. Rows of new labels in the head they copy from the new model; with
    ``on_shape_mismatch: first`` or a rule of its own the whole head is one model's.
    """
    new = sum(block.deltas[1:], block.deltas[0]) / len(block.deltas)
    if mean_importance is None or block.base_fisher is None:
        return block.base + (1.0 - alpha) * new
    xp = block.xp
    kept = alpha * (block.base_fisher / mean_importance if mean_importance > 0 else 0.0 * block.base_fisher)
    divisor = kept + (1.0 - alpha)
    share = (1.0 - alpha) / xp.where(divisor == 0, xp.ones_like(divisor), divisor)
    return block.base + share * new


_CAI = "Cai et al., Robust weight signatures, ICML 2023, arXiv:2302.12480"


def _changes(models: Sequence[Array]) -> list[Array]:
    """Return what clean and corrupted training changed, of the pretrained, the clean and the corrupted models."""
    pretrained, *others = models
    return [one - pretrained for one in others]


def _signatures(models: Sequence[Array], ratios: Sequence[float]) -> list[Array]:
    clean, *robust = _changes(models)
    return [one - ratio * clean for one, ratio in zip(robust, ratios, strict=True)]


def _projections(scope: Scope) -> Statistic[list[float]]:
    """Return how much of each corruption's change lies along the clean one: ``<d_c, a> / <a, a>``, or 0."""

    def products(block: Block) -> list[Any]:
        xp = block.xp
        clean, *robust = (xp.astype(change, xp.float64) for change in _changes(block.models))
        return [xp.sum(clean * clean), *(xp.sum(change * clean) for change in robust)]

    length, *along = yield from totals(products)
    ratios = [product / length if length > 0 else 0.0 for product in along]
    # What is not finite stays in its entry.
    return [ratio if math.isfinite(ratio) else 0.0 for ratio in ratios]


def _only_signatures_weigh(parameters: Mapping[str, Any]) -> None:
    if any(one is not None for one in parameters["weight"][:2]):
        raise MethodError(
            "weight is the strength of one corruption's signature; the pretrained and the clean model have none: "
            "give it under the models from the third on, or alpha for all of them together"
        )


@method(
    base="required",
    minimum=3,
    roles=(
        "the model to patch",
        "the pretrained model",
        "the model trained on clean data",
        "models trained on corrupted data",
    ),
    statistic=_projections,
    check=_only_signatures_weigh,
    properties=("translates",),
    also=("robust_weight_signatures",),
    source=_CAI,
)
def rws(
    block: Block,
    ratios: list[float],
    *,
    alpha: Annotated[float, Param("strength of the patch, shared evenly by the signatures")] = 1.0,
    weight: PerModel[Annotated[float | None, Param("strength of this corruption's signature alone")]] = (None,),
    squared: Annotated[bool, Param("square every strength, as the authors' code does")] = False,
) -> Array:
    """Robustness against corruptions, patched onto a model: robust weight signatures.

    Of the pretrained model P, the model S that was trained from it on clean data, and C_c, trained from it on data with
    the corruption c, the signature is, per tensor, what C_c changed but for its part along what S changed:
    ``s_c = d_c - (<d_c, a> / <a, a>) a`` with ``d_c = C_c - P`` and ``a = S - P``. The result is
    ``T + sum_c alpha_c s_c``. The target T, base_model, is any clean model of that architecture, also of other data; to
    patch S itself, name it as the base and again among the models. alpha_c is ``alpha / K`` of K signatures, or that
    model's weight. Negative strengths take a patch off again, exactly but for rounding.

    In the authors' code strengths act twice, before the projection and in the sum, so each enters as its square,
    ``(alpha / K)^2``; with one signature and alpha 1 that is the same, with several it is what was run
    (``squared: true``).

    The authors patch the first seven convolutions alone, of a ResNet the first blocks: set alpha by conditions,
    ``{filter: layer1, value: 1.0}`` and ``{value: 0.0}``. Batch norms become the mean of the corrupted models', by a
    rule: ``{filter: bn, merge_method: linear, models: [{model: C_1}, {model: C_2}], parameters: {weight: 1}}``. Their
    running statistics the authors re-estimate on corrupted data, and they quantise stored signatures; neither is done
    here. ``rws_signature`` gives a signature by itself.
    """
    strengths = [alpha / len(ratios) if one is None else one for one in weight[2:]]
    result = block.base
    for strength, signature in zip(strengths, _signatures(block.models, ratios), strict=True):
        result = result + (strength * strength if squared else strength) * signature
    return result


@method(
    minimum=3,
    maximum=3,
    roles=("the pretrained model", "the model trained on clean data", "the model trained on corrupted data"),
    statistic=_projections,
    source=_CAI,
)
def rws_signature(block: Block, ratios: list[float]) -> Array:
    """One robust weight signature by itself: a difference of weights, not a model.

    ``d - (<d, a> / <a, a>) a`` per tensor, as for ``rws``. It is to be kept, compared, and added to models:
    ``linear`` with ``normalize: false`` and weights 1 and alpha puts it on, 1 and -alpha takes it off.
    """
    return _signatures(block.models, ratios)[0]
