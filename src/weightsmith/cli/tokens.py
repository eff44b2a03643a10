"""``weightsmith tokens``."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import click

from weightsmith.cli.terminal import printable

if TYPE_CHECKING:
    from weightsmith.tokenizer.behaviour import Behaviour
    from weightsmith.tokenizer.comparison import TokenizerComparison, Tokens
    from weightsmith.tokenizer.facts import TokenizerFacts

_WIDTH = 80
_LABEL = 18
# How many tokens of a group are shown.
_SHOWN = 6
_SIGNS = str.maketrans({" ": "·", "\n": "\\n", "\t": "\\t", "\r": "\\r"})


@click.command("tokens")
@click.argument("a")
@click.argument("b", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option("--exit-code", is_flag=True, help="Exit with 1 if the tokenizers differ in anything.")
def command(a: str, b: str | None, as_json: bool, exit_code: bool) -> None:
    """Compare the tokenizers A and B, or show A alone.

    Each is a model, a folder that holds a tokenizer, or a file: tokenizer.json, or a SentencePiece model. Shown are
    the tokens that both have, how each splits numbers, white space and many scripts, and what to do to merge models
    of the two. How text is split needs the tokenizers library: pip install 'weightsmith[tokenizers]'.
    """
    if b is None:
        if exit_code:
            raise click.UsageError("--exit-code needs two tokenizers")
        from weightsmith.tokenizer.facts import tokenizer_facts

        facts = tokenizer_facts(a)
        if as_json:
            click.echo(json.dumps(facts.to_json(), indent=2))
        else:
            _show([facts])
            _warn(f"warning: {text}" for text in facts.contradictions)
        return
    from weightsmith.tokenizer.comparison import compare_tokenizers

    found = compare_tokenizers(a, b)
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2))
    else:
        _compare(found)
    if exit_code and not found.identical:
        sys.exit(1)


def _compare(found: TokenizerComparison) -> None:
    _show([found.a, found.b])
    _head("tokens")
    groups = {
        "same": found.same,
        "other number": found.renumbered,
        "other spelling": found.renamed,
        "only in A": found.only_a,
        "only in B": found.only_b,
    }
    for name, tokens in groups.items():
        total = found.b.tokens if name == "only in B" else found.a.tokens
        examples = "" if name == "same" else _examples(tokens)
        _wrapped(f"  {name}", f"{tokens.count:,} ({tokens.count / max(total, 1):.1%}){examples}")
    if found.differences:
        _head("other differences")
        _warn(f"- {text}" for text in found.differences)
    click.echo()
    _warn(f"warning: {text}" for text in found.warnings)
    _warn([found.verdict])


def _show(sides: Sequence[TokenizerFacts]) -> None:
    """Show one tokenizer, or two beside each other."""
    for label, facts in zip(("A", "B") if len(sides) > 1 else ("tokenizer",), sides, strict=True):
        _wrapped(label, facts.name)
        _warn(f"  {note}" for note in facts.notes)
    _row("kind", [f"{facts.kind}, {facts.alphabet}" for facts in sides])
    _row("tokens", [f"{facts.tokens:,}, {facts.added:,} of them added" for facts in sides])
    _row("rows needed", [f"{facts.size:,}" for facts in sides])
    if any(facts.rows is not None for facts in sides):
        _row("rows of the model", [_rows(facts) for facts in sides])
    for role in dict.fromkeys(role for facts in sides for role in facts.roles):
        _row(role, [_role(facts.roles.get(role)) for facts in sides])
    _row("a text becomes", [" ".join([*facts.before, "text", *facts.behind]) for facts in sides])
    _row("chat template", ["yes" if facts.chat_template else "no" for facts in sides])
    if len(sides) == 1:
        for part, text in sides[0].parts.items():
            _wrapped(part.replace("_", "-"), text)
    for count in sides[0].digits:
        most = " or more" if count == max(sides[0].digits) else ""
        label = f"{count}{most} digit{'s' if count > 1 else ''}"
        _row(label, [_tokens(facts.digits[count]) for facts in sides])
    behaviours = [facts.behaviour for facts in sides if facts.behaviour is not None]
    if len(behaviours) == len(sides):
        _behave(behaviours)


def _behave(sides: Sequence[Behaviour]) -> None:
    _head("numbers")
    for letter, side in zip("AB", sides, strict=False):
        _wrapped(f"  {letter}" if len(sides) > 1 else "  split", side.numerals.in_words())
    for text in sides[0].numerals.pieces:
        _row(f"  {text}", [_pieces(side.numerals.pieces[text]) for side in sides])
    _head("white space")
    _row("  space before", ["added to a text" if side.spaces.prefix else "not added" for side in sides])
    for name in sides[0].spaces.pieces:
        lost = ["  (lost)" if name in side.spaces.lost else "" for side in sides]
        _row(f"  {name}", [_pieces(side.spaces.pieces[name]) + told for side, told in zip(sides, lost, strict=True)])
    _head("tokens per character; unknown tokens; text that does not come back")
    for name in sides[0].texts:
        samples = [side.texts[name] for side in sides]
        cells = []
        for sample in samples:
            unknown = f"  {sample.unknown} unknown" if sample.unknown else ""
            cells.append(f"{sample.per_character:.2f}{unknown}{'' if sample.exact else '  changed'}")
        _row(f"  {name}", cells)


def _tokens(count: int) -> str:
    return f"{count:,} token{'' if count == 1 else 's'}"


def _rows(facts: TokenizerFacts) -> str:
    if facts.rows is None or facts.padding is None:
        return "-"
    if facts.padding < 0:
        return f"{facts.rows:,}, {-facts.padding:,} too few"
    return f"{facts.rows:,}" + (f", {facts.padding:,} of padding" if facts.padding else "")


def _role(found: tuple[str, int | None] | None) -> str:
    if found is None:
        return "-"
    token, number = found
    return f"{token} ({'no number' if number is None else f'{number:,}'})"


def _examples(tokens: Tokens) -> str:
    parts = []
    for one, number, other, place in tokens.examples[:_SHOWN]:
        token = (one if one is not None else other) or ""
        text = _signs(token)
        if one is not None and other is not None:
            text += f" -> {_signs(other)}" if other != one else f" {number} -> {place}"
        parts.append(text)
    more = ", …" if tokens.count > len(parts) else ""
    return f": {', '.join(parts)}{more}" if parts else ""


def _pieces(pieces: Iterable[str]) -> str:
    return "|".join(_signs(piece) for piece in pieces)


def _signs(text: str) -> str:
    return printable(text.translate(_SIGNS))


def _head(text: str) -> None:
    click.echo()
    click.echo(text)


def _row(label: str, cells: Sequence[str]) -> None:
    """Show one cell beside its label, or two beside each other; what does not fit its column takes a line."""
    cells = [printable(cell) for cell in cells]
    label = printable(label)
    column = (_WIDTH - _LABEL) // 2
    if len(cells) == 2 and len(cells[0]) < column and len(cells[1]) <= column:
        click.echo(f"{label:{_LABEL}}{cells[0]:{column}}{cells[1]}".rstrip())
    elif len(cells) == 2:
        _wrapped(label, f"A: {cells[0]}")
        _wrapped("", f"B: {cells[1]}")
    else:
        _wrapped(label, cells[0])


def _wrapped(label: str, text: str) -> None:
    label = f"{printable(label):{_LABEL}}"
    lines = textwrap.wrap(printable(text), _WIDTH - _LABEL, break_on_hyphens=False) or [""]
    for number, line in enumerate(lines):
        click.echo(f"{label if number == 0 else '':{_LABEL}}{line}".rstrip())


def _warn(texts: Iterable[str]) -> None:
    for text in texts:
        indent = len(text) - len(text.lstrip(" -"))
        told = textwrap.wrap(printable(text), _WIDTH, subsequent_indent=" " * indent, break_on_hyphens=False)
        click.echo("\n".join(told))
