"""Makes a report: opens what it is about, measures it in one pass, and puts the figures into rows."""

from __future__ import annotations

import time
from collections.abc import Sequence

from weightsmith import __version__, dtypes
from weightsmith.architecture.components import COMPONENTS, component
from weightsmith.architecture.stacks import analyse
from weightsmith.checkpoint.source import Source
from weightsmith.engine.memory import uncollected
from weightsmith.engine.progress import ProgressListener, Silent
from weightsmith.engine.threads import ThreadMapper, default_threads
from weightsmith.recipe.schema import Recipe
from weightsmith.report import facts
from weightsmith.report.advice import with_conclusions
from weightsmith.report.distribution import SAMPLE, SAMPLE_RULE, histograms, overlaps
from weightsmith.report.findings import Health, Nonfinite, Report, Rows, Sampling, Scoped, TensorFacts, Timing
from weightsmith.report.inputs import Inputs, find_inputs
from weightsmith.report.measure import Found, measure_all, subjects
from weightsmith.report.quantities import Quantities
from weightsmith.report.scopes import Distributions, OfTensor, Scopes
from weightsmith.report.spectra import METHOD_RULE, Choice, Spectra, choose, decompose


def report(
    *sources: Source | Recipe,
    base: Source | None = None,
    exact: bool = False,
    matrices: str | Sequence[str] | None = None,
    threads: int | None = None,
    progress: ProgressListener | None = None,
) -> Report:
    """Measure models before a merge, or a merged folder after it.

    Every weight is read once (three times more with ``exact``), and memory does not grow with the models. What is
    sampled, and how, stands in :attr:`Report.sampling`. Figures do not depend on the number of threads.

    Args:
        *sources: models, by reference or opened; or one recipe, by its file (``.yaml``) or itself; or one folder or
            file that a merge wrote.
        base: the base of the models. Without it, the first model stands in for it.
        exact: whether nothing is sampled: all entries are ranked, and all singular values computed.
        matrices: a pattern of names with ``*`` and ``?``, or several: the matrices whose singular values are computed;
            by default those of some projections in the first, middle and last layer, or of the largest matrices there.
        threads: how many threads to use; by default one per core.
        progress: told of progress.

    Raises:
        ReportError: if the report cannot be about what is named, or no matrix fits a pattern.
        CheckpointError: if a model cannot be opened or read.
        RecipeError: if the recipe is none.
        PlanError: if a step of the recipe cannot be carried out.
    """
    patterns = [matrices] if isinstance(matrices, str) else list(matrices or ())
    started = time.monotonic()
    with uncollected():
        inputs = find_inputs(sources, base)
        making = _Making(inputs, exact)
        chosen = choose(making.subjects, making.architecture, patterns)
    making.timings.append(Timing("open", time.monotonic() - started, 0))
    making.run(chosen, threads or default_threads(), progress or Silent())
    return with_conclusions(making.report())


class _Making:
    """A report that is being made: what is known of the models, and what adds up while they are read."""

    def __init__(self, inputs: Inputs, exact: bool) -> None:
        self.inputs = inputs
        self.exact = exact
        base = inputs.base.checkpoint
        models = [side.checkpoint for side in inputs.models]
        result = None if inputs.result is None else inputs.result.checkpoint
        self.architecture = analyse(base, base.config)
        self.subjects = subjects(base, models, result)
        self.labels = tuple(side.label for side in inputs.sides[1:])
        self.quantities = Quantities(self.labels, len(models))
        self.timings: list[Timing] = []
        self.sampling: list[Sampling] = []
        self.nonfinite: list[Nonfinite] = []
        self.rows: list[Rows] = []
        self.measured: list[OfTensor] = []
        self.distributions = Distributions(len(models))
        self.looked_at = self.of = 0
        self.spectra = Spectra((), ())

    def run(self, chosen: Choice, threads: int, listener: ProgressListener) -> None:
        """Read everything."""
        nbytes = sum(one.nbytes for one in self.subjects)
        more = sum(one.nbytes for one in chosen.matrices)
        listener.start(nbytes + more, len(self.subjects), 0)
        try:
            with ThreadMapper(threads, matrices=True) as mapper:
                started = time.monotonic()
                for found in measure_all(self.subjects, mapper, listener, exact=self.exact):
                    self._take(found)
                self.timings.append(Timing("read and measure", time.monotonic() - started, nbytes))
                started = time.monotonic()
                labels = self.labels[: self.quantities.voters]
                self.spectra = decompose(chosen.matrices, labels, self.architecture, mapper, listener, exact=self.exact)
                self.timings.append(Timing("singular values", time.monotonic() - started, more))
        finally:
            listener.finish()
        if self.looked_at < self.of:
            self.sampling += [
                Sampling(statistic, SAMPLE_RULE, self.looked_at, self.of, "entries")
                for statistic in ("overlap", "histogram")
            ]
        candidates = sum(one.voters > 0 and len(one.tensors[0].shape) > 1 for one in self.subjects)
        method = "" if all(one.exact for one in self.spectra.spectra) else f"; {METHOD_RULE}"
        if candidates:
            self.sampling += [
                Sampling(statistic, chosen.rule + method, len(chosen.matrices), candidates, "matrices")
                for statistic in ("spectra", "subspaces")
            ]

    def _take(self, found: Found) -> None:
        """Note what was found of a tensor."""
        subject, sides = found.subject, self.inputs.sides
        counts, layout = found.measured.counts, found.layout
        slots = subject.sides
        lost = (counts[layout.counts[name]].tolist() for name in ("nan", "infinite"))
        for side, nan, infinite in zip(slots, *lost, strict=True):
            if nan or infinite:
                self.nonfinite.append(Nonfinite(sides[side + 1].label, subject.name, subject.size, nan, infinite))
        for side, rows in found.rows.items():
            self.rows.append(
                Rows(
                    model=sides[side + 1].label,
                    tensor=subject.name,
                    rows=rows.rows,
                    dead=rows.dead,
                    first_dead=rows.first_dead,
                    duplicated=rows.duplicated,
                    first_duplicated=rows.first_duplicated,
                    new_dead=rows.new_dead,
                )
            )
        if len(subject.tensors) == 1:
            return
        fact = TensorFacts(
            name=subject.name,
            layer=facts.layer_of(self.architecture, subject.name),
            component=component(subject.name),
            shape=subject.tensors[0].shape,
            dtypes={
                sides[side + 1].label: dtypes.name_of(tensor.dtype)
                for side, tensor in zip(slots, subject.tensors, strict=True)
            },
        )
        self.measured.append(OfTensor(fact, *self.quantities.spread(layout, subject.members, found.measured)))
        if found.entries is not None:
            own = subject.members[: subject.voters]
            self.distributions.add(fact, found.entries, own, self.quantities.places_of_pairs(own))
            self.of += subject.size
            self.looked_at += subject.size if self.exact else min(subject.size, SAMPLE)

    def report(self) -> Report:
        """Put everything together."""
        inputs, quantities = self.inputs, self.quantities
        labels = self.labels[: quantities.voters]
        layers = facts.layers_of(self.architecture, [one.facts.layer for one in self.measured])
        scopes = Scopes(self.measured, layers)
        tensors = tuple(one.facts for one in scopes.tensors)
        components = {one.component for one in tensors}
        place = {one.name: number for number, one in enumerate(tensors)}
        tokens, notes = facts.vocabularies(inputs.sides)
        models = tuple(facts.describe(*pair) for pair in zip(inputs.sides, tokens, strict=True))
        return Report(
            kind=inputs.kind,
            version=__version__,
            exact=self.exact,
            base=models[0],
            base_named=inputs.base_named,
            models=models[1 : 1 + len(labels)],
            result=None if inputs.result is None else models[-1],
            layers=layers,
            components=tuple(one for one in COMPONENTS if one in components),
            tensors=tensors,
            changes=scopes.rows(quantities.changes),
            agreements=scopes.rows(quantities.agreements),
            conflicts=scopes.rows(quantities.conflict),
            overlaps=self.distributions.rows(
                ("total", "components", "layers"), layers, lambda scope, found: overlaps(scope, labels, found)
            ),
            subspaces=tuple(sorted(self.spectra.subspaces, key=lambda row: place[row.tensor])),
            spectra=tuple(sorted(self.spectra.spectra, key=lambda row: place[row.tensor])),
            histograms=self.distributions.rows(
                ("total", "components"), layers, lambda scope, found: histograms(scope, labels, found)
            ),
            health=Health(
                nonfinite=tuple(self.nonfinite),
                rows=tuple(self.rows),
                differences=tuple(facts.differences(inputs.sides)),
                tokens=tuple(facts.token_differences(inputs.sides, tokens)),
            ),
            composition=Scoped() if inputs.restacked else scopes.rows(quantities.composition),
            recipe=inputs.recipe,
            merged=inputs.merged,
            sampling=tuple(self.sampling),
            timings=tuple(self.timings),
            notes=(*inputs.notes, *facts.note_on_dtypes(inputs.base), *notes),
        )
