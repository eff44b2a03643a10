"""The kinds of adapters that are known, each one small function: a layer in, what becomes of its weight out."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from weightsmith.adapters.change import Change
from weightsmith.adapters.forms import Form
from weightsmith.adapters.layer import Layer
from weightsmith.adapters.settings import Setting
from weightsmith.checkpoint.tensor import Array
from weightsmith.errors import CheckpointError, did_you_mean, shown

# The modules of weightsmith.adapters.kinds, in the order in which pages list them.
_FAMILIES = ("low_rank", "extracted")


@dataclass(frozen=True)
class Parameterization:
    """A kind of adapter.

    Attributes:
        peft_type: how configs name it.
        title: how people name it.
        function: returns what becomes of a layer's weight. It is called when the weight is first read; what a header
            shows was checked before.
        forms: the ways in which its tensors are laid out; the first that fits decides.
        shared: the parts that all layers share.
        settings: the keys of its config that bear on the weights.
        refuses: keys of its config -> why no plain weights equal an adapter in which they are set.
        aliases: other names of parts -> the names that the forms use.
        places: the parts that hold places (integers) instead of weights.
        whole: whether a layer needs its whole weight at once (a :class:`~weightsmith.adapters.change.Whole`).
        check: looks at a layer before anything is read, and raises a CheckpointError where shapes do not fit that the
            forms cannot tell.
        changes_bias: whether a layer of this adapter changes its bias as well.
        bias: returns the new bias ``[out]`` for the old one, float64.
        source: where it is published.
    """

    peft_type: str
    title: str
    function: Callable[[Layer], Change]
    forms: tuple[Form, ...]
    shared: tuple[str, ...] = ()
    settings: tuple[Setting, ...] = ()
    refuses: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    places: tuple[str, ...] = ()
    whole: Callable[[Layer], bool] | bool = False
    check: Callable[[Layer], None] | None = None
    changes_bias: Callable[[Layer], bool] | None = None
    bias: Callable[[Layer, Array], Array] | None = None
    source: str = ""

    @property
    def parts(self) -> set[str]:
        """All parts that a layer may have."""
        return {part for form in self.forms for part in form.names}

    @property
    def about(self) -> str:
        """What it is: the function's docstring."""
        return inspect.getdoc(self.function) or ""


_known: dict[str, Parameterization] = {}


def parameterization(
    peft_type: str,
    title: str,
    *,
    forms: tuple[Form, ...],
    source: str,
    shared: tuple[str, ...] = (),
    settings: tuple[Setting, ...] = (),
    refuses: Mapping[str, str] | None = None,
    aliases: Mapping[str, str] | None = None,
    places: tuple[str, ...] = (),
    whole: Callable[[Layer], bool] | bool = False,
    check: Callable[[Layer], None] | None = None,
    changes_bias: Callable[[Layer], bool] | None = None,
    bias: Callable[[Layer, Array], Array] | None = None,
) -> Callable[[Callable[[Layer], Change]], Callable[[Layer], Change]]:
    """Register a kind of adapter; the arguments are the attributes of :class:`Parameterization`."""

    def register(function: Callable[[Layer], Change]) -> Callable[[Layer], Change]:
        if peft_type in _known and _known[peft_type].function.__module__ != function.__module__:
            raise ValueError(f"two kinds of adapters are named {peft_type}")
        _known[peft_type] = Parameterization(
            peft_type,
            title,
            function,
            forms,
            shared,
            settings,
            refuses or {},
            aliases or {},
            places,
            whole,
            check,
            changes_bias,
            bias,
            source,
        )
        return function

    return register


def all_parameterizations() -> Mapping[str, Parameterization]:
    """Return all kinds of adapters by the names that configs have for them."""
    for family in _FAMILIES:
        importlib.import_module(f"weightsmith.adapters.kinds.{family}")
    return _known


def get_parameterization(owner: str, peft_type: object) -> Parameterization:
    """Return a kind of adapter.

    Args:
        owner: the adapter's name, for errors.
        peft_type: what its config says.

    Raises:
        CheckpointError: if the kind is not known, or no plain weights equal such an adapter.
    """
    known = all_parameterizations()
    if peft_type is None:
        raise CheckpointError(f"{owner} is no adapter: it has no adapter_config.json with a peft_type")
    if not isinstance(peft_type, str) or peft_type not in known:
        kind = peft_type[:40] if isinstance(peft_type, str) else shown(peft_type)
        reason = NOT_WEIGHTS.get(kind)
        if reason is not None:
            raise CheckpointError(f"{owner} is an adapter of the kind {kind}, which no plain weights equal: {reason}")
        raise CheckpointError(
            f"{owner} is an adapter of the kind {kind}, of which nothing is known{did_you_mean(kind, known)}; known "
            f"are {', '.join(sorted(known))}"
        )
    return known[peft_type]


_PROMPT = "it adds virtual tokens to the input, and leaves the weights as they are"
# Kinds of PEFT and others that change what a model computes, and not by its weights alone.
NOT_WEIGHTS = {
    "PROMPT_TUNING": _PROMPT,
    "MULTITASK_PROMPT_TUNING": _PROMPT,
    "P_TUNING": _PROMPT,
    "PREFIX_TUNING": "it adds keys and values to the attention's cache, and leaves the weights as they are",
    "CPT": _PROMPT,
    "CARTRIDGE": "it adds keys and values to the attention's cache, and leaves the weights as they are",
    "ADAPTION_PROMPT": "it adds attended tokens behind a gate to the attention, and leaves the weights as they are",
    "XLORA": "a gate mixes its experts anew for every token",
    "POLY": "a router mixes its skills anew for every task",
}
