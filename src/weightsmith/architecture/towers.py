"""Parts of a larger model that are models themselves: the text tower of a vision-language model, say.

A tower is a prefix of names, and for some modules a second one outside it: the head of most text towers lies beside
the larger model (``model.language_model.layers.0…`` and ``lm_head.weight``).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

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
# Models whose text tower is not wrapped (the first Qwen2-VL layout): layers right under ``model`` are the text's.
_UNWRAPPED = {"text_decoder": "model.", "language_model": "model."}
# How a head's names begin, and what stands before the part of the model that it is beside.
_HEAD = ("lm_head.", re.compile(r"^(?P<outer>(.*?[./])?)(model|transformer|shared)[./]"))
# What else belongs to a module, as mergekit divides models: how its names begin, and the prefix it is beside.
_BESIDE = {
    "text_decoder": _HEAD,
    "language_model": _HEAD,
    "shared": _HEAD,
    "multi_modal_projector": ("deepstack_merger_list.", re.compile(r"^(?P<outer>(.*[./])?)merger\.$")),
}


@dataclass(frozen=True)
class Tower:
    """Where a model keeps the tensors of a module.

    Attributes:
        prefix: what the names of its tensors begin with.
        beside: what the module calls those that lie outside the prefix: how that begins; empty for none.
        outer: what stands before it in the model.
    """

    prefix: str
    beside: str = ""
    outer: str = ""

    @classmethod
    def under(cls, prefix: str, module: str, names: Iterable[str]) -> Tower:
        """Return the tower of a module that a model keeps under a prefix, with what lies beside it.

        Args:
            prefix: what the names of its tensors begin with.
            module: what recipes call it.
            names: the names of the whole model.
        """
        beside, enclosing = _BESIDE.get(module, ("", None))
        match = enclosing.match(prefix) if enclosing else None
        # A tower that is a whole model has its head inside.
        if match is None or any(name.startswith(prefix + beside) for name in names):
            return cls(prefix)
        return cls(prefix, beside, match["outer"])

    @property
    def prefixes(self) -> tuple[str, ...]:
        """All that names of its tensors may begin with."""
        return (self.prefix, self.outer + self.beside) if self.beside else (self.prefix,)

    def name(self, inner: str) -> str:
        """Return the model's name of the tensor that the module calls ``inner``."""
        outside = self.beside and inner.startswith(self.beside)
        return (self.outer if outside else self.prefix) + inner

    def inner(self, name: str) -> str | None:
        """Return what the module calls a tensor of the model, or None where it is none of the module's."""
        if self.beside and name.startswith(self.outer + self.beside):
            return name.removeprefix(self.outer)
        return name.removeprefix(self.prefix) if name.startswith(self.prefix) else None


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
    plain = [module] if module.endswith((".", "/")) else [f"{module}.", f"{module}/"]
    for prefix in (*_MODULES.get(module, ()), *plain):
        if any(name.startswith(prefix) for name in names):
            return prefix
    unwrapped = _UNWRAPPED.get(module)
    if unwrapped and f"{unwrapped}layers" in {stack.prefix for stack in analyse(names).stacks}:
        return unwrapped
    raise PlanError(
        f"there is no module {module!r}: no tensor's name begins with it; parts that hold layers are: "
        f"{_parts(names)}. Give the module's prefix"
    )


def match_tower(prefix: str, names: Sequence[str], other: Iterable[str], reference: str) -> str:
    """Return the prefix under which another model keeps the tensors of a module: the one that fits most names.

    Args:
        prefix: the module's prefix in the output; of prefixes that fit equally well it is preferred.
        names: the module's names without it.
        other: the other model's names.
        reference: how a person names the other model, for errors.

    Raises:
        PlanError: if no prefix of the other model fits any name, or several fit equally well.
    """
    other = tuple(other)
    scores = _fits(names, other)
    best = [candidate for candidate, score in scores.items() if score == max(scores.values())]
    if prefix in best:
        return prefix
    if not best:
        raise PlanError(
            f"no tensor of {reference} matches the module under {prefix!r}, as {names[0] if names else '?'}; "
            f"its parts that hold layers are: {_parts(other)}. "
            "Say with prefix: what the names begin with in that model"
        )
    if len(best) > 1:
        shown = ", ".join(map(repr, best[:6])) + (" …" if len(best) > 6 else "")
        raise PlanError(
            f"{reference} has {len(best)} parts that match the module under {prefix!r} equally well: "
            f"{shown}; say with prefix: which one is meant"
        )
    return best[0]


def _fits(names: Iterable[str], other: Iterable[str]) -> Counter[str]:
    """Count, for every prefix in the other model, the module's names that follow it there."""
    wanted = frozenset(names)
    scores: Counter[str] = Counter()
    for name in other:
        cuts = [0, *(i + 1 for i, letter in enumerate(name) if letter in "./")]
        scores.update(name[:cut] for cut in cuts if name[cut:] in wanted)
    return scores


def _parts(names: Iterable[str]) -> str:
    return (
        ", ".join(sorted({stack.prefix.rpartition(".")[0] or stack.prefix for stack in analyse(names).stacks}))
        or "none"
    )
