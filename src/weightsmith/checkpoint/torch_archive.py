"""The zip archives of ``torch.save``, checked before anything in them is used."""

from __future__ import annotations

import io
import zipfile

from weightsmith.checkpoint.storage import Source
from weightsmith.errors import CheckpointError, UnsafeFileError, shown

# A tensor takes about 120 bytes.
_LARGEST_PICKLE = 32_000_000
_MOST_MEMBERS = 200_000
# Of the archive's directory, which zipfile reads at once: a file may claim terabytes that a disk holds as a hole.
_LARGEST_READ = 24_000_000
_LOCAL_HEADER = 30


def open_archive(source: Source) -> tuple[dict[str, tuple[int, int]], bytes]:
    """Find the parts of an archive.

    Args:
        source: the file.

    Returns:
        The place of every storage, key -> (first byte, length), and the pickle that describes the tensors.

    Raises:
        UnsafeFileError: if members are compressed, encrypted, doubled or overlapping, which torch never writes.
        CheckpointError: if the file is no such archive, is cut short, or holds a TorchScript program.
    """
    start = bytes(source.read(0, min(source.size, 4)))
    if start != b"PK\x03\x04":
        raise CheckpointError(
            f"{source.path} is not a zip file of torch.save; files from before PyTorch 1.6 are pickles "
            "alone, which cannot be read safely and lazily: load it with torch, and save it again"
        )
    try:
        archive = zipfile.ZipFile(_Window(source))
    except CheckpointError:
        raise
    except Exception as error:
        # zipfile raises what it likes: BadZipFile, struct.error, NotImplementedError, UnicodeDecodeError, …
        raise CheckpointError(f"{source.path} is a damaged zip file: {error}") from error
    entries = archive.infolist()
    if len(entries) > _MOST_MEMBERS:
        raise CheckpointError(f"{source.path} has {len(entries):,} members; at most {_MOST_MEMBERS:,} are read")
    pickles = [e for e in entries if e.filename == "data.pkl" or e.filename.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CheckpointError(f"{source.path} has {len(pickles)} members named data.pkl; torch writes one")
    prefix = pickles[0].filename.removesuffix("data.pkl")
    if any(e.filename.startswith((f"{prefix}code/", f"{prefix}constants.pkl")) for e in entries):
        raise CheckpointError(f"{source.path} is a TorchScript program, not a state dict; save its state_dict()")
    _check_members(entries, source)
    if pickles[0].file_size > _LARGEST_PICKLE:
        raise CheckpointError(f"{source.path}: its pickle has {pickles[0].file_size:,} bytes, too many")
    places = {e.filename: (_data_start(e, source), e.file_size) for e in entries}
    _check_apart(entries, places, source)
    order = next((e for e in entries if e.filename == f"{prefix}byteorder"), None)
    if order is not None and bytes(_slice(source, places[order.filename])).strip() != b"little":
        raise CheckpointError(f"{source.path} was written on a big-endian machine, which is not supported")
    storages = {
        name.removeprefix(f"{prefix}data/"): place
        for name, place in places.items()
        if name.startswith(f"{prefix}data/")
    }
    return storages, bytes(_slice(source, places[pickles[0].filename]))


def _check_members(entries: list[zipfile.ZipInfo], source: Source) -> None:
    """Refuse archives that torch does not write: compressed, encrypted or doubled members."""
    names = set()
    for entry in entries:
        where = f"{source.path}: member {shown(entry.filename)}"
        if entry.flag_bits & 0x1:
            raise UnsafeFileError(f"{where} is encrypted")
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise UnsafeFileError(f"{where} is compressed, which torch.save never does; it was not unpacked")
        if entry.filename in names:
            raise UnsafeFileError(f"{where} is in the archive twice")
        names.add(entry.filename)
        if entry.header_offset < 0:
            raise UnsafeFileError(f"{where} begins before the file does")
        if entry.header_offset + _LOCAL_HEADER + entry.file_size > source.size:
            raise CheckpointError(f"{where} reaches beyond the end of the file: it is cut short")


def _check_apart(entries: list[zipfile.ZipInfo], places: dict[str, tuple[int, int]], source: Source) -> None:
    """Refuse members whose bytes run into the next one's header, now that it is known where they begin."""
    end, before = 0, ""
    for entry in sorted(entries, key=lambda e: e.header_offset):
        if entry.header_offset < end:
            raise UnsafeFileError(f"{source.path}: member {shown(entry.filename)} overlaps {shown(before)}")
        start, length = places[entry.filename]
        end, before = start + length, entry.filename


def _data_start(entry: zipfile.ZipInfo, source: Source) -> int:
    """Return where a member's bytes begin: its local header has name and padding of its own lengths."""
    header = bytes(source.read(entry.header_offset, entry.header_offset + _LOCAL_HEADER))
    if header[:4] != b"PK\x03\x04":
        raise CheckpointError(f"{source.path}: member {shown(entry.filename)} is not where the archive says")
    name, extra = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
    start = entry.header_offset + _LOCAL_HEADER + name + extra
    if start + entry.file_size > source.size:
        raise CheckpointError(f"{source.path}: member {shown(entry.filename)} reaches beyond the end of the file")
    return start


def _slice(source: Source, place: tuple[int, int]) -> bytes | bytearray:
    return source.read(place[0], place[0] + place[1])


class _Window(io.RawIOBase):
    """A source as a file that :mod:`zipfile` can seek in."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._position = 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._source.size}[whence]
        if start + offset < 0:
            raise OSError("a position before the start of the file")
        self._position = start + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        stop = self._source.size if size is None or size < 0 else min(self._position + size, self._source.size)
        start = min(self._position, stop)
        if stop - start > _LARGEST_READ:
            raise CheckpointError(
                f"{self._source.path} claims a directory of {stop - start:,} bytes; at most {_LARGEST_READ:,} are read"
            )
        self._position = stop
        return bytes(self._source.read(start, stop))
