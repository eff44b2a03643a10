"""``weightsmith report``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from weightsmith.cli.merge import listener_for
from weightsmith.cli.terminal import printable

if TYPE_CHECKING:
    from weightsmith.report.findings import Report

_PAGE = "report.html"
_SUFFIXES = (".html", ".htm", ".json")


@click.command("report")
@click.argument("sources", nargs=-1, required=True, metavar="MODEL... | RECIPE | OUT | REPORT.json")
@click.option("--base", metavar="MODEL", help="The base that all models are fine-tunes of.")
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False), help=f"The page to write, or a .json file.  [default: {_PAGE}]"
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON, and write no page.")
@click.option("--text", "as_text", is_flag=True, help="Print the findings, and write no page.")
@click.option("--exact", is_flag=True, help="Sample nothing: rank all entries, compute all singular values. Slower.")
@click.option(
    "--matrices",
    metavar="PATTERN",
    multiple=True,
    help="Compute singular values of the matrices whose names fit, with * and ?; may be given several times.",
)
@click.option("--threads", type=click.IntRange(min=1), help="Threads to use; by default one per core.")
@click.option("--overwrite", is_flag=True, help="Replace a page that exists.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
def command(
    sources: tuple[str, ...],
    base: str | None,
    output: str | None,
    as_json: bool,
    as_text: bool,
    exact: bool,
    matrices: tuple[str, ...],
    threads: int | None,
    overwrite: bool,
    quiet: bool,
) -> None:
    """See how models differ, where they conflict, and what a merge has done.

    \b
    weightsmith report A B C --base BASE -o report.html
    weightsmith report recipe.yaml --text
    weightsmith report merged/ --json
    weightsmith report saved.json -o report.html

    All weights are read once, and nothing is merged. The page is one file that needs no network.
    """
    if as_json and as_text:
        raise click.UsageError("give one of --json and --text")
    target = None if output is None and (as_json or as_text) else _target(output or _PAGE, overwrite=overwrite)
    found = _saved(sources)
    measured = found is None
    if found is None:
        from weightsmith.report.create import report

        found = report(
            *sources,
            base=base,
            exact=exact,
            matrices=matrices,
            threads=threads,
            progress=listener_for(quiet=quiet, json_log=False),
        )
    elif base is not None or exact or matrices:
        raise click.UsageError(f"{sources[0]} was measured when it was saved: leave out --base, --exact and --matrices")
    try:
        _show(found, target, as_json=as_json, as_text=as_text)
    except (LookupError, ValueError, TypeError, ArithmeticError) as error:
        if measured:
            raise
        from weightsmith.errors import ReportError

        raise ReportError(f"{sources[0]} does not fit together ({error}): make the report anew") from error
    if target is not None and not quiet:
        click.echo(printable(str(target)), err=True)


def _show(found: Report, target: Path | None, *, as_json: bool, as_text: bool) -> None:
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2))
    elif as_text:
        from weightsmith.cli.report_text import print_report

        print_report(found)
    if target is not None:
        _write(target, found)


def _saved(sources: tuple[str, ...]) -> Report | None:
    """Read a report that was saved as JSON; None where something else is named."""
    saved = [one for one in sources if one.endswith(".json")]
    if not saved:
        return None
    from weightsmith.errors import ReportError
    from weightsmith.report.findings import Report

    if len(sources) > 1:
        raise ReportError(f"{saved[0]} is JSON, as reports are saved: name a saved report alone, and models by folders")
    try:
        content: Any = json.loads(Path(saved[0]).read_text("utf-8"))
        # Python reads NaN, infinity and numbers beyond them, which JSON does not have.
        json.dumps(content, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise ReportError(f"{saved[0]} is no JSON: {error}") from error
    if not isinstance(content, dict) or "format" not in content:
        raise ReportError(f"{saved[0]} is no report of weightsmith; models are named by their folders")
    try:
        return Report.from_json(content)
    except ReportError as error:
        raise ReportError(f"{saved[0]}: {error}") from error


def _target(output: str, *, overwrite: bool) -> Path:
    """Return where to write, checked before anything is measured: that may take long.

    Raises:
        OutputError: if it is no page or JSON by its name, exists, or lies where nothing can be written.
    """
    from weightsmith.errors import OutputError

    target = Path(output)
    if target.suffix.lower() not in _SUFFIXES:
        raise OutputError(f"{target} is to be a page (.html) or JSON (.json): name it so; for text, send --text there")
    if target.exists() and not overwrite:
        raise OutputError(f"{target} exists; choose another name with -o, or replace it with --overwrite")
    folder = next(one for one in target.absolute().parents if one.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise OutputError(f"{target} cannot be written: {folder} is no folder that may be written in")
    return target


def _write(target: Path, found: Report) -> None:
    """Write a page or JSON, whole or not at all.

    Raises:
        OutputError: if it cannot be written.
    """
    from weightsmith.checkpoint.staging import make_folder
    from weightsmith.errors import OutputError

    if target.suffix.lower() == ".json":
        text = json.dumps(found.to_json())
    else:
        from weightsmith.report.page import write_page

        text = write_page(found)
    # Beside it first: a page that is half there must not look done.
    beside = target.with_name(f".{target.name}.new")
    try:
        make_folder(target.parent)
        beside.write_text(text, "utf-8")
        beside.replace(target)
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror}") from error
    finally:
        beside.unlink(missing_ok=True)
