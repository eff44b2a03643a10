"""The patterns by which an adapter's config gives modules ranks of their own, matched in bounded time.

PEFT takes the first pattern p for which ``re.match(rf"(.*\\.)?({p})$", module)`` holds. An adapter comes from a
stranger, and Python's engine takes exponential time for some patterns (``(a+)+b``). So it is not run on them: the
sets of places that a pattern can reach are followed instead (Thompson, Regular expression search algorithm, 1968),
each a number with a bit per place. What cannot be matched so (references back, looking around) is refused. Names
alone, which most configs hold, are looked up: there may be thousands, for thousands of modules.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from weightsmith.errors import CheckpointError, shown

_LONGEST = 1_000
# Patterns that are more than names; and kinds of names, by their length and dots.
_MOST = 1_000
# Some five seconds, over all modules; configs that people write take thousands.
_MOST_STEPS = 10_000_000
_DEEPEST = 40
_MOST_REPEATS = 1_000
_NAME = re.compile(r"[\w.-]+")
_TIMES = r"\{(?=[0-9,]+\})[0-9]*(?:,[0-9]*)?\}"
# A class may begin with its own end; what Python warns of in one (``[[``, ``&&``) may mean more some day.
_CLASS = r"\[\^?+\]?+(?!-|[^\]]*(?:--|&&|\|\||~~))(?:\\.|[^\]\\\[])*+\]"
_TOKEN = re.compile(
    r"(?P<open>\((?:\?:|(?!\?)))|(?P<close>\))|(?P<bar>\|)|(?P<anchor>[\^$])"
    rf"|(?P<repeat>(?:[*+?]|{_TIMES})\??+(?![*+?]))"
    rf"|(?P<letter>{_CLASS}|\\(?:[dwsDWS]|[^0-9A-Za-z])|(?!{_TIMES})[^\\*+?()|^$\[])",
    re.DOTALL,
)


@dataclass(frozen=True)
class _Letter:
    """One letter: itself, any, or one of a class."""

    kind: re.Pattern[str]


@dataclass(frozen=True)
class _Anchor:
    """The start (``^``) or the end (``$``)."""

    text: str


@dataclass(frozen=True)
class _Choice:
    """One of several sequences."""

    branches: tuple[tuple[_Node, ...], ...]


@dataclass(frozen=True)
class _Repeat:
    """Something several times; without an upper bound where ``most`` is None."""

    node: _Node
    least: int
    most: int | None


_Node: TypeAlias = _Letter | _Anchor | _Choice | _Repeat
# Where a name's stretches between dots lie.
_Stretches: TypeAlias = tuple[tuple[int, int], ...]


class Patterns:
    """Values by pattern of a module's name."""

    def __init__(self, values: Mapping[str, float]) -> None:
        """Read patterns.

        Args:
            values: pattern -> value, in the order in which they are tried.

        Raises:
            CheckpointError: if one is no pattern, or one that cannot be matched in bounded time.
        """
        self._values = tuple(values.values())
        self._patterns: list[tuple[int, _Node]] = []
        # A dot in a pattern stands for any letter, so names are looked up by what lies between their dots.
        self._names: dict[tuple[int, _Stretches], dict[tuple[str, ...], int]] = {}
        self._steps = 0
        for number, pattern in enumerate(values):
            if len(pattern) > _LONGEST:
                raise CheckpointError(
                    f"{shown(pattern)} has {len(pattern):,} characters; at most {_LONGEST:,} are read"
                )
            if _NAME.fullmatch(pattern):
                stretches = tuple(match.span() for match in re.finditer(r"[^.]+", pattern))
                alike = self._names.setdefault((len(pattern), stretches), {})
                alike.setdefault(_cut(pattern, stretches), number)
            else:
                self._patterns.append((number, _Parser(pattern).parse()))
        if max(len(self._patterns), len(self._names)) > _MOST:
            raise CheckpointError(f"it has more than {_MOST:,} patterns that are not plain names of modules")

    def value(self, module: str, default: float) -> float:
        """Return the value of the first pattern that matches a module's name, or else the default.

        Raises:
            CheckpointError: if that takes too long.
        """
        first = len(self._values)
        if "\n" not in module:
            for (length, stretches), alike in self._names.items():
                start = len(module) - length
                if start == 0 or (start > 0 and module[start - 1] == "."):
                    first = min(first, alike.get(_cut(module[start:], stretches), first))
        for number, pattern in self._patterns:
            if number > first:
                break
            if self._matches(pattern, module):
                first = number
        return self._values[first] if first < len(self._values) else default

    def _matches(self, pattern: _Node, module: str) -> bool:
        run = _Run(module, self._steps)
        found = run.matches(pattern)
        self._steps = run.steps
        return found


def _cut(name: str, stretches: _Stretches) -> tuple[str, ...]:
    return tuple(name[start:stop] for start, stop in stretches)


class _Run:
    """Follows a pattern through one name: a set of places is a number whose bit i says that place i is in it."""

    def __init__(self, name: str, steps: int) -> None:
        self.steps = steps
        self._name = name
        self._letters: dict[re.Pattern[str], int] = {}

    def matches(self, pattern: _Node) -> bool:
        """Whether the pattern matches the name, or what follows one of its dots, to the end."""
        line = self._name.partition("\n")[0]
        starts = 1 + sum(2 << place for place, letter in enumerate(line) if letter == ".")
        return bool(self._reach(pattern, starts) >> len(self._name) & 1)

    def _reach(self, node: _Node, starts: int) -> int:
        """Return the places to which a node leads from any of these."""
        self.steps += 1
        if self.steps > _MOST_STEPS:
            raise CheckpointError("its patterns take too long to match; give ranks by the plain names of modules")
        if isinstance(node, _Letter):
            return (starts & self._places(node.kind)) << 1
        if isinstance(node, _Anchor):
            end = 1 << len(self._name)
            # Python's $ also holds before a last line break.
            return starts & (1 if node.text == "^" else end | end >> 1 if self._name.endswith("\n") else end)
        if isinstance(node, _Repeat):
            return self._repeat(node, starts)
        found = 0
        for branch in node.branches:
            reached = starts
            for part in branch:
                reached = self._reach(part, reached) if reached else 0
            found |= reached
        return found

    def _repeat(self, node: _Repeat, starts: int) -> int:
        reached = starts
        for _ in range(node.least):
            reached = self._reach(node.node, reached) if reached else 0
        found = newest = reached
        left = None if node.most is None else node.most - node.least
        while newest and left != 0:
            # From places that fewer turns led to already, more turns lead nowhere new.
            newest = self._reach(node.node, newest) & ~found
            found |= newest
            left = None if left is None else left - 1
        return found

    def _places(self, kind: re.Pattern[str]) -> int:
        if kind not in self._letters:
            self.steps += 1 + len(self._name) // 8
            self._letters[kind] = sum(1 << i for i, letter in enumerate(self._name) if kind.match(letter))
        return self._letters[kind]


class _Parser:
    """Reads a pattern in Python's syntax, as far as it can be matched here."""

    def __init__(self, pattern: str) -> None:
        try:
            with warnings.catch_warnings():
                # Python may mean more by [[ and && some day; such classes are refused below.
                warnings.simplefilter("ignore")
                re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise CheckpointError(f"{shown(pattern)} is no pattern: {error}") from error
        self._pattern = pattern
        self._position = 0

    def parse(self) -> _Node:
        """Return what the pattern stands for."""
        found = self._choice(0)
        if self._position < len(self._pattern):
            raise self._unknown()
        return found

    def _choice(self, depth: int) -> _Choice:
        if depth > _DEEPEST:
            raise CheckpointError(f"{shown(self._pattern)} is nested more than {_DEEPEST} levels deep")
        branches: list[list[_Node]] = [[]]
        while (token := _TOKEN.match(self._pattern, self._position)) is not None and token.lastgroup != "close":
            self._position = token.end()
            branch = branches[-1]
            if token.lastgroup == "bar":
                branches.append([])
            elif token.lastgroup == "open":
                branch.append(self._choice(depth + 1))
                self._close()
            elif token.lastgroup == "anchor":
                branch.append(_Anchor(token[0]))
            elif token.lastgroup == "letter":
                # Of one letter alone, so whatever it holds takes no time.
                branch.append(_Letter(re.compile(token[0])))
            else:
                branch.append(self._repeated(branch.pop(), token[0]))
        return _Choice(tuple(map(tuple, branches)))

    def _close(self) -> None:
        token = _TOKEN.match(self._pattern, self._position)
        if token is None or token.lastgroup != "close":
            raise self._unknown()
        self._position = token.end()

    def _repeated(self, node: _Node, sign: str) -> _Repeat:
        # Whether it takes much or little (``*?``) makes no difference to whether there is a match.
        if sign[0] != "{":
            return _Repeat(node, int(sign[0] == "+"), 1 if sign[0] == "?" else None)
        least, comma, most = sign.removesuffix("?").strip("{}").partition(",")
        low = int(least or 0)
        high = int(most) if most else None if comma else low
        if max(low, high or 0) > _MOST_REPEATS:
            raise CheckpointError(f"{shown(self._pattern)} repeats more than {_MOST_REPEATS:,} times")
        return _Repeat(node, low, high)

    def _unknown(self) -> CheckpointError:
        return CheckpointError(
            f"{shown(self._pattern)} holds {self._pattern[self._position :][:10]!r}, which could take for ever to match"
        )
