"""Adapters on a base, as a lazy checkpoint: every weight is formed block by block, as it is read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from weightsmith import dtypes
from weightsmith.adapters.adapter import Adapter, Names
from weightsmith.adapters.change import LowRank, Rows, Whole
from weightsmith.adapters.folded import FoldedTensor, Term
from weightsmith.adapters.kinds.low_rank import factors_of_experts
from weightsmith.adapters.layer import Weight
from weightsmith.adapters.layouts.normal import normalize
from weightsmith.adapters.replicated import replicated
from weightsmith.architecture.config import is_head, row_counts, tied_embeddings, tied_source, untie, with_rows
from weightsmith.architecture.stacks import role
from weightsmith.checkpoint.checkpoint import Checkpoint, Companions
from weightsmith.checkpoint.recent import RECENT
from weightsmith.checkpoint.rows import FLOAT64, read_wide
from weightsmith.checkpoint.tensor import Array, Tensor
from weightsmith.errors import PlanError

# The head of models that give each token its chance, as transformers names it.
_HEAD = "lm_head.weight"
_GENERATES = re.compile("CausalLM|LMHeadModel|ConditionalGeneration|ForMultimodal")
# Kinds of models with layers that are stored transposed.
_CONV1D = {"gpt2", "imagegpt", "openai-gpt", "decision_transformer"}
# Kinds of models that scale what a head sees where it is tied to the embeddings.
_SCALED = {"t5", "umt5", "longt5", "switch_transformers", "pop2piano"}
# Models of transformers whose experts are stored as [experts, in, out]; only square ones do not tell by their shapes.
_EXPERTS_TURNED = {"gpt_oss", "aria", "aria_text", "openai_privacy_filter"}
# What follows a tensor's name in those of its scales, where a model is quantised: in blocks of FP8, bitsandbytes.
_SCALES = ("_scale_inv", "_scale", "_scale_2", ".absmax")


def fold(
    base: Checkpoint,
    adapters: Checkpoint | Sequence[Checkpoint],
    weights: Sequence[float] | None = None,
    *,
    name: str | None = None,
) -> Checkpoint:
    """Fold adapters into their base, lazily.

    Of several, each one's change is formed on the base alone, and their weighted sum is added to it: the order in which
    they are named makes no difference.

    Args:
        base: the model.
        adapters: one adapter, or several, of any kinds that are known; see docs/guide/adapters.md.
        weights: how much of each is taken; 1 by default.
        name: the result's name.

    Returns:
        The base with the adapters' changes in every tensor that they are for; the rest is the base's own.

    Raises:
        CheckpointError: if an adapter is of a kind that cannot be folded, or does not fit its own config.
        PlanError: if the base lacks a tensor that an adapter changes, or it has another shape.
    """
    if base.is_adapter:
        raise PlanError(f"{base.name} is an adapter itself: name the model that it was trained on as the base")
    given = [adapters] if isinstance(adapters, Checkpoint) else list(adapters)
    shares = [1.0] * len(given) if weights is None else list(weights)
    folding = _Folding(replicated(base, given))
    for adapter, share in zip(given, shares, strict=True):
        folding.add(Adapter(normalize(adapter, base)), share)
    files = dict(base.companions.files)
    for adapter in given:
        files |= adapter.companions.files
    return Checkpoint(
        name or "+".join([base.name, *(adapter.name for adapter in given)]),
        folding.tensors(),
        Companions(folding.config, files),
        base.identities + tuple(identity for adapter in given for identity in adapter.identities),
        base.components,
    )


class _Folding:
    """The changes of several adapters, by tensor of the base."""

    def __init__(self, base: Checkpoint) -> None:
        self._base = base
        self._names = Names(base)
        self.config: Mapping[str, Any] = base.config
        self._terms: dict[str, list[Term]] = {}
        self._transposed: dict[str, bool] = {}
        # Tensors that the base holds under another name alone: a head that is its embeddings.
        self._untied: dict[str, str] = {}
        # Tensors that take another shape with an adapter that brings them whole.
        self._longer: dict[str, Tensor] = {}

    def add(self, adapter: Adapter, weight: float) -> None:
        """Add an adapter's changes."""
        adapter.bind(self._base)
        # Tables that tokens were added to, and whose longer form the adapter changes, come first.
        longer = [name for name in adapter.plain if self._lengthens(adapter, name)]
        for name in longer:
            self._add_plain(adapter, name, adapter.plain[name], weight)
        square = adapter.transposed or self.config.get("model_type") in _EXPERTS_TURNED
        sides = {module: self._sides(adapter, module) for module in adapter.modules if module not in adapter.experts}
        alike: dict[str, set[bool]] = {}
        for module, known in sides.items():
            alike.setdefault(module.rpartition(".")[2], set()).update(() if known is None else (known,))
        anywhere = set().union(*alike.values())
        for module, known in sides.items():
            # Of a square matrix its namesakes in other layers tell, then all others, and at last the config, which PEFT
            # sets by the layer that it met last.
            told = next((one for one in (alike[module.rpartition(".")[2]], anywhere) if len(one) == 1), {square})
            (likely,) = told
            self._add_layer(adapter, module, weight, transposed=bool(likely if known is None else known))
        for module in adapter.experts:
            self._add_experts(adapter, module, weight)
        for name, tensor in adapter.plain.items():
            if name not in longer:
                self._add_plain(adapter, name, tensor, weight)
        for name, (places, rows) in adapter.tokens.items():
            # PEFT trains a tied head's rows with those of the embeddings, and may save them with both.
            tied = is_head(name) and name not in self._base and tied_source(name, self._base) is not None
            if not tied or len(adapter.tokens) == 1:
                self._add_tokens(adapter, name, places, rows, weight)

    def tensors(self) -> dict[str, Tensor]:
        """Return the result's tensors."""
        tensors: dict[str, Tensor] = dict(self._base)
        tensors |= self._longer
        for name, source in self._untied.items():
            tensors[name] = self._source(source)
        for name, terms in self._terms.items():
            tensors[name] = FoldedTensor(self._source(name), terms, transposed=self._transposed.get(name, False))
        if self._longer:
            self._count_rows(tensors)
        return tensors

    def _count_rows(self, tensors: Mapping[str, Tensor]) -> None:
        """Have the config say how many rows its tables of tokens have now."""
        counts = set(row_counts(self.config))
        tables = {
            name: (self._base[self._untied.get(name, name)].shape[0], tensor.shape[0])
            for name, tensor in tensors.items()
            if name in self._longer
            or ((is_head(name) or role(name) == "embedding") and tensor.shape and tensor.shape[0] in counts)
        }
        self.config, _ = with_rows(self.config, tables)

    def _source(self, name: str) -> Tensor:
        own = self._untied.get(name, name)
        return self._longer[own] if own in self._longer else self._base[own]

    def _lengthens(self, adapter: Adapter, name: str) -> bool:
        """Whether an adapter brings a table that it changes as well, with more rows than the base's."""
        module = name.removesuffix(".weight")
        if module not in adapter.modules or (is_head(name) and name not in self._base):
            return False
        return self._source(self._target(adapter, name)).shape != adapter.plain[name].shape

    def _sides(self, adapter: Adapter, module: str) -> bool | None:
        """Return whether a layer is stored transposed, where its shape tells: None if both ways fit, or neither."""
        weight = self._source(self._target(adapter, adapter.weight_name(module, self._base)))
        if len(weight.shape) != (3 if adapter.of_experts(module, weight) else 2):
            return None
        if any("embedding" in part for part in adapter.modules[module]):
            # Embeddings are stored one way, whatever the config says of layers.
            return False
        straight, turned = (adapter.fits(module, Weight(weight, transposed=side)) for side in (False, True))
        # In a model without such layers, what fits the wrong way round is an adapter of another model.
        kind = self._base.config.get("model_type")
        may_be = adapter.transposed or kind is None or kind in _CONV1D or len(weight.shape) == 3
        return None if straight == turned or (turned and not may_be) else turned

    def _add_layer(self, adapter: Adapter, module: str, weight: float, *, transposed: bool) -> None:
        target = self._target(adapter, adapter.weight_name(module, self._base))
        tensor = self._source(target)
        if not dtypes.is_float(tensor.dtype):
            raise PlanError(f"{adapter.name} changes {target}, which is {dtypes.name_of(tensor.dtype)}, not weights")
        if not tensor.size:
            raise PlanError(
                f"{adapter.name} changes {target}, which is {list(tensor.shape)} in {self._base.name}: empty"
            )
        side = transposed and len(tensor.shape) == 2
        turned = side or (transposed and adapter.of_experts(module, tensor))
        layer = adapter.layer(module, Weight(tensor, transposed=turned))
        if self._transposed.setdefault(target, side) != side:
            raise PlanError(f"{adapter.name} takes {target} as stored transposed, and another adapter does not")
        kind = adapter.kind
        if not kind.bias_alone:
            elements = (
                sum(part.size for part in layer.parts.values()) if kind.elements is None else kind.elements(layer)
            )
            whole = kind.whole(layer) if callable(kind.whole) else kind.whole
            # Rows of a layer stored transposed are its columns.
            whole |= side and kind.by_rows
            make = partial(kind.function, layer)
            term = Term(weight * adapter.times(module), make, elements * FLOAT64.itemsize, whole)
            self._terms.setdefault(target, []).append(term)
            if not kind.with_head:
                self._keep_head(adapter, target)
        if adapter.kind.changes_bias is None or not adapter.kind.changes_bias(layer):
            return
        assert kind.bias is not None
        bias = re.sub(r"weight$", "bias", target)
        if bias not in self._base:
            if not kind.needs_bias or not kind.bias(layer, np.zeros(layer.rows)).any():
                return
            raise PlanError(
                f"{adapter.name} changes the bias of {module}, and {self._base.name} has no {bias}: a layer without "
                "a bias cannot take it"
            )
        if self._base[bias].shape != (layer.rows,):
            raise PlanError(
                f"{adapter.name} changes the bias of {module}, {layer.rows} numbers, and {self._base.name} has {bias} "
                f"as {list(self._base[bias].shape)}"
            )

        def changed(column: Array) -> Array:
            assert adapter.kind.bias is not None
            return adapter.kind.bias(layer, column[:, 0])[:, None]

        self._terms.setdefault(bias, []).append(Term(weight, lambda: Whole(changed)))

    def _add_experts(self, adapter: Adapter, module: str, weight: float) -> None:
        """Add a change of a parameter that experts are joined to when they are loaded, to each of them."""
        joined = adapter.experts[module]
        layer = adapter.layer(module, Weight(joined))
        nbytes = sum(part.size for part in layer.parts.values()) * FLOAT64.itemsize

        def product(expert: int, first: int, last: int) -> LowRank:
            # One of the factors is stored with the experts side by side: all are read at once, and kept for the others.
            left, right = RECENT.get(layer, lambda: factors_of_experts(layer))
            return LowRank(left[expert, first:last], right[expert])

        for number, tensors in enumerate(joined.experts):
            first = 0
            for tensor in tensors:
                self._check_codes(adapter, tensor.name)
                last = first + tensor.shape[0]
                term = Term(weight, partial(product, number, first, last), nbytes)
                self._terms.setdefault(tensor.name, []).append(term)
                if self._transposed.setdefault(tensor.name, False):
                    raise PlanError(
                        f"{adapter.name} changes {tensor.name}, which another adapter takes as stored transposed"
                    )
                first = last

    def _add_plain(self, adapter: Adapter, name: str, tensor: Tensor, weight: float) -> None:
        if is_head(name) and name not in self._base and not adapter.saves(name):
            source = tied_source(name, self._base)
            others = set(adapter.plain) - {name}
            if source is not None and any(self._names.find(one, adapter.name) == source for one in others):
                # Saved with the embeddings that it is tied to.
                return
        target = self._target(adapter, name)
        own = self._source(target)
        if own.shape != tensor.shape:
            if weight == 1 and own.shape[1:] == tensor.shape[1:] and target not in self._terms:
                self._longer[target] = tensor
                return
            raise PlanError(
                f"{adapter.name} brings {target} as {list(tensor.shape)}, and {self._base.name} has it as "
                f"{list(own.shape)}"
            )
        self._terms.setdefault(target, []).append(Term(weight, lambda: _Replaced(tensor)))
        if adapter.saves(name):
            self._keep_head(adapter, target)

    def _add_tokens(self, adapter: Adapter, name: str, places: tuple[int, ...], rows: Tensor, weight: float) -> None:
        """Put trained rows in their places in the embeddings, and in the head where it is tied to them."""
        target = self._target(adapter, name)
        own = self._source(target)
        if own.shape[1:] != rows.shape[1:] or max(places) >= own.shape[0]:
            raise PlanError(
                f"{adapter.name} brings row {max(places)} of {target} with {rows.shape[1]} columns, and "
                f"{self._base.name} has it as {list(own.shape)}"
            )
        self._terms.setdefault(target, []).append(
            Term(weight, lambda: _with_rows(places, rows), rows.size * FLOAT64.itemsize)
        )

    def _target(self, adapter: Adapter, name: str) -> str:
        """Return the name in the result of a tensor that an adapter changes."""
        if is_head(name) and name not in self._base:
            source = tied_source(name, self._base)
            if source is not None:
                self._untie(adapter, name, source)
                return name
        found = self._names.find(name, adapter.name)
        self._check_codes(adapter, found)
        return found

    def _check_codes(self, adapter: Adapter, target: str) -> None:
        """Refuse a tensor of the base that holds codes of a quantised model: what is added means nothing to them."""
        quantised = self._base.config.get("quantization_config")
        tensor = self._base[target]
        scales = [target + end for end in _SCALES] + [target.removesuffix("weight") + "scale_weight"]
        narrow = bool(quantised) and dtypes.is_float(tensor.dtype) and tensor.dtype.itemsize < 2
        if narrow or any(name in self._base for name in scales):
            raise PlanError(
                f"{adapter.name} changes {target}, which is quantised in {self._base.name}: it holds codes "
                f"({dtypes.name_of(tensor.dtype)}), not weights; fold into the model that it was made from"
            )

    def _keep_head(self, adapter: Adapter, target: str) -> None:
        """Give a head of its own to a model whose head is its embeddings, where an adapter changes those alone."""
        classes = self.config.get("architectures")
        generates = isinstance(classes, list) and any(_GENERATES.search(str(one)) for one in classes)
        if generates and tied_embeddings(self.config) and tied_source(_HEAD, self._base) == target:
            self._untie(adapter, _HEAD, target)

    def _untie(self, adapter: Adapter, head: str, source: str) -> None:
        if self.config.get("model_type") in _SCALED:
            raise PlanError(
                f"{adapter.name} changes one of {head} and {source}, which are one table in {self._base.name}; models "
                f"of the kind {self.config['model_type']} scale what a tied head sees, so that two tables would "
                "compute something else: it cannot be folded exactly"
            )
        self._untied[head] = source
        self.config = untie(self.config)


def _with_rows(places: tuple[int, ...], given: Tensor) -> Rows:
    """Return a change in which some rows are replaced by others: ``[len(places), columns]``."""
    order = np.argsort(places)
    at = np.asarray(places)[order]
    new = read_wide(given, 0, given.size).reshape(given.shape)[order]

    def rows(base: Array, start: int) -> Array:
        first, last = np.searchsorted(at, (start, start + len(base)))
        changed = base.copy()
        changed[at[first:last] - start] = new[first:last]
        return changed

    return Rows(rows, [new, at])


class _Replaced(Rows):
    """Another tensor takes the base's place."""

    def __init__(self, tensor: Tensor) -> None:
        width = tensor.size // max(tensor.shape[0], 1) if tensor.shape else 1

        def rows(base: Array, start: int) -> Array:
            return read_wide(tensor, start * width, (start + len(base)) * width).reshape(base.shape)

        super().__init__(rows)
