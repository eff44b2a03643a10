"""Which row of each of a model's tables comes from where, once it has another tokenizer: from headers alone."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from weightsmith.checkpoint.checkpoint import Checkpoint
from weightsmith.checkpoint.gathered import ZERO, Origins, gathered
from weightsmith.checkpoint.tensor import Tensor
from weightsmith.errors import MethodError, PlanError
from weightsmith.tokenizer.matching import Numbers
from weightsmith.tokenizer.tokenizer import Tokenizer
from weightsmith.transplantation.auxiliary import Vectors
from weightsmith.transplantation.combination import Combinations
from weightsmith.transplantation.held_out import HeldOut, hold_out, memory_of
from weightsmith.transplantation.new_rows import Combined, Drawn, Mapped, MeanRow
from weightsmith.transplantation.recipe import METHODS, SEARCHING, Recipe, Way
from weightsmith.transplantation.search import Search, Shared, of_model
from weightsmith.transplantation.subword import subword
from weightsmith.transplantation.tables import Table, donor_of, donor_tables, find_tables
from weightsmith.transplantation.tokens import Matches, match_tokens
from weightsmith.transplantation.trained import Untrained, find_untrained

# Tensors that the rows of a result are taken of.
_MODEL, _MADE, _MEAN = range(3)


@dataclass(frozen=True, eq=False)
class Made:
    """A table of the result.

    Attributes:
        table: the model's table.
        tensor: the result's.
        rows: how many tokens it has rows for.
        matches: where the rows of tokens come from.
        way: how those of new tokens are made.
        search: what finds of what they are made, where the donor's tokens are searched.
        averaged: how many new tokens take the mean of all rows, though another way was asked for: where the donor's
            token has no row, or its text no pieces.
        space: where the donor's tokens lie, and which of them are shared; None where the way does not look there.
    """

    table: Table
    tensor: Tensor
    rows: int
    matches: Matches
    way: Way
    search: Search | None = None
    averaged: int = 0
    space: Space | None = None

    @property
    def anchors(self) -> int | None:
        """How many tokens new ones could be made of; None where the way takes none."""
        return None if self.space is None else len(self.space.shared.donor)

    @property
    def checking(self) -> int:
        """About how many bytes :attr:`held_out` takes."""
        return 0 if self.space is None else memory_of(self.space.donor, self.table, self.space.shared)

    @cached_property
    def held_out(self) -> HeldOut | None:
        """The same as :meth:`hold_out` by its own way."""
        return self.hold_out()

    def hold_out(self, way: Way | None = None, *, threads: int | None = None) -> HeldOut | None:
        """Make shared tokens again as if they were new; see :func:`weightsmith.transplantation.held_out.hold_out`.

        Args:
            way: another way than its own.
            threads: how many threads to use; by default one per core.

        Returns:
            How near they come; None for a bias, where the donor's space is not searched, or too few tokens are shared.

        Raises:
            CheckpointError: if a row cannot be read, or is not finite.
        """
        if self.space is None or self.table.is_bias:
            return None
        return hold_out(way or self.way, self.space.donor, self.table, self.space.shared, threads=threads)


@dataclass(frozen=True, eq=False)
class Space:
    """Where a donor's tokens lie, ``[V, d]``, and which tokens are shared."""

    donor: Tensor
    shared: Shared


@dataclass(frozen=True, eq=False)
class _Making:
    """How a table's new rows are made: ``tensor`` has a row for each of ``targets``, ``averaged`` take the mean."""

    targets: Numbers
    tensor: Tensor | None
    averaged: Numbers
    search: Search | None = None
    space: Space | None = None


_NONE = np.zeros(0, np.int64)


class Layout:
    """Where the rows of the result come from.

    Attributes:
        own: the model's tokenizer.
        new: the donor's.
        same: whether each token has the number that it had: nothing is to be done then.
        tables: the tables of the result.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: Checkpoint,
        donor: Checkpoint,
        own: Tokenizer,
        new: Tokenizer,
        vectors: Vectors | None,
    ) -> None:
        """Look at tokens and tables.

        Args:
            recipe: how rows are made.
            model: the model.
            donor: the donor, with or without tensors.
            own: the model's tokenizer.
            new: the donor's.
            vectors: where the donor's tokens lie instead of its embeddings.

        Raises:
            PlanError: if the two do not fit one another.
            MethodError: if the method needs what is not there.
            CheckpointError: if a file cannot be read.
        """
        self.own, self.new = own, new
        self._recipe, self._donor, self._vectors = recipe, donor, vectors
        self._own_tables = find_tables(model, own.size)
        self._spaces = donor_tables(donor, new.size)
        self._check_head(model)
        self._untrained: Untrained | None = None
        self._known: dict[Hashable, Matches] = {}
        self._searches: dict[Hashable, Search] = {}
        self.same = all(self._matches(table).is_identity(own) for table in self._own_tables)
        if recipe.trained_only and not self.same:
            self._untrained = find_untrained(self._own_tables, self._spaces, own, new)
            self._known.clear()
        self.tables = [self._laid_out(table) for table in self._own_tables]

    def notes(self) -> list[str]:
        """Return what a person should know."""
        both = (self.own, self.new)
        found = [f"the tokenizer of {one.owner} is {note}" for one in both for note in one.notes]
        if self.same:
            return [*found, f"{self.own.owner} has these tokens already, under the same numbers: no row is made"]
        for made in self.tables:
            if made.averaged:
                lacking = "pieces" if made.way.method == "subword" else "row in the donor"
                found.append(
                    f"{made.table.tensor.name}: {made.averaged:,} of {len(made.matches.new):,} new tokens have no "
                    f"{lacking}, and take the mean of all rows"
                )
        return found

    @property
    def searches(self) -> list[Search]:
        """What is to be found before rows can be made."""
        return list(self._searches.values())

    def _laid_out(self, table: Table) -> Made:
        matches, way, rows = self._matches(table), self._recipe.way(table.part), self._rows(table)
        tensor = table.tensor
        shape = (rows, *tensor.shape[1:]) if table.axis == 0 else (1, rows)
        if self.same:
            kept = gathered(tensor.name, [tensor], Origins.first(rows, table.rows), shape, tensor.dtype)
            return Made(table, tensor if rows == table.rows else kept, rows, matches, way)
        making = self._making(table, way, matches)
        source, row = np.full(rows, ZERO, np.int64), np.zeros(rows, np.int64)
        copied = np.flatnonzero(matches.model >= 0)
        source[copied], row[copied] = _MODEL, matches.model[copied]
        source[making.targets], row[making.targets] = _MADE, np.arange(len(making.targets))
        source[making.averaged] = _MEAN
        mean = MeanRow(table, self._own_rows(table))
        tensors = [tensor, mean if making.tensor is None else making.tensor, mean]
        made = gathered(tensor.name, tensors, Origins(source, row), shape, tensor.dtype)
        averaged = 0 if way.method == "mean" else len(making.averaged)
        return Made(table, made, rows, matches, way, making.search, averaged, making.space)

    def _rows(self, table: Table) -> int:
        """Return how many rows a table has in the result."""
        rows = table.rows if self.same else self.new.size
        if self._recipe.keep_size:
            rows = max(rows, table.rows)
        multiple = self._recipe.pad_to_multiple_of or 1
        return -(-rows // multiple) * multiple

    def _own_rows(self, table: Table) -> Numbers:
        """Return the numbers of the model's tokens that have rows: others say nothing of tokens."""
        return np.array([number for number in self.own.tokens if number < table.rows], np.int64)

    def _matches(self, table: Table) -> Matches:
        recipe = self._recipe
        byte_match, prefix_match = recipe.matches_bytes(table.part), recipe.matches_prefixes(table.part)
        key = (byte_match, prefix_match, table.rows)
        if key not in self._known:
            found = match_tokens(self.new, self.own, table.rows, byte_match=byte_match, prefix_match=prefix_match)
            if self._untrained is not None:
                found = found.without(self._untrained.model, self._untrained.donor)
            self._known[key] = found
        return self._known[key]

    def _making(self, table: Table, way: Way, matches: Matches) -> _Making:
        new = matches.new
        if way.method == "zero" or not len(new):
            return _Making(_NONE, None, _NONE)
        if way.method == "mean" or (table.is_bias and way.method in ("random", "gaussian", "landmark_pca")):
            return _Making(_NONE, None, new)
        if way.method in ("random", "gaussian"):
            tokens = [self.new.tokens[number] for number in new.tolist()]
            return _Making(new, Drawn(table, tokens, self._own_rows(table), way), _NONE)
        if way.method == "subword":
            return self._of_pieces(table, way, new)
        return self._searched(table, way, matches)

    def _of_pieces(self, table: Table, way: Way, new: Numbers) -> _Making:
        found = subword(self.new, self.own, new, table.rows, pieces=way.pieces, part=table.part)
        cut = (found.anchors >= 0).any(1)
        made = Combinations(found.anchors[cut], found.weights[cut], found.residual[cut])
        return _Making(new[cut], Combined(table, len(made), of_model(made)), new[~cut])

    def _searched(self, table: Table, way: Way, matches: Matches) -> _Making:
        vectors = self._vectors or self._rows_of_donor(table, way)
        new = matches.new
        known = vectors.known[new]
        anchors = matches.anchors[vectors.known[matches.anchors]]
        self._check_anchors(way, anchors)
        if not known.any():
            return _Making(_NONE, None, new)
        shared = Shared(anchors, matches.model[anchors])
        space = Space(vectors.tensor, shared)
        if way.method == "landmark_pca":
            return _Making(new[known], Mapped(table, vectors.tensor, shared, new[known]), new[~known], None, space)
        # A tied donor's embeddings are searched once, for embeddings and head.
        key = (way, id(vectors.tensor), id(matches))
        search = self._searches.setdefault(key, Search(way, vectors.tensor, shared, new[known]))
        made = Combined(table, int(known.sum()), search.find, shared.model if way.centred else None)
        return _Making(new[known], made, new[~known], search, space)

    def _rows_of_donor(self, table: Table, way: Way) -> Vectors:
        tensor = donor_of(table.tensor.name, self._spaces[table.part])
        if tensor is not None:
            return Vectors(tensor, np.arange(self.new.size) < tensor.shape[0])
        others = ", ".join(method for method in METHODS if method not in SEARCHING)
        raise PlanError(
            f"{self._donor.name} has a tokenizer and no embeddings, and {way.method} compares tokens by those: name a "
            f"model as donor, give vectors of its tokens (--auxiliary), or choose another method: {others}"
        )

    def _check_anchors(self, way: Way, anchors: Numbers) -> None:
        needed = way.atoms if way.method == "omp" else 1
        if len(anchors) >= needed:
            return
        if not len(anchors):
            raise PlanError(
                f"{self.new.owner} and {self.own.owner} share no token by its text, and {way.method} makes new tokens "
                "of those that they share: choose --method subword or mean"
            )
        raise MethodError(
            f"each new token is to be made of {needed:,} anchors, and {self.new.owner} and {self.own.owner} share "
            f"{len(anchors):,} tokens: give --atoms {len(anchors)} or less"
        )

    def _check_head(self, model: Checkpoint) -> None:
        if self._recipe.head_method is None or any(table.part == "head" for table in self._own_tables):
            return
        raise MethodError(
            f"{model.name} has no head of its own (none, or one tied to the embeddings): leave --head-method out"
        )
