"""How an adapter is taken out of a fine-tune: all settings, checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from weightsmith.adapters.codes import QUANTIZERS, Quantizer
from weightsmith.errors import MethodError, did_you_mean, shown
from weightsmith.extraction.ranks import Ranks
from weightsmith.methods.matrices import Decomposition

Kind = Literal["lora", "sparse", "sign", "quantized"]
KINDS: tuple[Kind, ...] = ("lora", "sparse", "sign", "quantized")
Scope = Literal["tensor", "model"]


@dataclass(frozen=True)
class Recipe:
    """How an adapter is taken out of a fine-tune.

    Attributes:
        finetuned: the fine-tune's reference.
        base: the base's reference.
        kind: ``lora``; ``sparse``: the entries of largest magnitude; ``sign``: a bit per weight and a scale; or
            ``quantized``: a few bits per weight.
        rank: see :class:`Ranks`; of ``sparse``, the rank of the LoRA that has as many parameters.
        energy: see :class:`Ranks`.
        effective_rank: see :class:`Ranks`.
        budget: see :class:`Ranks`.
        max_rank: see :class:`Ranks`.
        dora: whether a LoRA has a magnitude for every row.
        decomposition: ``exact`` or ``randomized``.
        density: of ``sparse``, the share of entries that is kept.
        scope: of ``sparse``, whether that is the share of each tensor or of the model.
        bits: of ``quantized``, bits per entry.
        quantizer: of ``quantized``, how levels lie: ``linear``, ``log2`` or ``tanh``.
        dtype: the dtype in which factors and values are kept; None for that of the fine-tune.
        only_matrices: whether changed tensors are left out that are not taken apart.
        whole: patterns of the names of tensors to keep whole.
        exclude: patterns of the names of tensors to leave out.
        rename: for modules that are named otherwise where the adapter is loaded: ``PATTERN=REPLACEMENT``, Python's
            regular expressions, applied to every name in their order.
    """

    finetuned: str
    base: str
    kind: Kind = "lora"
    rank: int | None = None
    energy: float | None = None
    effective_rank: bool = False
    budget: int | None = None
    max_rank: int | None = None
    dora: bool = False
    decomposition: Decomposition = "exact"
    density: float | None = None
    scope: Scope = "tensor"
    bits: int | None = None
    quantizer: Quantizer | None = None
    dtype: str | None = None
    only_matrices: bool = False
    whole: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    rename: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._check_choice("kind", KINDS)
        self._check_choice("decomposition", ("exact", "randomized"))
        self._check_choice("scope", ("tensor", "model"))
        for name in ("effective_rank", "dora", "only_matrices"):
            if not isinstance(getattr(self, name), bool):
                raise MethodError(f"{name} is {shown(getattr(self, name))}; true or false is needed")
        self._check_given()
        if self.kind == "lora":
            rule = self.ranks
            if self.decomposition == "randomized" and rule.needs_spectra and (rule.effective or rule.most is None):
                raise MethodError(
                    "the randomised decomposition finds some leading singular values, and "
                    + (
                        "the effective rank needs all: use the exact one"
                        if rule.effective
                        else "not how many there are: give max_rank"
                    )
                )
        elif self.kind == "sparse":
            if (self.density is None) == (self.rank is None):
                raise MethodError("of a sparse adapter, give either density, or rank for PEFT's SHiRA")
            if self.density is not None and not _is_share(self.density):
                raise MethodError(
                    f"density is {shown(self.density)}; a share above 0 and up to 1 is needed, such as 0.05"
                )
            if self.rank is not None:
                Ranks(self.rank)
                if self.scope == "model":
                    raise MethodError(
                        "SHiRA has as many entries in every matrix as its rank says; scope model needs density"
                    )
        elif self.kind == "quantized":
            if self.quantizer is None or self.bits is None:
                raise MethodError(
                    f"of a quantized adapter, give bits, such as 4, and quantizer, one of {', '.join(QUANTIZERS)}"
                )
            self._check_choice("quantizer", QUANTIZERS)
            least = 3 if self.quantizer == "log2" else 1
            if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not least <= self.bits <= 8:
                raise MethodError(
                    f"bits is {shown(self.bits)}; {self.quantizer} needs a whole number from {least} to 8"
                )

    @property
    def ranks(self) -> Ranks:
        """The rule by which ranks are chosen, of the kind ``lora``."""
        return Ranks(self.rank, self.energy, self.effective_rank, self.budget, self.max_rank)

    @property
    def for_peft(self) -> bool:
        """Whether the adapter is one that PEFT loads."""
        return self.kind == "lora" or (self.kind == "sparse" and self.rank is not None)

    def to_json(self) -> dict[str, Any]:
        """Return the settings that are not the default."""
        return {
            field.name: list(value) if isinstance(value := getattr(self, field.name), tuple) else value
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        }

    def to_yaml(self) -> str:
        """Return it as YAML, as the adapter's manifest keeps it."""
        return yaml.safe_dump({"extract": self.to_json()}, sort_keys=False, allow_unicode=True)

    def _check_given(self) -> None:
        """Refuse settings that mean nothing for the kind."""
        meant = {
            "lora": {"rank", "energy", "effective_rank", "budget", "max_rank", "dora", "decomposition"},
            "sparse": {"density", "scope", "rank"},
            "sign": set(),
            "quantized": {"bits", "quantizer"},
        }
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name in set().union(*meant.values()) - meant[self.kind]:
            if getattr(self, name) != defaults[name]:
                raise MethodError(f"{name} means nothing for the kind {self.kind}")

    def _check_choice(self, name: str, choices: Sequence[str]) -> None:
        value = getattr(self, name)
        if value is None:
            return
        if value not in choices:
            near = did_you_mean(value, choices) if isinstance(value, str) else ""
            raise MethodError(f"{name} is {shown(value)}; one of {', '.join(choices)} is needed{near}")


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1
