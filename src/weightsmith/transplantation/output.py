"""A model with another one's tokenizer that is not written yet."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from weightsmith.adapters.peft_config import config_text
from weightsmith.checkpoint.checkpoint import Checkpoint, Companions, Identity
from weightsmith.checkpoint.companions import read_companion, tokenizer_files, write_companions
from weightsmith.checkpoint.folder import REPORT_FILE
from weightsmith.checkpoint.layout import Part
from weightsmith.checkpoint.storage import is_url
from weightsmith.engine.plan import RESIDENT, Plan
from weightsmith.engine.progress import ProgressListener, Silent
from weightsmith.errors import Interrupted, MethodError, PlanError
from weightsmith.plan.output import Output, parts_of
from weightsmith.tokenizer.behaviour import observe_numerals
from weightsmith.tokenizer.facts import digit_tokens
from weightsmith.tokenizer.tokenizer import LARGEST, Tokenizer, read_tokenizer
from weightsmith.transplantation.auxiliary import read_vectors
from weightsmith.transplantation.files import beside
from weightsmith.transplantation.held_out import HeldOut
from weightsmith.transplantation.layout import Layout
from weightsmith.transplantation.recipe import METHODS, SEARCHING, Recipe
from weightsmith.transplantation.report import Report, report_of
from weightsmith.transplantation.tokens import number_warning

# Numbers that no token of a whole tokenizer has, at most, beside as many as there are tokens.
_MOST_WITHOUT_TOKEN = 100_000


class Transplant(Output):
    """A model with another tokenizer: shared tokens keep their rows, those of new tokens are made as they are written.

    Attributes:
        recipe: how they are made.
        layout: where each row comes from.
    """

    def __init__(self, recipe: Recipe, model: Checkpoint, donor: Checkpoint) -> None:
        """Look at both, and decide where each row comes from.

        Reads headers and tokenizers alone, and auxiliary vectors where there are any; with ``trained_only`` also the
        embeddings and heads of both, to tell which tokens look untrained.

        Args:
            recipe: how rows are made.
            model: the model that is to have another tokenizer.
            donor: the model that has it; or a checkpoint without tensors that holds a tokenizer alone.

        Raises:
            PlanError: if the two do not fit one another, or one is not what can be worked on.
            MethodError: if the method needs what is not there.
            CheckpointError: if a file cannot be read.
        """
        self.recipe = recipe
        own, new = _tokenizer(model), _tokenizer(donor)
        vectors = None if recipe.auxiliary is None else read_vectors(recipe.auxiliary, new)
        self.layout = Layout(recipe, model, donor, own, new, vectors)
        made = {one.table.tensor.name: one.tensor for one in self.layout.tables}
        found = beside(self.layout, model, donor, recipe.chat_template)
        self._template = found.template
        self._digits = {"model": digit_tokens(own), "donor": digit_tokens(new)}
        self._names = model.name, donor.name
        numbers = None
        if not self.layout.same:
            numbers = number_warning(
                self._digits["model"],
                self._digits["donor"],
                lambda: (observe_numerals(own), observe_numerals(new)),
            )
        files = _identities(model, donor) + (vectors.identities if vectors is not None else ())
        super().__init__(
            f"{model.name} with the tokenizer of {donor.name}",
            {name: made.get(name, tensor) for name, tensor in model.items()},
            # What is read of a donor's tokenizer decides the result as weights do.
            inputs=[model, donor, Checkpoint("", {}, identities=files)],
            written={},
            companions=Companions(found.config, found.files),
            warnings=[*self.layout.notes(), *found.notes, *([numbers] if numbers else [])],
        )

    def to_yaml(self) -> str:
        """See :meth:`Output.to_yaml`."""
        return self.recipe.to_yaml()

    def parts(self) -> list[Part]:
        """See :meth:`Output.parts`."""
        return parts_of(self)

    def plan(self, **options: Any) -> Plan:
        """See :meth:`Output.plan`."""
        searches, tables = self.layout.searches, self.layout.tables
        memory = [search.memory for search in searches]
        checks = max((made.checking for made in tables), default=0)
        rows = [4 * (made.anchors or 0) * made.table.width for made in tables]
        return replace(
            super().plan(**options),
            preparing=(
                max((least for least, _ in memory), default=checks),
                max((most for _, most in memory), default=checks),
            ),
            held=max(rows, default=0) + sum(search.held for search in searches),
        )

    def prepare(self, kept: Path, *, threads: int, memory: int | None, listener: ProgressListener | None) -> None:
        """See :meth:`Output.prepare`: finds for each new token what makes it up.

        Raises:
            MethodError: if there is too little memory.
            CheckpointError: if a row cannot be read, or is not finite.
            Interrupted: on Ctrl-C; what was found before is kept.
        """
        searches = self.layout.searches
        if not searches:
            return
        room = None if memory is None else max(memory - RESIDENT, 1)
        told = listener or Silent()
        told.start(sum(search.nbytes for search in searches), len(searches), 0)
        try:
            for number, search in enumerate(searches):
                search.find(threads=threads, memory=room, listener=told, kept=kept / f"search-{number}.npz")
                told.tensor_done(search.tensor.name)
        except KeyboardInterrupt:
            raise Interrupted("stopped; what is finished is kept, and the same command goes on from there") from None
        finally:
            told.finish()

    def write_beside(self, folder: Path, plan: Plan) -> list[str]:
        """See :meth:`Output.write_beside`: config, the tokenizer's files, and the report."""
        report = self.report()
        content = {"settings": self.recipe.to_json(), **report.to_json(seconds=False)}
        # A token may hold half a character.
        (folder / REPORT_FILE).write_bytes(config_text(content).encode("utf-8", "backslashreplace"))
        notes = write_companions(folder, self.config, self.companions.files, chat_template=self._template)
        return [*notes, *report.notes()]

    def compare(self, *, threads: int | None = None) -> dict[str, dict[str, HeldOut]]:
        """Return how near each method that looks at the donor's embeddings comes to rows that are known.

        Args:
            threads: how many threads to use; by default one per core.

        Returns:
            Table -> method -> how near the rows of shared tokens come that are made as if they were new, the nearest
            first.

        Raises:
            MethodError: if the transplant's own method is none of these, so that where to look is not known.
            PlanError: if too few tokens are shared.
            CheckpointError: if a row cannot be read, or is not finite.
        """
        if not any(made.space for made in self.layout.tables):
            raise MethodError(
                "methods are compared that look at the donor's embeddings, and no new token is made by one: leave "
                "--method out"
            )
        found: dict[str, dict[str, HeldOut]] = {}
        for made in self.layout.tables:
            ways = {method: self.recipe.only(method).way(made.table.part) for method in METHODS if method in SEARCHING}
            tried = {method: made.hold_out(way, threads=threads) for method, way in ways.items()}
            known = [(method, one) for method, one in tried.items() if one is not None]
            if known:
                found[made.table.tensor.name] = dict(sorted(known, key=lambda entry: entry[1].error))
        if not found:
            raise PlanError(f"{self._names[0]} and {self._names[1]} share too few tokens to compare methods by")
        return found

    def report(self, *, search: bool = True) -> Report:
        """Return what becomes of every token.

        Args:
            search: whether to find first what makes up the new tokens, where it is not found yet; otherwise their
                residuals are left out.

        Raises:
            CheckpointError: if a row cannot be read, or is not finite.
        """
        return report_of(self.layout, *self._names, self._digits, search=search)


def _tokenizer(owner: Checkpoint) -> Tokenizer:
    if owner.is_adapter:
        raise PlanError(f"{owner.name} is an adapter: name the model that it is on, or both, as base+adapter")
    if owner.components:
        raise PlanError(
            f"{owner.name} is a pipeline of several models; name one of them: {owner.name}/{owner.components[0]}"
        )
    if owner.config.get("quantization_config"):
        raise PlanError(
            f"{owner.name} is quantised: its tensors are codes, and rows cannot be computed with them; take the model "
            "that it was made from"
        )
    tokenizer = read_tokenizer(owner.companions.files, owner.name, owner.config)
    if tokenizer is None:
        raise PlanError(
            f"{owner.name} has no tokenizer; expected tokenizer.json beside its weights, as save_pretrained of "
            "transformers writes it"
        )
    if not tokenizer.vocabulary:
        raise PlanError(f"the tokenizer of {owner.name} has no tokens")
    # Each number takes a row: a stray one must not decide how many there are.
    if tokenizer.size > 2 * len(tokenizer.tokens) + _MOST_WITHOUT_TOKEN:
        raise PlanError(
            f"the tokenizer of {owner.name} numbers tokens up to {tokenizer.size - 1:,} and has "
            f"{len(tokenizer.tokens):,} of them: it is damaged"
        )
    return tokenizer


def _identities(*owners: Checkpoint) -> tuple[Identity, ...]:
    """Return what the tokenizers' files are, as inputs that must not change while a run goes on."""
    found = []
    for owner in owners:
        for name, file in sorted(tokenizer_files(owner.companions.files).items()):
            content = read_companion(file, LARGEST)
            digest = hashlib.blake2b(content, digest_size=16).hexdigest()
            if is_url(owner.name):
                # A copy of it is in a folder of this process.
                found.append(Identity(f"{owner.name}/{name}", len(content), 0, digest))
            elif isinstance(file, Path):
                found.append(Identity(str(file), len(content), os.stat(file).st_mtime_ns, digest))
    return tuple(found)
