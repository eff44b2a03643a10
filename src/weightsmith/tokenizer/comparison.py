"""How two tokenizers differ, and what that means for merging their models."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from weightsmith.checkpoint.source import Source
from weightsmith.errors import shown
from weightsmith.tokenizer.components import PARTS
from weightsmith.tokenizer.facts import TokenizerFacts, open_tokenizer, tokenizer_facts
from weightsmith.tokenizer.matching import match
from weightsmith.tokenizer.tokenizer import ROLES, Tokenizer

# What the file says of an added token, beside its text and number.
_FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")
# The model's settings, beside its tokens, with what is meant where a file leaves them out. An empty affix is none.
_SETTINGS: Mapping[str, Any] = {
    "unk_token": None,
    "unk_id": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "max_input_chars_per_word": 100,
    "fuse_unk": False,
    "byte_fallback": False,
    "ignore_merges": False,
}
# How many tokens of a group are kept as examples.
_EXAMPLES = 20


@dataclass(frozen=True)
class Tokens:
    """Some tokens of one tokenizer, by the numbers that they have.

    Attributes:
        count: how many there are.
        examples: the first of them: token and number in A, token and number in B; None where one side lacks it.
    """

    count: int
    examples: tuple[tuple[str | None, int | None, str | None, int | None], ...]


@dataclass(frozen=True)
class TokenizerComparison:
    """How tokenizer B differs from tokenizer A.

    Every token of A is in one of ``same``, ``renumbered``, ``renamed`` and ``only_a``.

    Attributes:
        a: the facts of A.
        b: the facts of B.
        same: tokens of A that B spells alike and numbers alike.
        renumbered: tokens of A that B spells alike, and gives another number.
        renamed: tokens of A that stand in B for the same text, or have the same role, under another spelling.
        only_a: tokens of A that B has under no spelling.
        only_b: tokens of B that A has under no spelling.
        differences: in what else they differ: roles, special tokens, flags, parts, templates.
        warnings: what a merge or a transplant is in danger of.
        verdict: what to do to merge models of the two.
    """

    a: TokenizerFacts
    b: TokenizerFacts
    same: Tokens
    renumbered: Tokens
    renamed: Tokens
    only_a: Tokens
    only_b: Tokens
    differences: tuple[str, ...]
    warnings: tuple[str, ...]
    verdict: str

    @property
    def identical(self) -> bool:
        """Whether nothing differs: tokens, numbers, roles, flags, how text is split, chat template."""
        changed = (self.renumbered, self.renamed, self.only_a, self.only_b)
        return not self.differences and not any(tokens.count for tokens in changed)

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {**asdict(self), "identical": self.identical, "a": self.a.to_json(), "b": self.b.to_json()}


def compare_tokenizers(a: Source, b: Source) -> TokenizerComparison:
    """Compare two tokenizers.

    How text is split is compared where the tokenizers library is installed; all else is read from the files.

    Args:
        a: a checkpoint, its reference, a folder that holds a tokenizer, or a file of one.
        b: the same.

    Raises:
        CheckpointError: if one of the two has no tokenizer, or it cannot be read.
    """
    opened_a, opened_b = open_tokenizer(a), open_tokenizer(b)
    own, other = opened_a.tokenizer, opened_b.tokenizer
    facts_a, facts_b = tokenizer_facts(opened_a), tokenizer_facts(opened_b)
    groups = _groups(own, other)
    differences = (
        *_roles(facts_a, facts_b),
        *_special(facts_a, facts_b),
        *_flags(own, other),
        *_model(own, other),
        *_parts(facts_a, facts_b),
        *_split(facts_a, facts_b),
        *_templates(facts_a, facts_b),
    )
    return TokenizerComparison(
        a=facts_a,
        b=facts_b,
        **groups,
        differences=differences,
        warnings=tuple(_warnings(facts_a, facts_b)),
        verdict=_verdict(facts_a, facts_b, groups, differences),
    )


def _groups(own: Tokenizer, other: Tokenizer) -> dict[str, Tokens]:
    """Sort the tokens of both by what became of them."""
    there = match(own, other)
    rows: dict[str, list[tuple[str | None, int | None, str | None, int | None]]] = {
        name: [] for name in ("same", "renumbered", "renamed", "only_a", "only_b")
    }
    for number, token in own.tokens.items():
        place = int(there[number])
        if place < 0:
            rows["only_a"].append((token, number, None, None))
            continue
        name = "renamed" if other.tokens[place] != token else "same" if place == number else "renumbered"
        rows[name].append((token, number, other.tokens[place], place))
    back = match(other, own)
    rows["only_b"] = [(None, None, token, number) for number, token in other.tokens.items() if back[number] < 0]
    return {name: Tokens(len(found), tuple(found[:_EXAMPLES])) for name, found in rows.items()}


def _roles(a: TokenizerFacts, b: TokenizerFacts) -> Iterator[str]:
    for role in ROLES:
        one, other = (facts.roles.get(role) for facts in (a, b))
        if one != other:
            yield f"{role} is {_role(one)} in A and {_role(other)} in B"


def _role(found: tuple[str, int | None] | None) -> str:
    if found is None:
        return "not set"
    token, number = found
    return f"{token} ({'not in the vocabulary' if number is None else number})"


def _special(a: TokenizerFacts, b: TokenizerFacts) -> Iterator[str]:
    for side, one, other in (("A", a, b), ("B", b, a)):
        alone = [token for token in one.special if token not in set(other.special)]
        if alone:
            yield f"special in {side} alone: {_listed(alone)}"


def _flags(own: Tokenizer, other: Tokenizer) -> Iterator[str]:
    """Say which flags of added tokens differ; tokens that differ in the same are told together."""
    found: dict[str, list[str]] = {}
    for token, entry in own.added.items():
        if token not in other.added:
            continue
        for flag in _FLAGS:
            values = [_flag(one, flag) for one in (entry, other.added[token])]
            if values[0] != values[1]:
                text = f"added tokens are {flag} in {'A' if values[0] else 'B'} and not in {'B' if values[0] else 'A'}"
                found.setdefault(text, []).append(token)
    for text, tokens in found.items():
        yield f"{text}: {_listed(tokens)}"
    for side, one, two in (("A", own, other), ("B", other, own)):
        alone = [token for token in one.added if token in two.vocabulary and token not in two.added]
        if alone:
            yield f"added tokens in {side}, and tokens of the vocabulary in the other: {_listed(alone)}"


def _flag(entry: Mapping[str, Any], flag: str) -> bool:
    # The library takes what is left out for no, and reads added tokens as normalized unless they are special.
    return bool(entry.get(flag, flag == "normalized" and not entry.get("special")))


def _model(own: Tokenizer, other: Tokenizer) -> Iterator[str]:
    """Say what differs of the models, but for the vocabularies."""
    if own.kind != other.kind:
        yield f"A is {own.kind} and B is {other.kind}"
        return
    for key, default in _SETTINGS.items():
        one, two = (
            shown(None if value == "" else value)
            for value in (own.model.get(key, default), other.model.get(key, default))
        )
        if one != two:
            yield f"{key} of the {own.kind} model is {one} in A and {two} in B"
    merges = [_merges(found) for found in (own, other)]
    if merges[0] != merges[1]:
        shared = set(merges[0]) & set(merges[1])
        order = " in another order" if len(shared) == len(merges[0]) == len(merges[1]) else ""
        yield f"merges differ: A has {len(merges[0]):,}, B {len(merges[1]):,}, {len(shared):,} are shared{order}"
    scores = [_scores(found) for found in (own, other)]
    changed = [token for token, score in scores[0].items() if scores[1].get(token, score) != score]
    if changed:
        yield f"scores differ of {len(changed):,} tokens that both have: {_listed(changed)}"


def _merges(tokenizer: Tokenizer) -> list[str]:
    """Return merges as text; files write them as text or as pairs."""
    found = tokenizer.model.get("merges")
    entries = found if isinstance(found, list) else []
    return [" ".join(map(str, one)) if isinstance(one, list) else str(one) for one in entries]


def _scores(tokenizer: Tokenizer) -> dict[str, Any]:
    entries = tokenizer.model.get("vocab")
    return {str(one[0]): one[1] for one in entries if len(one) > 1} if isinstance(entries, list) else {}


def _parts(a: TokenizerFacts, b: TokenizerFacts) -> Iterator[str]:
    for part in PARTS:
        if a.parts[part] != b.parts[part]:
            yield f"{part.replace('_', '-')}: A: {a.parts[part]} | B: {b.parts[part]}"


def _split(a: TokenizerFacts, b: TokenizerFacts) -> Iterator[str]:
    """Say how numbers and white space are split otherwise."""
    if a.behaviour is None or b.behaviour is None:
        return
    one, other = a.behaviour.numerals, b.behaviour.numerals
    if one.kind != other.kind:
        yield f"numbers are split {one.in_words()} in A, and {other.in_words()} in B"
    if a.behaviour.spaces.prefix != b.behaviour.spaces.prefix:
        side = "A" if a.behaviour.spaces.prefix else "B"
        yield f"{side} puts a space before a text, the other does not"
    spaces = a.behaviour.spaces.pieces, b.behaviour.spaces.pieces
    changed = [name for name, pieces in spaces[0].items() if spaces[1].get(name) != pieces]
    if changed:
        yield f"white space is split otherwise: {', '.join(changed)}"


def _templates(a: TokenizerFacts, b: TokenizerFacts) -> Iterator[str]:
    if a.chat_template == b.chat_template:
        return
    if a.chat_template and b.chat_template:
        yield "their chat templates differ"
    else:
        yield f"{'A' if a.chat_template else 'B'} alone has a chat template"


def _warnings(a: TokenizerFacts, b: TokenizerFacts) -> Iterator[str]:
    for side, facts in (("A", a), ("B", b)):
        for text in facts.contradictions:
            yield f"{side}: {text}"
        if facts.padding is not None and facts.padding < 0:
            yield f"{side}: {-facts.padding:,} numbers of tokens are beyond the {facts.rows:,} rows of its model"
    if a.behaviour is None or b.behaviour is None:
        return
    one, other = a.behaviour.numerals, b.behaviour.numerals
    if one.kind != other.kind:
        yield (
            f"A splits numbers {one.in_words()}, B {other.in_words()}: a model that is given the other's tokenizer "
            "may lose much of its arithmetic (arXiv 2506.06607)"
        )


def _verdict(a: TokenizerFacts, b: TokenizerFacts, groups: Mapping[str, Tokens], differences: tuple[str, ...]) -> str:
    if a.width is not None and b.width is not None and a.width != b.width:
        return _verdict_of_widths(a, b, groups)
    same, moved, renamed, only_a, only_b = (
        groups[name].count for name in ("same", "renumbered", "renamed", "only_a", "only_b")
    )
    if not (moved or renamed or only_a or only_b):
        if not differences:
            return "They are the same: merge their models as they are."
        return (
            "They have the same tokens under the same numbers and differ in how they are used: merge their models as "
            "they are, and choose whose tokenizer the result takes (tokenizer_source)."
        )
    if not (moved or renamed) and not (only_a and only_b):
        side, other, count = ("B", "A", only_b) if only_b else ("A", "B", only_a)
        return (
            f"{side} adds {count:,} tokens to {other} and changes no number: merge with tokenizer: {{source: union}}, "
            f"which keeps them."
        )
    if not (renamed or only_a or only_b):
        return (
            "They have the same tokens under other numbers: merge with tokenizer: {source: union} or {source: base}, "
            "which puts the rows in order; without it rows of different tokens are mixed."
        )
    if not renamed and not (only_a and only_b):
        side, other, count = ("B", "A", only_b) if only_b else ("A", "B", only_a)
        return (
            f"{side} has all tokens of {other}, some under other numbers, and {count:,} more: merge with tokenizer: "
            "{source: union}, which puts the rows in order."
        )
    way = (
        "merge with tokenizer: {source: union}, or give one model the tokenizer of the other with weightsmith "
        "transplant and merge then"
    )
    kinds = "" if (a.kind, a.alphabet) == (b.kind, b.alphabet) else "are of different kinds and "
    return f"They {kinds}share {_shared(same + moved + renamed, a, b)}: {way}."


def _shared(count: int, a: TokenizerFacts, b: TokenizerFacts) -> str:
    return f"{count:,} tokens, {count / max(a.tokens, 1):.0%} of A's and {count / max(b.tokens, 1):.0%} of B's"


def _verdict_of_widths(a: TokenizerFacts, b: TokenizerFacts, groups: Mapping[str, Tokens]) -> str:
    """Say what can be done with models whose rows cannot stand in each other."""
    widths = f"Rows of A's model have {a.width:,} elements and those of B's {b.width:,}, so that they cannot be merged"
    if any(groups[name].count for name in ("renumbered", "renamed", "only_a", "only_b")):
        shared = _shared(sum(groups[name].count for name in ("same", "renumbered", "renamed")), a, b)
        return (
            f"{widths}. The tokenizers share {shared}: weightsmith transplant gives one model the tokenizer of the "
            "other."
        )
    return f"{widths}; their tokens are the same, under the same numbers."


def _listed(tokens: Iterable[str], most: int = 8) -> str:
    found = list(tokens)
    rest = f" and {len(found) - most:,} more" if len(found) > most else ""
    return ", ".join(found[:most]) + rest
