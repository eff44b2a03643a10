"""Tables and lines for a terminal of any width, or a pipe: nothing needs colour, and no name moves the cursor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from weightsmith.cli.terminal import printable

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

Rows = Sequence[Sequence[str]]
# Names in tables are cut to so many letters.
_LONGEST_LABEL = 20


def print_piece(piece: RenderableType, console: Console) -> None:
    """Print without blanks at the ends of lines, which are in the way of who copies them or reads them from a pipe."""
    from rich.segment import Segment
    from rich.text import Text

    if isinstance(piece, Text) and piece.no_wrap:
        console.print(_written(piece, console), highlight=False, soft_wrap=True)
        return
    for line in console.render_lines(piece, pad=False):
        while line and not line[-1].text.strip():
            line.pop()
        if line:
            line[-1] = Segment(line[-1].text.rstrip(), line[-1].style)
        text = Text.assemble(*((one.text, one.style or "") for one in line))
        console.print(_written(text, console), highlight=False, soft_wrap=True)


def _written(text: Text, console: Console) -> Text:
    """Return a line that is safe to print, with question marks for what the output cannot show."""
    # Names were made safe before lines were broken; what else a saved report says is made so here.
    if not text.plain.isprintable():
        text.plain = printable(text.plain)
    if not can_write(console.encoding, text.plain):
        text.plain = text.plain.encode(console.encoding, "replace").decode(console.encoding)
    return text


def can_write(encoding: str, text: str) -> bool:
    """Return whether an encoding has all letters of a text."""
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


def heading(text: str) -> RenderableType:
    """Return what stands over a section, with an empty line before it."""
    from rich.text import Text

    return Text(f"\n{text}", style="bold")


def paragraph(text: str, indent: int = 0) -> RenderableType:
    """Return a text whose lines all begin after so many blanks."""
    from rich.padding import Padding
    from rich.text import Text

    return Padding(Text(text), (0, 0, 0, indent))


def fitting_tables(
    header: Sequence[str], rows: Rows, width: int, left: Sequence[int] = (0,), together: int = 1
) -> Iterator[RenderableType]:
    """Yield a table without lines, or several that repeat the first column where one would be too wide.

    Args:
        header: names of the columns.
        rows: their cells.
        width: of the terminal.
        left: columns that are set to the left; the others are set to the right.
        together: how many of the last columns stay in one table.
    """
    from rich.cells import cell_len

    widths = [max(map(cell_len, column)) + 2 for column in zip(header, *rows, strict=True)]
    end = len(header) - together
    parts = [[number] for number in range(1, end)] + [list(range(end, len(header)))]
    shown: list[int] = []
    tables = [shown]
    for part in parts:
        if shown and sum(widths[one] for one in [0, *shown, *part]) - 2 > width:
            shown = []
            tables.append(shown)
        shown += part
    for number, columns in enumerate(tables):
        if number:
            yield paragraph("")
        yield _table(header, rows, [0, *columns], left)


def _table(header: Sequence[str], rows: Rows, columns: Sequence[int], left: Sequence[int]) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for number in columns:
        table.add_column(header[number], justify="left" if number in left else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(row[number]) for number in columns))
    return table


def short_label(text: str, longest: int = _LONGEST_LABEL) -> str:
    """Return a name that is safe to print, cut to so many letters."""
    text = printable(text)
    return text if len(text) <= longest else f"{text[: longest - 1]}…"
