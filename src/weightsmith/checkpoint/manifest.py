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
from weightsmith.checkpoint.storage import is_file_name, open_regular
from weightsmith.errors import CheckpointError, UnsafeFileError, shown

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
        manifest = Manifest(
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
        _check(manifest)
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise CheckpointError(f"{where}: not a manifest of weightsmith: {reason}") from error
    return manifest


def _check(manifest: Manifest) -> None:
    """Refuse what no merge writes: a seal keeps accidents out, not somebody who writes a manifest of their own."""
    texts = [
        manifest.version,
        manifest.arithmetic,
        manifest.recipe,
        *manifest.contents.values(),
        *manifest.files.values(),
    ]
    texts += [text for entry in manifest.tensors.values() for text in (entry.dtype, entry.file, entry.digest.hash)]
    texts += [text for one in manifest.inputs for text in (one.path, one.header)]
    numbers = [manifest.shard_size, *(number for one in manifest.inputs for number in (one.size, one.modified))]
    numbers += [number for entry in manifest.tensors.values() for number in (*entry.shape, entry.digest.step)]
    if not all(isinstance(text, str) for text in texts) or not all(type(number) is int for number in numbers):
        raise ValueError("a text or a number is none")
    if min(numbers) < 0 or manifest.shard_size == 0:
        raise ValueError("a number is below what it can be")
    if "\n" not in manifest.recipe:
        # One line would be taken for the path of a file.
        raise ValueError("the recipe is no recipe")
    for file in {*manifest.files, *(entry.file for entry in manifest.tensors.values())}:
        if not all(map(is_file_name, file.split("/"))):
            raise UnsafeFileError(f"the manifest names the file {shown(file)}, which is not in its folder")


def hash_of(content: Any) -> str:
    """Return the XXH3 hash of bytes: 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(content)


def hash_file(path: Path) -> str:
    """Return the XXH3 hash of a file's content.

    Raises:
        UnsafeFileError: if it is no regular file.
        OSError: if it cannot be read.
    """
    found = xxhash.xxh3_128()
    with open(open_regular(path)[0], "rb") as file:
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
