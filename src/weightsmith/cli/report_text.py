"""``weightsmith report --text``: what a report found, on a terminal of any width, or in a pipe.

Nothing needs colour to be read. Names come from files, so they are made safe first, and never read as markup.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from weightsmith.cli.tables import can_write, fitting_tables, heading, paragraph, print_piece, short_label
from weightsmith.cli.terminal import printable
from weightsmith.cli.units import size
from weightsmith.report.findings import Agreement, Change, Composition, Finding, Model, Overlap, Report
from weightsmith.report.wording import cosine_text, counted, listed, percent

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

# Eight heights of a bar, from the least value of a row to the largest; digits where they cannot be written.
_BARS, _DIGITS = "▁▂▃▄▅▆▇█", "01234567"
# Bars in a row: more layers share one, which has the largest of their values.
_WIDEST = 24
# Pairs and models beyond these are counted; --json and the page have them all.
_MOST_PAIRS = 15
_LONGEST_NAME = 44
_LEVELS = {
    "error": ("ERROR", "bold red"),
    "warning": ("WARNING", "yellow"),
    "note": ("NOTE", ""),
    "good": ("GOOD", "green"),
}
# The share of the largest entries that overlaps are shown at.
_TOP = 0.05


def print_report(report: Report, console: Console | None = None) -> None:
    """Print a report: models, tables, findings and, last, advice.

    Args:
        report: with its conclusions.
        console: where to; standard output if it is not given.
    """
    if console is None:
        from rich.console import Console

        console = Console()
    bars = _BARS if can_write(console.encoding, _BARS) else _DIGITS
    for section in _SECTIONS:
        for piece in section(report, bars, console.width):
            print_piece(piece, console)


def _short(number: int) -> str:
    """Write a number of entries with three digits: ``202 k``, ``6.74 B``."""
    value = float(number)
    for unit in ("", " k", " M", " B"):
        if value < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:,.3g} T"


def _cosine(value: float | None) -> str:
    return "-" if value is None else cosine_text(value)


def _share(value: float | None) -> str:
    return "-" if value is None else percent(value)


def _head(report: Report, bars: str, width: int) -> Iterator[RenderableType]:
    what = {"models": "models", "recipe": "the models of a recipe", "merged": "a merged model"}[report.kind]
    against = f"against {printable(report.base.label)}" if report.models else "of one model"
    yield heading(f"Report on {what}, {against}")
    if report.models and not report.base_named:
        yield paragraph("No base was named: all figures are against the first model.")


def _models(report: Report, bars: str, width: int) -> Iterator[RenderableType]:
    verdicts = {True: "yes", False: "NO", None: "unclear"}
    tests = {one.model: verdicts[one.shares] for one in report.base_tests}
    models = [
        (report.base, "base" if report.base_named else "first"),
        *((m, tests.get(m.label, "-")) for m in report.models),
    ]
    if report.result is not None:
        models.append((report.result, "result"))
    yield heading("Models")
    header = ("model", "entries", "size", "dtype", "layers", "tokens", "from base")
    yield from fitting_tables(header, [(*_model(model), verdict) for model, verdict in models], width, (0, 3, 6))
    for model, _ in models:
        if model.reference != model.label:
            yield paragraph(f"{short_label(model.label)}: {printable(model.reference)}", 2)


def _model(model: Model) -> tuple[str, ...]:
    kinds = [one.dtype for one in model.dtypes]
    return (
        short_label(model.label),
        _short(model.parameters),
        size(model.nbytes),
        "-" if not kinds else kinds[0] + (f" +{len(kinds) - 1}" if len(kinds) > 1 else ""),
        str(model.layers),
        "-" if (tokens := _tokens(model)) is None else f"{tokens:,}",
    )


def _tokens(model: Model) -> int | None:
    return model.embedding_rows if model.vocabulary is None else model.vocabulary.size


def _changes(report: Report, bars: str, width: int) -> Iterator[RenderableType]:
    if not report.changes.total:
        return
    yield heading("How far each is from the base (norm of the change over the base's)")
    layers: dict[str, dict[str, float]] = {}
    for row in report.changes.layers:
        if row.relative is not None:
            layers.setdefault(row.model, {})[str(row.scope.layer)] = row.relative
    rows = [
        (
            short_label(row.model),
            _share(row.relative),
            _share(row.changed),
            _cosine(row.cosine_base),
            *_drawn(report, layers.get(row.model, {}), bars, percent),
        )
        for row in report.changes.total
    ]
    header = ("model", "distance", "changed", "cosine", "by layer", "least", "most")
    yield from fitting_tables(header, rows, width, (0, 4, 5, 6), together=3)
    yield paragraph("")
    yield from _components(report, width)


def _components(report: Report, width: int) -> Iterator[RenderableType]:
    cells: dict[tuple[str, str], Change] = {
        (str(row.scope.component), row.model): row for row in report.changes.components
    }
    labels = list(dict.fromkeys(row.model for row in report.changes.components))
    rows = [
        (part, *(_share(cells[part, one].relative) if (part, one) in cells else "-" for one in labels))
        for part in report.components
    ]
    yield from fitting_tables(("component", *map(short_label, labels)), rows, width)


def _drawn(
    report: Report, values: Mapping[str, float], bars: str, written: Callable[[float], str]
) -> tuple[str, str, str]:
    """Return values of layers as bars, and the least and the largest with their layers."""
    stacks = {layer.stack for layer in report.layers if layer.where == "layer"}
    found = [
        (values[layer.key], str(layer.index) if len(stacks) == 1 else layer.key)
        for layer in report.layers
        if layer.where == "layer" and layer.key in values
    ]
    if not found:
        return "", "-", "-"
    least, most = min(found), max(found)
    step = -(-len(found) // _WIDEST)
    heights = [max(value for value, _ in found[i : i + step]) for i in range(0, len(found), step)]
    spread = most[0] - least[0]
    if written(least[0]) == written(most[0]):
        # What is the same as far as it is written is not drawn as hills.
        spread = 0.0
    drawn = "".join(bars[round((height - least[0]) / spread * (len(bars) - 1)) if spread else 0] for height in heights)
    first, last = (f"{written(value)} ({short_label(layer)})" for value, layer in (least, most))
    return drawn, first, last


def _pairs(report: Report, bars: str, width: int) -> Iterator[RenderableType]:
    pairs = report.agreements.total
    if not pairs:
        return
    overlaps: dict[tuple[str, str], Overlap] = {
        (row.first, row.second): row for row in report.overlaps.total if row.top == _TOP
    }
    layers: dict[tuple[str, str], dict[str, float]] = {}
    for row in report.agreements.layers:
        if row.cosine is not None:
            layers.setdefault((row.first, row.second), {})[str(row.scope.layer)] = row.cosine
    # The farthest from orthogonal first, so that a cut keeps what matters.
    ordered = sorted(pairs, key=lambda row: -abs(row.cosine or 0.0)) if len(pairs) > _MOST_PAIRS else list(pairs)
    shown = ordered[:_MOST_PAIRS]
    yield heading("Between task vectors" if report.base_named else "Between models, seen from the first")
    header = ("models", "cosine", "one sign", "conflict", "top 5%", "cosine by layer", "least", "most")
    rows = [_pair(report, row, overlaps, layers, bars) for row in shown]
    yield from fitting_tables(header, rows, width, (0, 5, 6, 7), together=3)
    if len(shown) < len(pairs):
        yield paragraph(f"… and {counted(len(pairs) - len(shown), 'pair')} nearer to orthogonal")
    yield from _conflicts(report, bars)
    # Ties make sets larger than 5%, and those of models in a coarse dtype are of many sizes.
    chance = sorted(overlaps[pair].chance or 0.0 for row in shown if (pair := (row.first, row.second)) in overlaps)
    ends = dict.fromkeys([percent(chance[0]), percent(chance[-1])]) if chance else ()
    yield paragraph(
        "one sign: of the entries that both moved; conflict: share of the movement against the elected sign; top 5%: "
        "share of the entries moved most that both have" + (f", by chance {' to '.join(ends)}" if ends else "")
    )


def _pair(
    report: Report,
    row: Agreement,
    overlaps: Mapping[tuple[str, str], Overlap],
    layers: Mapping[tuple[str, str], Mapping[str, float]],
    bars: str,
) -> tuple[str, ...]:
    pair = (row.first, row.second)
    return (
        f"{short_label(row.first)} / {short_label(row.second)}",
        _cosine(row.cosine),
        _share(row.same_sign),
        _share(row.conflict),
        _share(overlaps[pair].overlap) if pair in overlaps else "-",
        *_drawn(report, layers.get(pair, {}), bars, cosine_text),
    )


def _conflicts(report: Report, bars: str) -> Iterator[RenderableType]:
    total = next(iter(report.conflicts.total), None)
    if total is None or total.share is None or len(total.models) < 3:
        return
    layers = {str(row.scope.layer): row.share for row in report.conflicts.layers if row.share is not None}
    drawn, least, most = _drawn(report, layers, bars, percent)
    by_layer = f"; by layer {drawn} from {least} to {most}" if drawn else ""
    yield paragraph(f"all {len(total.models)} together: {percent(total.share)} against the elected sign{by_layer}")


def _spectra(report: Report, bars: str, width: int) -> Iterator[RenderableType]:
    rows = []
    for model in report.models:
        spectra = [one for one in report.spectra if one.model == model.label and one.norm > 0.0]
        if not spectra:
            continue
        ranks = list(zip(*(one.ranks for one in spectra), strict=False))
        effective = [one.effective_rank for one in spectra if one.effective_rank is not None]
        stable = [one.stable_rank for one in spectra if one.stable_rank is not None]
        rows.append(
            (
                short_label(model.label),
                str(len(spectra)),
                f"{statistics.median([min(one.shape) for one in spectra]):.0f}",
                f"{statistics.median(effective):.0f}" if effective else "-",
                f"{statistics.median(stable):.1f}" if stable else "-",
                *("over" if None in found else str(max(rank or 0 for rank in found)) for found in ranks),
            )
        )
    if rows:
        energies = next(iter(report.spectra)).energies
        yield heading("Singular values of changes (medians over matrices; the largest rank for so much energy)")
        header = ("model", "matrices", "side", "effective", "stable", *(f"r {one:.0%}" for one in energies))
        yield from fitting_tables(header, rows, width)


def _distributions(report: Report, bars: str, width: int) -> Iterator[RenderableType]:
    rows = [
        (
            short_label(row.model),
            f"{row.deviation:.2e}",
            "-" if row.kurtosis is None else f"{row.kurtosis:.1f}",
            percent(row.zero),
            *(f"{one:.2e}" for one in row.quantiles),
        )
        for row in report.histograms.total
    ]
    if rows:
        tops = report.histograms.total[0].tops
        yield heading("Distribution of the entries of changes")
        header = ("model", "deviation", "kurtosis", "zero", *(f"top {one:.0%} >=" for one in tops))
        yield from fitting_tables(header, rows, width)


def _health(report: Report, bars: str, width: int) -> Iterator[RenderableType]:
    labels = [report.base.label, *(one.label for one in report.models)]
    if report.result is not None:
        labels.append(report.result.label)
    rows = []
    for label in labels:
        bad = [one for one in report.health.nonfinite if one.model == label]
        dead = [one for one in report.health.rows if one.model == label]
        kinds = [one.kind for one in report.health.differences if one.model == label]
        numbers = (
            sum(one.nan for one in bad),
            sum(one.infinite for one in bad),
            sum(one.dead for one in dead),
            sum(one.duplicated for one in dead),
            *(kinds.count(kind) for kind in ("missing", "extra", "shape", "dtype", "tied")),
        )
        if any(numbers):
            rows.append((short_label(label), *(f"{one:,}" if one else "." for one in numbers)))
    if rows:
        yield heading("Health (entries, rows, and tensors that differ from the base's)")
        header = ("model", "NaN", "inf", "dead", "double", "missing", "extra", "shape", "dtype", "head")
        yield from fitting_tables(header, rows, width)


def _vocabularies(report: Report, bars: str, width: int) -> Iterator[RenderableType]:
    if not report.health.tokens:
        return
    yield heading("Vocabularies that are not the base's")
    rows = [
        (
            short_label(one.model),
            f"{one.added:,}",
            f"{one.removed:,}",
            f"{one.moved:,}",
            short_label(", ".join(one.examples), _LONGEST_NAME) or "-",
        )
        for one in report.health.tokens
    ]
    yield from fitting_tables(("model", "added", "removed", "other id", "such as"), rows, width, (0, 4))


def _merged(report: Report, bars: str, width: int) -> Iterator[RenderableType]:
    if report.recipe is not None:
        steps = f" after {counted(len(report.recipe.steps), 'step')}" if report.recipe.steps else ""
        settings = [f"{name} {value}" for name, value in report.recipe.parameters.items()]
        yield heading(f"Recipe: {printable(report.recipe.method)}{steps}")
        if settings:
            yield paragraph(printable(", ".join(settings)), 2)
        for one in report.recipe.inputs:
            given = ", ".join(f"{name} {value}" for name, value in one.parameters.items())
            yield paragraph(printable(f"{short_label(one.model)}: {given}" if given else short_label(one.model)), 2)
    if report.merged is not None:
        made = report.merged
        files = f"{counted(len(made.files), 'file')}, {size(sum(made.files.values()))}"
        when = f", {printable(made.written)}" if made.written else ""
        yield heading("The merged folder")
        yield paragraph(
            f"{printable(made.path)}: {files}; by weightsmith {printable(made.version)} ({made.arithmetic}){when}", 2
        )
        if made.run is not None:
            run = made.run
            before = f"; {run.resumed:,} of {run.tensors:,} tensors by a run before" if run.resumed else ""
            told = f"{run.seconds:,.1f} s with {counted(run.threads, 'thread')}{before}"
            yield paragraph(f"merged in {told}; {size(run.bytes_read)} read, {size(run.bytes_written)} written", 2)
        for state, text in (("missing", "no longer there"), ("changed", "changed since")):
            names = [printable(one.path) for one in made.inputs if one.state == state]
            if names:
                yield paragraph(f"{text}: {listed(names)}", 2)
    yield from _shares(report, bars, width)


def _shares(report: Report, bars: str, width: int) -> Iterator[RenderableType]:
    total = next(iter(report.composition.total), None)
    if total is None:
        return
    yield heading("How much of each input is in the result")
    if not report.base_named:
        yield from _coefficients(report, total, bars, width)
        return
    rows = []
    for number, label in enumerate(total.models):
        layers = {
            str(row.scope.layer): share
            for row in report.composition.layers
            if label in row.models and (share := row.contributions[row.models.index(label)]) is not None
        }
        rows.append(
            (
                short_label(label),
                f"{total.coefficients[number]:.3f}",
                _cosine(total.cosines[number]),
                _share(total.contributions[number]),
                *_drawn(report, layers, bars, percent),
            )
        )
    header = ("input", "coefficient", "cosine", "share", "share by layer", "least", "most")
    yield from fitting_tables(header, rows, width, (0, 4, 5, 6), together=3)
    yield paragraph(_explained(total))


def _coefficients(report: Report, total: Composition, bars: str, width: int) -> Iterator[RenderableType]:
    """Yield the coefficients of models without a base: they add up to 1, and shares of a change say nothing."""
    found = {row.scope.layer: _with_first(report, row) for row in (*report.composition.layers, total)}
    rows = [
        (
            short_label(label),
            f"{found[None][label]:.3f}",
            *_drawn(
                report, {str(key): one[label] for key, one in found.items() if label in one}, bars, "{:.2f}".format
            ),
        )
        for label in found[None]
    ]
    yield from fitting_tables(("input", "coefficient", "by layer", "least", "most"), rows, width, (0, 2, 3, 4))
    yield paragraph(_explained(total))


def _with_first(report: Report, row: Composition) -> dict[str, float]:
    """Return the coefficients of all models: what the others do not have of a result is the first one's."""
    return {
        report.base.label: 1.0 - math.fsum(row.coefficients),
        **dict(zip(row.models, row.coefficients, strict=True)),
    }


def _explained(total: Composition) -> str:
    if total.r_squared is None:
        return "the result is the base"
    return f"inputs explain {percent(total.r_squared)} of the result's change; its norm is {total.delta_norm:.4g}"


def _conclusions(report: Report, bars: str, width: int) -> Iterator[RenderableType]:
    for title, found in (("Findings", report.findings), ("Advice", report.advice)):
        if found:
            yield heading(title)
            for one in found:
                yield from _finding(one)


def _finding(one: Finding) -> Iterator[RenderableType]:
    from rich.text import Text

    word, style = _LEVELS[one.level]
    yield Text.assemble((word, style), f"  {printable(one.title)}")
    yield paragraph(printable(one.text), 2)
    for line in one.action.splitlines():
        # A line to copy is not broken by us; the terminal may.
        yield Text(f"      {printable(line)}", no_wrap=True, style="cyan")


def _about(report: Report, bars: str, width: int) -> Iterator[RenderableType]:
    if not (report.notes or report.sampling or report.timings):
        return
    yield heading("About this report")
    for note in report.notes:
        yield paragraph(printable(note), 2)
    sampled: dict[str, list[str]] = {}
    for one in report.sampling:
        sampled.setdefault(f"{one.looked_at:,} of {one.of:,} {one.unit}: {printable(one.rule)}", []).append(
            one.statistic
        )
    for rule, names in sampled.items():
        yield paragraph(f"{listed(names)}: {rule}", 2)
    if report.timings:
        told = ", ".join(f"{one.stage} {one.seconds:.1f} s" for one in report.timings)
        yield paragraph(f"{told}; {size(sum(one.nbytes for one in report.timings))} read", 2)


_SECTIONS: tuple[Callable[[Report, str, int], Iterator[RenderableType]], ...] = (
    _head,
    _models,
    _merged,
    _changes,
    _pairs,
    _spectra,
    _distributions,
    _health,
    _vocabularies,
    _about,
    _conclusions,
)
