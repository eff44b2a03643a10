"""What an output is and where it came from, written into it: hashes of all tensors and files, recipe and inputs.

A tensor's hash is taken while it is written, a block at a time and in any order: blocks of ``step`` bytes are hashed by
themselves (XXH3, 128 bits), and the hash of their hashes, in order, is the tensor's. It finds any accident, and costs
nothing beside reading and writing; it is no proof against somebody who wants to deceive, for a manifest can be written
anew.

A folder carries its manifest as the file :data:`MANIFEST_FILE`; a single file in its header's metadata. The manifest
holds a hash of itself, so that it is known whether the manifest or the content changed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from weightsmith.checkpoint.checkpoint import Identity
from weightsmith.errors import CheckpointError

MANIFEST_FILE = "weightsmith.json"
MANIFEST_KEY = "weightsmith"
FORMAT = 1
UNKNOWN = "0" * 32
_STEP_DIGITS = 10
_SEAL = '"seal":"'


@dataclass(frozen=True)
class Digest:
    """The hash of a tensor.

    Attributes:
        hash: 32 hexadecimal digits.
        step: bytes that were hashed at a time.
    """

    hash: str
    step: int

    def __str__(self) -> str:
        """Both, in a text whose length is always the same: a manifest's place is kept before hashes are known."""
        return f"{self.hash}:{self.step:0{_STEP_DIGITS}x}"

    @classmethod
    def parse(cls, text: str) -> Digest:
        """Read what ``str`` gave."""
        digits, _, step = text.partition(":")
        return cls(digits, int(step, 16))


@dataclass(frozen=True)
class Entry:
    """A tensor of an output: its dtype as safetensors names it, its shape, the file it is in, and its hash."""

    dtype: str
    shape: tuple[int, ...]
    file: str
    digest: Digest


@dataclass(frozen=True)
class Manifest:
    """What an output is.

    Attributes:
        version: the version of weightsmith that wrote it.
        arithmetic: what computed it; another may differ in a last digit.
        recipe: the whole recipe, as YAML.
        shard_size: most bytes of tensors in a file.
        inputs: the files that were read.
        contents: path of an input -> hash of all of it, where that was asked for.
        tensors: every tensor by name.
        files: relative path -> hash of every other file, and of the header of every file of weights.
    """

    version: str
    arithmetic: str
    recipe: str
    shard_size: int
    inputs: tuple[Identity, ...]
    contents: Mapping[str, str]
    tensors: Mapping[str, Entry]
    files: Mapping[str, str]

    def to_text(self) -> str:
        """Return the manifest as JSON, sealed. Its length depends on everything but the hashes."""
        content = {
            "format": FORMAT,
            "seal": UNKNOWN,
            "weightsmith": self.version,
            "arithmetic": self.arithmetic,
            "recipe": self.recipe,
            "shard_size": self.shard_size,
            "inputs": [asdict(identity) for identity in self.inputs],
            "contents": dict(self.contents),
            "tensors": {
                name: {
                    "dtype": entry.dtype,
                    "shape": list(entry.shape),
                    "file": entry.file,
                    "xxh3": str(entry.digest),
                }
                for name, entry in self.tensors.items()
            },
            "files": dict(self.files),
        }
        text = json.dumps(content, separators=(",", ":"), ensure_ascii=True)
        return text.replace(_SEAL + UNKNOWN, _SEAL + hash_of(text.encode()), 1)


def read_manifest(text: str, where: str) -> Manifest:
    """Read a manifest.

    Args:
        text: the manifest.
        where: the file it is from, for errors.

    Raises:
        CheckpointError: if it is not one, or not as it was written.
    """
    try:
        content = json.loads(text)
        seal = content["seal"]
        if content["format"] != FORMAT:
            raise CheckpointError(f"{where}: a manifest of format {content['format']!r}; this version reads {FORMAT}")
        if hash_of(text.replace(_SEAL + seal, _SEAL + UNKNOWN, 1).encode()) != seal:
            raise CheckpointError(f"{where}: the manifest is not as it was written: its own hash does not fit")
        return Manifest(
            version=content["weightsmith"],
            arithmetic=content["arithmetic"],
            recipe=content["recipe"],
            shard_size=content["shard_size"],
            inputs=tuple(Identity(**identity) for identity in content["inputs"]),
            contents=content["contents"],
            tensors={
                name: Entry(entry["dtype"], tuple(entry["shape"]), entry["file"], Digest.parse(entry["xxh3"]))
                for name, entry in content["tensors"].items()
            },
            files=content["files"],
        )
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{where}: not a manifest of weightsmith: {type(error).__name__}: {error}") from error


def hash_of(content: Any) -> str:
    """Return the XXH3 hash of bytes: 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(content)


def hash_file(path: Path) -> str:
    """Return the XXH3 hash of a file's content."""
    found = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def hash_part(content: Any) -> bytes:
    """Return the hash of one block of a tensor."""
    return xxhash.xxh3_128_digest(content)


def join_parts(parts: Iterable[bytes]) -> str:
    """Return the hash of a tensor from those of its blocks, in order."""
    return hash_of(b"".join(parts))


def steps(nbytes: int, step: int) -> Sequence[tuple[int, int]]:
    """Return the start and stop of every block of a tensor of so many bytes."""
    return [(start, min(start + step, nbytes)) for start in range(0, nbytes, max(step, 1))]
