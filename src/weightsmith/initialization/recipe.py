"""How a training begins: all settings, checked."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import yaml

from weightsmith import dtypes
from weightsmith.errors import MethodError, did_you_mean, shown
from weightsmith.initialization.methods import METHODS
from weightsmith.methods.matrices import Decomposition


@dataclass(frozen=True)
class Recipe:
    """How a training begins.

    Attributes:
        base: the base's reference.
        method: ``kaiming``, ``pissa``, ``milora``, ``olora``, ``eva`` or ``corda``.
        rank: the rank.
        alpha: lora_alpha; the rank by default, so that the scale is 1.
        targets: patterns of the names of modules, or their last parts; by default all linear layers within layers.
        activations: the reference of a file of activations, or None.
        rho: of ``eva``, how much larger than the rank one layer's may become; 1 leaves all the same.
        smallest: of ``corda``, whether the smallest values are taken (``kpm``) and not the largest (``ipm``).
        decomposition: ``exact`` or ``randomized``.
        seed: of random numbers.
        dtype: the dtype of the factors.
        residual_dtype: the dtype of the base that belongs to it, where its own is not to be kept.
        trained_on: how the adapter's config names the base that it is trained on, where that is another.
        residual: whether this is that base rather than the adapter.
    """

    base: str
    method: str
    rank: int
    alpha: float | None = None
    targets: tuple[str, ...] = ()
    activations: str | None = None
    rho: float = 1.0
    smallest: bool = False
    decomposition: Decomposition = "exact"
    seed: int = 0
    dtype: str = "float32"
    residual_dtype: str | None = None
    trained_on: str | None = None
    residual: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            near = did_you_mean(self.method, METHODS) if isinstance(self.method, str) else ""
            raise MethodError(f"there is no method {shown(self.method)}{near}; there are {', '.join(METHODS)}")
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise MethodError(f"rank is {shown(self.rank)}; a whole number from 1 is needed")
        for name in ("alpha", "rho"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int | float) and 0 < value < 1e18):
                raise MethodError(f"{name} is {shown(value)}; a number above 0 is needed")
        if self.rho < 1 or (self.rho != 1 and self.method != "eva"):
            raise MethodError(f"rho is {shown(self.rho)}; it shares ranks out for eva, and is 1 or more")
        if self.smallest and self.method != "corda":
            raise MethodError("the smallest singular values are a choice of corda; milora takes them always")
        if self.activations is not None and not METHODS[self.method].data:
            raise MethodError(f"{self.method} uses no activations; eva and corda do")
        if self.decomposition not in ("exact", "randomized"):
            raise MethodError(f"decomposition is {shown(self.decomposition)}; exact or randomized is needed")
        if self.decomposition == "randomized" and (self.method not in ("pissa", "eva") or self.activations is not None):
            raise MethodError("the randomised decomposition is for pissa, and for eva without activations")
        for dtype in (self.dtype, self.residual_dtype):
            if dtype is not None and dtypes.float_from_name(dtype).itemsize < 2:
                raise MethodError(f"{dtype} is too coarse for weights to train; use float32, bfloat16 or float16")

    def to_yaml(self) -> str:
        """Return it as YAML, as a manifest keeps it."""
        content = {
            field.name: list(value) if isinstance(value := getattr(self, field.name), tuple) else value
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        }
        return yaml.safe_dump({"initialize": content}, sort_keys=False, allow_unicode=True)
