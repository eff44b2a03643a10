"""JSON from strangers: what two readers could understand differently, or could not write again, is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from weightsmith.errors import CheckpointError, shown

# Configs of pipelines of models nest about ten deep; what goes deeper would end Python's stack somewhere.
_DEEPEST = 64
_SPACE = re.compile(r"[ \t\n\r]*")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_object(content: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON file that holds an object.

    NaN and Infinity are let through: transformers writes them (``time_step_limit`` of Mamba 2).

    Args:
        content: the file's bytes.
        where: what to call the file in errors.

    Raises:
        CheckpointError: if it is not UTF-8, not JSON, no object, gives a key twice, is nested more than 64 levels
            deep, or holds half a character.
    """
    try:
        text = content.decode("utf-8")
        found = json.loads(text, object_pairs_hook=_unique)
        if _SURROGATE.search(text):
            json.dumps(found, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not JSON in UTF-8: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{where} does not hold a JSON object")
    if _depth_exceeds(found, _DEEPEST):
        raise CheckpointError(f"{where} is nested more than {_DEEPEST} levels deep")
    return found


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"it names {shown(key)} twice; leave one of the two out")
        found[key] = value
    return found


def _depth_exceeds(value: Any, limit: int) -> bool:
    layer = [value]
    for _ in range(limit + 1):
        layer = [
            inner
            for outer in layer
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not layer:
            return False
    return True


class JsonReader:
    """Reads one large object piece by piece, so that a piece that is refused has cost no more than itself.

    A hundred megabytes of ``[],[],…`` are gigabytes of empty lists when parsed at once.
    """

    def __init__(self, text: str) -> None:
        """Begin at the start of a text."""
        self._text = text
        self._position = 0
        self._decoder = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant)

    def object_keys(self) -> Iterator[str]:
        """Yield the keys of the object at this position; after each its value must be read.

        Raises:
            ValueError: if there is no object in JSON.
        """
        self._take("{")
        if self._next() == "}":
            self._position += 1
            return
        while True:
            key = self.text()
            self._take(":")
            yield key
            if self._take(",}") == "}":
                return

    def text(self) -> str:
        """Read a text.

        Raises:
            ValueError: if there is none here.
        """
        if self._next() != '"':
            raise ValueError(f"a text is expected at character {self._position:,}")
        found, self._position = self._decoder.raw_decode(self._text, self._position)
        assert isinstance(found, str)
        return found

    def flat_object(self, longest: int) -> Any:
        """Read an object that holds no other, of at most so many characters; or whatever else begins here.

        Raises:
            ValueError: if there is nothing such.
        """
        self._next()
        start = self._position
        end = self._text.find("}", start, start + longest) + 1
        if not end:
            raise ValueError(f"what begins at character {start:,} does not end within {longest:,}")
        found, stop = self._decoder.raw_decode(self._text[start:end])
        self._position = start + stop
        return found

    def end(self) -> None:
        """Check that nothing but space is left.

        Raises:
            ValueError: if there is more.
        """
        if self._next():
            raise ValueError(f"there is more after its end, at character {self._position:,}")

    def _next(self) -> str:
        match = _SPACE.match(self._text, self._position)
        assert match is not None
        self._position = match.end()
        return self._text[self._position : self._position + 1]

    def _take(self, letters: str) -> str:
        found = self._next()
        if not found or found not in letters:
            raise ValueError(f"{' or '.join(letters)} is expected at character {self._position:,}")
        self._position += 1
        return found


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number in JSON")
