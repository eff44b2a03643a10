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
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from weightsmith import dtypes
from weightsmith.checkpoint.checkpoint import Identity
from weightsmith.checkpoint.safetensors import read_metadata
from weightsmith.checkpoint.storage import LocalSource, Source, is_file_name, open_regular, read_whole
from weightsmith.errors import CheckpointError, UnsafeFileError, shown

MANIFEST_FILE = "weightsmith.json"
# What a manifest in a header calls the other texts there.
_TEXTS = "metadata"
MANIFEST_KEY = "weightsmith"
FORMAT = 1
UNKNOWN = "0" * 32
_STEP_DIGITS = 10
# Sign, 17 digits with a point, and an exponent of up to three digits.
_NUMBER_DIGITS = 24
_SEAL = '"seal":"'
_DIGEST = re.compile(r"[0-9a-f]{32}:[0-9a-f]{10}")
# Blocks of one tensor: with the executor's, a tensor of two terabytes. A step of one byte would keep us for ever.
_MOST_STEPS = 1 << 22
# A manifest is as long as its tensors are many; what is longer than this is none.
_LARGEST_MANIFEST = 256_000_000
# Bytes that are read at a time, whatever a manifest says was hashed at a time.
_AT_A_TIME = 8 << 20


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
        """Read what ``str`` gave.

        Raises:
            ValueError: if it is not that.
        """
        if not _DIGEST.fullmatch(text):
            raise ValueError(f"{text!r} is no hash")
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
        state: the parameters by which the output takes part in a merge that goes on with it, None for one whose value
            is not known; or None where the merge cannot be gone on with.
    """

    version: str
    arithmetic: str
    recipe: str
    shard_size: int
    inputs: tuple[Identity, ...]
    contents: Mapping[str, str]
    tensors: Mapping[str, Entry]
    files: Mapping[str, str]
    state: Mapping[str, float | None] | None = None

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
        if self.state is not None:
            content["state"] = {name: _fixed(value) for name, value in self.state.items()}
        text = json.dumps(content, separators=(",", ":"), ensure_ascii=True)
        return text.replace(_SEAL + UNKNOWN, _SEAL + hash_of(text.encode()), 1)


def read_manifest(text: str, where: str) -> Manifest:
    """Read a manifest.

    Args:
        text: the manifest.
        where: the file it is from, for errors.

    Raises:
        CheckpointError: if it is not one, or not as it was written.
        UnsafeFileError: if it names a file that is not in its folder.
    """
    try:
        content = json.loads(text)
        seal = _a(str, content["seal"])
        if content["format"] != FORMAT:
            raise CheckpointError(f"{where}: a manifest of format {content['format']!r}; this version reads {FORMAT}")
        if hash_of(text.replace(_SEAL + seal, _SEAL + UNKNOWN, 1).encode()) != seal:
            raise CheckpointError(f"{where}: the manifest is not as it was written: its own hash does not fit")
        found = Manifest(
            version=_a(str, content["weightsmith"]),
            arithmetic=_a(str, content["arithmetic"]),
            recipe=_recipe(content["recipe"]),
            shard_size=_count(content["shard_size"], least=1),
            inputs=tuple(_identity(identity) for identity in _a(list, content["inputs"])),
            contents=_texts(content["contents"]),
            tensors={name: _entry(entry) for name, entry in _a(dict, content["tensors"]).items()},
            files=_texts(content["files"]),
            state=_state(content["state"]) if "state" in content else None,
        )
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise CheckpointError(f"{where}: not a manifest of weightsmith: {reason}") from error
    for file in dict.fromkeys((*(entry.file for entry in found.tensors.values()), *found.files)):
        if not all(map(is_file_name, file.split("/"))):
            raise UnsafeFileError(f"{where}: the manifest names the file {shown(file)}, which is not in its folder")
    return found


def is_like_manifest(text: str) -> bool:
    """Whether a text begins as manifests do; it may still be none."""
    return text.startswith(f'{{"format":{FORMAT},{_SEAL}')


def _a(kind: type, value: Any) -> Any:
    """Return a JSON value that must be of a kind."""
    if type(value) is not kind:
        raise TypeError(f"{kind.__name__} expected, not {type(value).__name__}")
    return value


def _recipe(value: Any) -> str:
    if "\n" not in _a(str, value):
        # One line would be taken for the path of a file.
        raise ValueError("the recipe is no recipe")
    return str(value)


def _count(value: Any, least: int = 0) -> int:
    if _a(int, value) < least:
        raise ValueError(f"{value} is below what it can be")
    return int(value)


def _fixed(value: float | None) -> str:
    """Write a number in full, in a text whose length is always the same."""
    return ("" if value is None else f"{value:.16e}").ljust(_NUMBER_DIGITS)


def _state(value: Any) -> dict[str, float | None]:
    return {name: float(text) if text.strip() else None for name, text in _texts(value).items()}


def _texts(value: Any) -> dict[str, str]:
    return {name: _a(str, text) for name, text in _a(dict, value).items()}


def _identity(value: Any) -> Identity:
    found = Identity(**_a(dict, value))
    for text in (found.path, found.header):
        _a(str, text)
    _count(found.size)
    # Times before 1970 are below 0.
    _a(int, found.modified)
    return found


def _entry(value: Any) -> Entry:
    code = _a(str, value["dtype"])
    dtype = dtypes.from_code(code)
    shape = tuple(_a(int, length) for length in _a(list, value["shape"]))
    digest = Digest.parse(_a(str, value["xxh3"]))
    if dtype is None or any(length < 0 for length in shape):
        raise ValueError(f"{code!r} {list(shape)} is no tensor")
    nbytes = math.prod(shape) * dtype.itemsize
    # Nothing takes no steps, something takes some: whole elements each.
    fits = 0 < digest.step <= nbytes and digest.step % dtype.itemsize == 0 and nbytes <= digest.step * _MOST_STEPS
    if not (fits if nbytes else digest.step == 0):
        raise ValueError(f"{nbytes:,} bytes are not hashed by {digest.step:,}")
    return Entry(code, shape, _a(str, value["file"]), digest)


def hash_of(content: Any) -> str:
    """Return the XXH3 hash of bytes: 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(content)


def hash_texts(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the entry by which a file's manifest knows the other texts of its header; none where there are none."""
    return {_TEXTS: hash_of(json.dumps(sorted(metadata.items())).encode())} if metadata else {}


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


def hash_range(source: Source, start: int, stop: int) -> Any:
    """Return the XXH3 state of some bytes of a file, which are never held as a whole.

    Raises:
        CheckpointError: if they cannot be read.
    """
    found = xxhash.xxh3_128()
    for begin in range(start, stop, _AT_A_TIME):
        found.update(source.read(begin, min(begin + _AT_A_TIME, stop)))
    return found


def hash_part(content: Any) -> bytes:
    """Return the hash of one block of a tensor."""
    return xxhash.xxh3_128_digest(content)


def join_parts(parts: Sequence[bytes]) -> str:
    """Return the hash of a tensor from those of its blocks, in order."""
    return hash_of(b"".join(parts))


def steps(nbytes: int, step: int) -> Sequence[tuple[int, int]]:
    """Return the start and stop of every block of a tensor of so many bytes."""
    return [(start, min(start + step, nbytes)) for start in range(0, nbytes, max(step, 1))]


def manifest_of(root: Path) -> Manifest:
    """Return the manifest of an output.

    Args:
        root: the folder, or the ``.safetensors`` file.

    Raises:
        CheckpointError: if it has none, or one that is not as it was written.
    """
    text, where = manifest_text(root)
    if text is None:
        lacks = f"{root} has no {MANIFEST_FILE}" if root.is_dir() else f"the header of {root} has no manifest"
        raise CheckpointError(f"{lacks}: it was not written by weightsmith")
    return read_manifest(text, where)


def manifest_text(root: Path) -> tuple[str | None, str]:
    """Return the manifest of a folder or file, None if it has none, and the file that it is in."""
    if not root.is_dir():
        return _text_within(root), str(root)
    file = root / MANIFEST_FILE
    return _text_of(file) if os.path.lexists(file) else None, str(file)


def _text_within(file: Path) -> str | None:
    """Return the manifest in a header; under another name too, for a flipped bit in its name must not hide it."""
    metadata = read_metadata(LocalSource(file))
    found = [text for text in metadata.values() if is_like_manifest(text)]
    return metadata.get(MANIFEST_KEY, found[0] if found else None)


def _text_of(file: Path) -> str:
    try:
        text = read_whole(str(file), _LARGEST_MANIFEST).decode("ascii")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file}: the manifest is not as it was written (byte {error.start})") from error
    if not text.endswith("\n"):
        raise CheckpointError(f"{file}: the manifest is not as it was written: it is cut short")
    return text[:-1]
