"""The kinds of adapters that are known, each one small function: a layer in, what becomes of its weight out."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

from weightsmith.adapters.change import Change
from weightsmith.adapters.forms import Form
from weightsmith.adapters.layer import Layer
from weightsmith.adapters.settings import Setting
from weightsmith.checkpoint.tensor import Array
from weightsmith.errors import CheckpointError, did_you_mean, shown

# The modules of weightsmith.adapters.kinds, in the order in which pages list them.
_FAMILIES = (
    "low_rank",
    "factors",
    "shared_factors",
    "squares",
    "vectors",
    "products",
    "scalings",
    "multiplied",
    "elementwise",
    "singular",
    "rotations",
    "transforms",
    "circular",
    "blocks",
    "branches",
    "sparse",
    "sparse_deltas",
    "slices",
    "spectrum",
    "wavelets",
    "subspaces",
    "replaced",
    "extracted",
)


def _nothing(layer: Layer) -> Change:
    raise NotImplementedError


@dataclass(frozen=True)
class Parameterization:
    """A kind of adapter; also the decorator by which its function is registered.

    Attributes:
        peft_type: how configs name it.
        title: how people name it.
        forms: the ways in which its tensors are laid out; the first that fits decides.
        source: where it is published.
        shared: the parts that all layers share.
        settings: the keys of its config that bear on the weights.
        refuses: keys of its config -> why no plain weights equal an adapter in which they are set.
        aliases: other names of parts -> the names that the forms use.
        renames: patterns of names as authors' files have them -> the same names as the forms expect them.
        places: the parts that hold places (integers) instead of weights.
        whole: whether a layer needs its whole weight at once (a :class:`~weightsmith.adapters.change.Whole`).
        lacking: what to do about a file without parts that whoever wrote it may have left out.
        check: looks at a layer before anything is read, and raises a CheckpointError where shapes do not fit that the
            forms cannot tell.
        changes_bias: whether a layer of this adapter changes its bias as well.
        bias: returns the new bias ``[out]`` for the old one, float64.
        needs_bias: whether a layer whose bias changes must have one.
        bias_alone: whether it changes biases, and no weights.
        with_head: whether a head that is tied to the embeddings changes with them.
        may_be_empty: whether a part may hold nothing.
        ignored: first words of parts that bear on training alone.
        elements: returns about how many numbers a layer's change holds, where they are more than its parts'.
        by_rows: whether a change is formed by rows alone, so that a layer stored transposed needs its whole weight.
        variant: the kind that configs name, and the key of theirs that makes it this one.
        function: returns what becomes of a layer's weight. It is called when the weight is first read; what a header
            shows was checked before.
    """

    peft_type: str
    title: str
    _: KW_ONLY
    forms: tuple[Form, ...]
    source: str
    shared: tuple[str, ...] = ()
    settings: tuple[Setting, ...] = ()
    refuses: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    renames: Mapping[str, str] = field(default_factory=dict)
    places: tuple[str, ...] = ()
    whole: Callable[[Layer], bool] | bool = False
    lacking: str = ""
    check: Callable[[Layer], None] | None = None
    changes_bias: Callable[[Layer], bool] | None = None
    bias: Callable[[Layer, Array], Array] | None = None
    needs_bias: bool = True
    bias_alone: bool = False
    with_head: bool = False
    may_be_empty: bool = False
    ignored: tuple[str, ...] = ()
    elements: Callable[[Layer], int] | None = None
    by_rows: bool = False
    variant: tuple[str, str] | None = None
    function: Callable[[Layer], Change] = _nothing

    def __call__(self, function: Callable[[Layer], Change]) -> Callable[[Layer], Change]:
        """Register a kind, as a decorator of its function."""
        known = _known.get(self.peft_type)
        if known is not None and known.function.__module__ != function.__module__:
            raise ValueError(f"two kinds of adapters are named {self.peft_type}")
        _known[self.peft_type] = replace(self, function=function)
        return function

    @property
    def parts(self) -> set[str]:
        """All parts that a layer may have."""
        return {part for form in self.forms for part in form.names}

    @property
    def about(self) -> str:
        """What it is: the function's docstring."""
        return inspect.getdoc(self.function) or ""


_known: dict[str, Parameterization] = {}
# As a decorator's name.
parameterization = Parameterization


def all_parameterizations() -> Mapping[str, Parameterization]:
    """Return all kinds of adapters by the names that configs have for them."""
    for family in _FAMILIES:
        importlib.import_module(f"weightsmith.adapters.kinds.{family}")
    return _known


def get_parameterization(owner: str, config: Mapping[str, Any]) -> Parameterization:
    """Return a kind of adapter.

    Args:
        owner: the adapter's name, for errors.
        config: the parsed ``adapter_config.json``, whose ``peft_type`` names the kind.

    Raises:
        CheckpointError: if the kind is not known, or no plain weights equal such an adapter.
    """
    known = all_parameterizations()
    peft_type: object = config.get("peft_type")
    for kind in known.values():
        if kind.variant is not None and kind.variant[0] == peft_type and config.get(kind.variant[1]):
            return kind
    if peft_type is None:
        raise CheckpointError(f"{owner} is no adapter: it has no adapter_config.json with a peft_type")
    if not isinstance(peft_type, str) or peft_type not in known:
        name = peft_type[:40] if isinstance(peft_type, str) else shown(peft_type)
        if name in NOT_WEIGHTS:
            raise CheckpointError(
                f"{owner} is an adapter of the kind {name}, which no plain weights equal: {NOT_WEIGHTS[name]}"
            )
        if name in NOT_IN_FILE:
            raise CheckpointError(
                f"{owner} is an adapter of the kind {name}, whose file does not hold all that its weights are made "
                f"from: {NOT_IN_FILE[name]}. Merge it with PEFT (merge_and_unload) where it was trained"
            )
        raise CheckpointError(
            f"{owner} is an adapter of the kind {name}, of which nothing is known{did_you_mean(name, known)}; known "
            f"are {', '.join(sorted(known))}"
        )
    return known[peft_type]


_ACTIVATION = (
    "a non-linear function stands between its down and up projections (one without such a function is of the kind "
    "BOTTLENECK, and folds)"
)
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
    "LILY": "a router mixes its experts anew for every input",
    "SHADOW": "a network of its own runs beside the model, and adds to the states between its layers",
    "ADAPTFORMER": f"{_ACTIVATION}; it stands beside a whole MLP block",
    "ADAPTERTUNE": f"{_ACTIVATION}; it stands behind a whole block",
    "VL_ADAPTER": _ACTIVATION,
    "COMPACTER": _ACTIVATION,
    "DOPAMINE": "a gate opens and closes its neurons anew for every input; of a neuron, only the gain would fold",
}
# Kinds of PEFT that equal plain weights, which their files do not tell.
NOT_IN_FILE = {
    "PSOFT": (
        "its frozen factors are found anew from the base by a singular value decomposition, and the signs of singular "
        "vectors, on which the weights depend, are whatever the machine's library makes them"
    ),
    "ADAMSS": (
        "the rows that each of its subspaces changes are found anew from the base, by clustering a random projection "
        "of it"
    ),
}
