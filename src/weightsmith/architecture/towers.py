"""Parts of a larger model that are models themselves: the text tower of a vision-language model, say."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from weightsmith.architecture.stacks import analyse
from weightsmith.errors import PlanError

# What recipes call a module -> prefixes under which models keep it. The first that a model has is taken.
_MODULES: dict[str, tuple[str, ...]] = {
    "text_decoder": ("model.language_model.", "language_model.", "text_model.", "model.text_model."),
    "language_model": ("model.language_model.", "language_model."),
    "text_model": ("text_model.", "model.text_model."),
    "vision_tower": ("model.vision_tower.", "vision_tower.", "model.visual.", "visual.", "vision_model."),
    "vision_model": ("vision_model.", "model.vision_model.", "model.vision_tower.", "vision_tower."),
    "multi_modal_projector": (
        "model.multi_modal_projector.",
        "multi_modal_projector.",
        "model.visual.merger.",
        "visual.merger.",
    ),
    "encoder": ("encoder.", "model.encoder."),
    "decoder": ("decoder.", "model.decoder."),
    "shared": ("shared.",),
}
# Where models of one kind hide the same tensors.
_WRAPPERS = ("", "model.", "transformer.", "text_model.", "language_model.", "language_model.model.", "bert.", "vit.")


def tower(names: Iterable[str], module: str) -> str:
    """Return the prefix of the tensors that a module consists of.

    Args:
        names: the tensors' names of the whole model.
        module: a name that recipes use (``text_decoder``, ``vision_tower``, ``encoder`` …), or a prefix of
            names, with or without its last dot.

    Raises:
        PlanError: if no tensor lies under any such prefix; the prefixes that hold layers are listed.
    """
    names = tuple(names)
    for prefix in (*_MODULES.get(module, ()), module if module.endswith((".", "/")) else f"{module}."):
        if any(name.startswith(prefix) for name in names):
            return prefix
    component = f"{module}/"
    if any(name.startswith(component) for name in names):
        return component
    known = ", ".join(sorted({stack.prefix.rsplit(".", 1)[0] for stack in analyse(names).stacks})) or "none"
    raise PlanError(
        f"there is no module {module!r}: no tensor's name begins with it; parts that hold layers are: {known}. "
        "Give the module's prefix"
    )


def match_tower(prefix: str, names: Sequence[str], other: Iterable[str], reference: str) -> str:
    """Return the prefix under which another model keeps the tensors of a module.

    Args:
        prefix: the module's prefix in the output.
        names: the module's names without it.
        other: the other model's names.
        reference: how a person names the other model, for errors.

    Raises:
        PlanError: if no prefix of the other model matches any name.
    """
    theirs = set(other)
    candidates = dict.fromkeys([prefix, *_WRAPPERS])
    # Wherever the other model has a name that ends as one of ours does, what stands before is a candidate.
    probe = next((name for name in names if analyse([name]).stacks), names[0] if names else "")
    candidates |= dict.fromkeys(name.removesuffix(probe) for name in theirs if probe and name.endswith(probe))
    scores = {candidate: sum(candidate + name in theirs for name in names) for candidate in candidates}
    best = max(scores, key=lambda candidate: scores[candidate])
    if scores[best] == 0:
        raise PlanError(
            f"no tensor of {reference} matches the module under {prefix!r}, as {names[0] if names else '?'}; "
            "say with prefix: what the names begin with in that model"
        )
    return best
