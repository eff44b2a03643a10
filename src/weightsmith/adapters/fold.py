"""Adapters on a base, as a lazy checkpoint: every weight is formed block by block, as it is read."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from weightsmith import dtypes
from weightsmith.adapters.adapter import Adapter, find
from weightsmith.adapters.change import Added, Change, LowRank, Rows, Whole
from weightsmith.adapters.layer import Weight
from weightsmith.adapters.layouts.normal import normalize
from weightsmith.adapters.replicated import replicated
from weightsmith.architecture.config import is_head, row_counts, tied_embeddings, tied_source, untie, with_rows
from weightsmith.architecture.stacks import role
from weightsmith.checkpoint.checkpoint import Checkpoint, Companions
from weightsmith.checkpoint.recent import RECENT, Recent
from weightsmith.checkpoint.rows import FLOAT64, read_wide, tile_rows, tiled
from weightsmith.checkpoint.tensor import Array, Tensor
from weightsmith.errors import PlanError
from weightsmith.kernels.convert import narrow

# The head of models that give each token its chance, as transformers names it.
_HEAD = "lm_head.weight"
_GENERATES = re.compile("CausalLM|LMHeadModel|ConditionalGeneration|ForMultimodal")
# Kinds of models with layers that are stored transposed.
_CONV1D = {"gpt2", "imagegpt", "openai-gpt", "decision_transformer"}
# Kinds of models that scale what a head sees where it is tied to the embeddings.
_SCALED = {"t5", "umt5", "longt5", "switch_transformers", "pop2piano"}
# Models of transformers whose experts are stored as [experts, in, out]; only square ones do not tell by their shapes.
_EXPERTS_TURNED = {"gpt_oss", "aria", "aria_text", "openai_privacy_filter"}
# Bytes for an element of a tensor that is worked on whole.
_WHOLE = 32
# Tiles of changes that cost more than a product of factors are kept for the blocks that share them, a few at a time.
_WIDER = 4
_TILES = Recent(32_000_000)


@dataclass(frozen=True)
class Term:
    """What one adapter does to a tensor.

    Attributes:
        weight: how much of it is taken: 1 for all.
        make: reads what the adapter holds, and returns the change.
        nbytes: about how many bytes the change takes.
        whole: whether it needs the whole tensor at once.
    """

    weight: float
    make: Callable[[], Change]
    nbytes: int = 0
    whole: bool = False


class FoldedTensor(Tensor):
    """A base's tensor with what adapters do to it: ``W + sum_i w_i (f_i(W) - W)``.

    Rows are formed in tiles that the shape alone decides, not the stretch asked for: a matrix product sums in an order
    of its own for every number of rows. They are formed in float64, so that the order that a machine's BLAS prefers is
    lost when the result is rounded.

    Attributes:
        base: the base's tensor.
        terms: what adapters do to it.
    """

    def __init__(self, base: Tensor, terms: Sequence[Term], *, transposed: bool = False) -> None:
        """Combine a tensor with changes.

        Args:
            base: the base's tensor; the first axis is the rows that changes speak of, or the last, if transposed.
            terms: what adapters do to it.
            transposed: whether the base stores the layer's weight as ``[in, out]``.
        """
        self.name = base.name
        self.shape = base.shape
        self.dtype = base.dtype
        self.base = base
        self.terms = tuple(terms)
        self.whole = base.whole or any(term.whole for term in terms)
        # Whole: the base, what it becomes, and what is kept of that, or more of what a method needs on its way.
        own = base.size * _WHOLE if self.whole else 0
        self.held = base.held + own + sum(term.nbytes for term in terms)
        self._transposed = transposed
        self._view = Weight(base)

    def read(self, start: int, stop: int) -> Array:
        """See :meth:`Tensor.read`; rounded to the base's dtype."""
        return narrow(self.read_wide(start, stop), self.dtype)

    def read_wide(self, start: int, stop: int) -> Array:
        """Return elements ``start`` to ``stop``, not in the base's dtype: ``[n]``, float32 (float64 if the base is)."""
        working = dtypes.working_dtype([self.dtype])
        product = self.low_rank()
        if product is not None:
            added = tiled(start, stop, product.right.shape[1], len(product.left), product.delta)
            return narrow(read_wide(self.base, start, stop) + added, working)
        changes = self._changes()
        if any(change.whole for change in changes):
            (whole,) = RECENT.get(self, lambda: (narrow(self._whole(changes).reshape(-1), working),), "whole")
            return whole[start:stop]
        return narrow(self._of_tiles(changes, start, stop), working)

    def low_rank(self) -> LowRank | None:
        """Return the product of two factors that is added, in the shape that is stored; None if it is no such product.

        Returns:
            Factors ``[rows, rank]`` and ``[rank, columns]``, of the matrix ``[first axis, everything else]``.
        """
        changes = self._changes()
        products = [change for change in changes if isinstance(change, LowRank)]
        if len(products) < len(changes):
            return None
        if len(products) == 1 and self.terms[0].weight == 1:
            return products[0]
        return RECENT.get(self, partial(self._product, products), "product")[0]

    def _product(self, products: Sequence[LowRank]) -> tuple[LowRank]:
        left = np.concatenate([one.left * term.weight for one, term in zip(products, self.terms, strict=True)], axis=1)
        right = np.concatenate([one.right for one in products])
        return (LowRank(left, right),)

    def _changes(self) -> tuple[Change, ...]:
        """Return the changes of the matrix that is stored."""
        return RECENT.get(self, lambda: tuple(self._made(term) for term in self.terms))

    def _made(self, term: Term) -> Change:
        change = term.make()
        return (change.turned() or _Turned(change)) if self._transposed else change

    def _of_tiles(self, changes: Sequence[Change], start: int, stop: int) -> Array:
        rows, width = self._view.sides
        # Rows longer than a tile, as those of experts are, are taken one at a time.
        step = tile_rows(width) * (_WIDER if tile_rows(width) > 1 else 1)

        def made(first: int) -> tuple[Array]:
            last = min(first + step, rows)
            base = read_wide(self.base, first * width, last * width).reshape(last - first, width)
            return (self._changed(changes, base, first).reshape(-1),)

        result = np.empty(stop - start)
        for first in range(start // width // step * step, -(-stop // width), step):
            (tile,) = _TILES.get(self, partial(made, first), first)
            begin, end = max(start, first * width), min(stop, first * width + len(tile))
            result[begin - start : end - start] = tile[begin - first * width : end - first * width]
        return result

    def _whole(self, changes: Sequence[Change]) -> Array:
        return self._changed(changes, self._view.matrix(), 0)

    def _changed(self, changes: Sequence[Change], base: Array, start: int) -> Array:
        if len(changes) == 1 and self.terms[0].weight == 1:
            return changes[0].rows(base, start)
        total = base.copy()
        for term, change in zip(self.terms, changes, strict=True):
            if isinstance(change, Added):
                total += term.weight * change.delta(start, start + len(base))
            else:
                total += term.weight * (change.rows(base, start) - base)
        return total


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
        sides = {module: self._sides(adapter, module) for module in adapter.modules}
        for module, known in sides.items():
            # Of a square matrix its namesakes in other layers tell, then all others, and at last the config, which PEFT
            # sets by the layer that it met last.
            alike = {sides[other] for other in sides if other.rpartition(".")[2] == module.rpartition(".")[2]}
            told = next((one for one in (alike, set(sides.values())) if len(one - {None}) == 1), {square})
            (likely,) = told - {None}
            self._add_layer(adapter, module, weight, transposed=bool(likely if known is None else known))
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

    def _add_plain(self, adapter: Adapter, name: str, tensor: Tensor, weight: float) -> None:
        if is_head(name) and name not in self._base and not adapter.saves(name):
            source = tied_source(name, self._base)
            others = set(adapter.plain) - {name}
            if source is not None and any(find(one, self._base, adapter.name) == source for one in others):
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
        return find(name, self._base, adapter.name)

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


class _Turned(Whole):
    """What a change makes of a matrix whose transpose is stored."""

    def __init__(self, change: Change) -> None:
        def whole(base: Array) -> Array:
            return np.ascontiguousarray(change.rows(np.ascontiguousarray(base.T), 0).T)

        super().__init__(whole)
        self._nbytes = change.nbytes


class _Replaced(Rows):
    """Another tensor takes the base's place."""

    def __init__(self, tensor: Tensor) -> None:
        width = tensor.size // max(tensor.shape[0], 1) if tensor.shape else 1

        def rows(base: Array, start: int) -> Array:
            return read_wide(tensor, start * width, (start + len(base)) * width).reshape(base.shape)

        super().__init__(rows)
