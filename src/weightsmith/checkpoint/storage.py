"""Where bytes are: files on this machine, and files behind a URL, both read by ranges."""

from __future__ import annotations

import errno
import gc
import os
import stat
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from weightsmith.checkpoint.open_files import OPEN_FILES
from weightsmith.errors import CheckpointError, UnsafeFileError

# Endings of files that hold weights.
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
WEIGHT_FILES = (".safetensors", *PICKLES)
_WEB = ("http://", "https://")
# Under which names fsspec's storages tell the version of a file, or when it was written.
_VERSIONS = ("ETag", "etag", "mtime", "Last-Modified", "LastModified", "last_modified", "updated", "created")


# What copy_file_range says where two files, or the filesystems they are on, do not go together.
_CANNOT_COPY = frozenset({errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF})


class Source(ABC):
    """A file that is read by ranges, from many threads at once.

    Attributes:
        path: the file's path or URL, as errors name it.
        size: its length in bytes when it was opened.
        modified: its modification time in nanoseconds; behind a URL, a number that changes with the file, or 0
            where the storage tells nothing of its version.
    """

    path: str
    size: int
    modified: int = 0

    def read(self, start: int, stop: int) -> bytearray | bytes:
        """Read bytes ``start`` to ``stop``.

        Raises:
            CheckpointError: if the file cannot be read or ends before ``stop``.
        """
        found = self._read(start, stop)
        self._check_length(start, stop, len(found))
        return found

    def read_into(self, start: int, buffer: npt.NDArray[np.uint8]) -> None:
        """Fill a buffer with the bytes from ``start`` on.

        Raises:
            CheckpointError: if the file cannot be read or ends before the buffer is full.
        """
        buffer[:] = np.frombuffer(self.read(start, start + len(buffer)), np.uint8)

    def read_parts(self, starts: Sequence[int], buffer: npt.NDArray[np.uint8]) -> None:
        """Fill the rows of a buffer with as many stretches of bytes: ``[stretches, bytes]``.

        Raises:
            CheckpointError: if the file cannot be read or ends before one of them does.
        """
        for start, part in zip(starts, buffer, strict=True):
            self.read_into(start, part)

    def prefetch(self, start: int, stop: int) -> bool:
        """Have the bytes brought into memory without waiting for them; return whether the storage can do so."""
        return False

    def copy_to(self, start: int, stop: int, handle: int, offset: int) -> bool:
        """Copy bytes into an open file without passing them through this process, where that is possible.

        Args:
            start: first byte.
            stop: the byte after the last.
            handle: descriptor of the file to write to.
            offset: where to write in it.

        Returns:
            Whether they were copied; if not, read and write them.

        Raises:
            CheckpointError: if the file ends before ``stop``.
            OSError: if the other file cannot be written.
        """
        return False

    def _check_length(self, start: int, stop: int, count: int) -> None:
        if count != stop - start:
            # Nothing read says only that the file ends somewhere before.
            end = f"at byte {start + count:,}" if count else f"before byte {start + 1:,}"
            raise CheckpointError(
                f"{self.path} ends {end}, and bytes up to {stop:,} are needed; it was "
                f"{self.size:,} bytes long when it was opened: it is cut short or has been changed since"
            )

    @abstractmethod
    def _read(self, start: int, stop: int) -> bytearray | bytes:
        """Read as many of these bytes as there are."""


class LocalSource(Source):
    """A file on this machine.

    It is read with ``preadv`` into memory of our own rather than mapped: mapped pages would count as the
    process's memory, and a file that shrinks under a mapping kills the process instead of raising an error. Where
    many files are open, it is closed while nobody reads from it; see :mod:`weightsmith.checkpoint.open_files`.

    Attributes:
        handle: its descriptor, or -1 while it is closed.
        users: how many threads read from it now.
        used: when it was used last.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = str(path)
        self.handle = -1
        self.users = self.used = 0
        self._known: tuple[int, ...] = ()
        OPEN_FILES.acquire(self)
        OPEN_FILES.release(self)

    def open(self) -> None:
        """Open the file; at any but the first time it must be what it was then."""
        try:
            handle, status = open_regular(self.path)
        except OSError as error:
            again = " again" if self._known else ""
            raise CheckpointError(f"cannot open {self.path}{again}: {error.strerror}") from error
        found = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        if self._known and found != self._known:
            os.close(handle)
            raise CheckpointError(
                f"{self.path} was changed while it was read: the result would be of both states; leave it alone, and "
                "begin anew with --restart"
            )
        self.handle, self._known = handle, found
        self.size, self.modified = status.st_size, status.st_mtime_ns

    def close(self) -> None:
        """Close the file until it is needed again."""
        if self.handle >= 0:
            os.close(self.handle)
            self.handle = -1

    def _read(self, start: int, stop: int) -> bytearray:
        buffer = bytearray(stop - start)
        count = self._fill(start, memoryview(buffer))
        return buffer if count == len(buffer) else buffer[:count]

    def read_into(self, start: int, buffer: npt.NDArray[np.uint8]) -> None:
        """See :meth:`Source.read_into`; nothing is copied on the way."""
        self._check_length(start, start + len(buffer), self._fill(start, memoryview(buffer.data)))

    def read_parts(self, starts: Sequence[int], buffer: npt.NDArray[np.uint8]) -> None:
        """See :meth:`Source.read_parts`; the file is looked up once for all of them."""
        view, length = memoryview(buffer.reshape(-1).data), buffer.shape[1]
        cut = []
        try:
            with self._open() as own:
                for place, start in enumerate(starts):
                    if os.preadv(own, [view[place * length : (place + 1) * length]], start) != length:
                        cut.append(place)
        except OSError as error:
            raise CheckpointError(f"cannot read {self.path}: {error.strerror}") from error
        # Cut short by a signal, or by the end of the file.
        for place in cut:
            self.read_into(starts[place], buffer[place])

    def prefetch(self, start: int, stop: int) -> bool:
        """See :meth:`Source.prefetch`."""
        if not hasattr(os, "posix_fadvise"):
            return False
        try:
            with self._open() as own:
                os.posix_fadvise(own, start, stop - start, os.POSIX_FADV_WILLNEED)
        except CheckpointError:
            # Whoever reads it will be told.
            return False
        return True

    def copy_to(self, start: int, stop: int, handle: int, offset: int) -> bool:
        """See :meth:`Source.copy_to`; a filesystem that can share blocks between files does."""
        if not hasattr(os, "copy_file_range"):
            return False
        done = 0
        with self._open() as own:
            while start + done < stop:
                try:
                    count = os.copy_file_range(own, handle, stop - start - done, start + done, offset + done)
                except OSError as error:
                    if error.errno in _CANNOT_COPY:
                        return False
                    raise
                if count == 0:
                    self._check_length(start, stop, done)
                done += count
        return True

    def _fill(self, start: int, view: memoryview) -> int:
        """Read until the view is full or the file ends, and return how many bytes were read."""
        done = 0
        # Not by the context below: there may be many thousands of small reads.
        own = OPEN_FILES.acquire(self)
        try:
            while done < len(view):
                count = os.preadv(own, [view[done:]], start + done)
                if count == 0:
                    break
                done += count
        except OSError as error:
            raise CheckpointError(f"cannot read {self.path}: {error.strerror}") from error
        finally:
            OPEN_FILES.release(self)
        return done

    @contextmanager
    def _open(self) -> Iterator[int]:
        """Give the file's descriptor, which nobody closes meanwhile."""
        handle = OPEN_FILES.acquire(self)
        try:
            yield handle
        finally:
            OPEN_FILES.release(self)

    def __del__(self) -> None:
        if getattr(self, "handle", -1) >= 0:
            os.close(self.handle)


def open_regular(path: str | os.PathLike[str]) -> tuple[int, os.stat_result]:
    """Open a file for reading.

    Returns:
        Its descriptor, and what it is. It is opened first and looked at then, so that what is read is what was
        looked at.

    Raises:
        UnsafeFileError: if it is a pipe, a device or the like, which could be waited for or read for ever.
        OSError: if there is no such file, or it cannot be opened.
    """
    try:
        # Without O_NONBLOCK, to open a pipe is to wait for someone who writes to it.
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except ValueError as error:
        raise UnsafeFileError(f"{os.fspath(path)!r} cannot be the name of a file: {error}") from error
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise UnsafeFileError(f"{path} is no regular file but a device or a socket") from error
        if error.errno != errno.EMFILE:
            raise
        # Checkpoints that nobody uses any more hold their files until the garbage collector finds them.
        gc.collect()
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode):
        os.close(handle)
        raise UnsafeFileError(f"{path} is no regular file but a {_kind(status.st_mode)}")
    return handle, status


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
    return kinds.get(stat.S_IFMT(mode), "device")


def read_whole(path: str, largest: int) -> bytes:
    """Read a small file, here or behind a URL.

    Raises:
        CheckpointError: if it cannot be read, or has more bytes than ``largest``.
        UnsafeFileError: if it is no regular file.
    """
    source = open_source(path)
    if source.size > largest:
        raise CheckpointError(f"{path} has {source.size:,} bytes; at most {largest:,} are read")
    return bytes(source.read(0, source.size))


class RemoteSource(Source):
    """A file behind a URL that fsspec understands; only the ranges that are asked for are transferred."""

    def __init__(self, url: str) -> None:
        self.path = url
        self._system, self._key = filesystem(url)
        try:
            facts = self._system.info(self._key)
        except FileNotFoundError as error:
            raise CheckpointError(f"there is nothing at {url}") from error
        except Exception as error:
            raise CheckpointError(f"cannot open {url}: {type(error).__name__}: {error}") from error
        if not isinstance(facts.get("size"), int):
            raise CheckpointError(f"{url} does not tell its length, so it cannot be read by ranges")
        self.size = facts["size"]
        self.modified = _version(facts)

    def _read(self, start: int, stop: int) -> bytes:
        if start == stop:
            return b""
        try:
            found = self._system.cat_file(self._key, start=start, end=stop)
        except Exception as error:
            raise CheckpointError(f"cannot read {self.path}: {type(error).__name__}: {error}") from error
        if len(found) > stop - start:
            raise CheckpointError(
                f"asked for {stop - start:,} bytes of {self.path}, the server sent {len(found):,}: it does not serve "
                "ranges; download the file first"
            )
        return bytes(found)


class SourceRange(Source):
    """Some of a file's bytes, as a file of its own."""

    def __init__(self, source: Source, start: int, length: int) -> None:
        """Take ``length`` bytes from ``start`` on, which the file must have."""
        self.path = source.path
        self.size = length
        self.modified = source.modified
        self._source = source
        self._start = start

    def _read(self, start: int, stop: int) -> bytearray | bytes:
        stop = max(min(stop, self.size), start)
        return self._source.read(self._start + start, self._start + stop)

    def read_into(self, start: int, buffer: npt.NDArray[np.uint8]) -> None:
        """See :meth:`Source.read_into`."""
        self._check_length(start, start + len(buffer), max(min(len(buffer), self.size - start), 0))
        self._source.read_into(self._start + start, buffer)

    def prefetch(self, start: int, stop: int) -> bool:
        """See :meth:`Source.prefetch`."""
        return self._source.prefetch(self._start + start, self._start + stop)

    def copy_to(self, start: int, stop: int, handle: int, offset: int) -> bool:
        """See :meth:`Source.copy_to`."""
        return self._source.copy_to(self._start + start, self._start + stop, handle, offset)


def _version(facts: Mapping[str, Any]) -> int:
    told = next((facts[name] for name in _VERSIONS if facts.get(name)), None)
    return 0 if told is None else int.from_bytes(blake2b(str(told).encode(), digest_size=7).digest(), "little")


_SYSTEMS_LOCK = threading.Lock()


def is_url(path: str) -> bool:
    """Whether this is a URL rather than a path."""
    return "://" in path


def filesystem(url: str) -> tuple[Any, str]:
    """Return the fsspec filesystem of a URL, and the file's key in it.

    Raises:
        CheckpointError: if fsspec, or its package for this kind of URL, is not installed.
    """
    try:
        import fsspec
    except ImportError as error:
        raise CheckpointError(f"reading {url} needs more packages: pip install 'weightsmith[remote]'") from error
    try:
        with _SYSTEMS_LOCK:
            system, key = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise CheckpointError(
            f"cannot read {url}: {error}; for s3://, gs:// and https:// install 'weightsmith[remote]'"
        ) from error
    return system, str(key)


def open_source(path: str) -> Source:
    """Open a path or a URL for reading by ranges."""
    return RemoteSource(path) if is_url(path) else LocalSource(path)


def list_folder(path: str) -> list[str]:
    """Return the names of the files and folders directly in a folder, or [] if it is not a folder; sorted."""
    if not is_url(path):
        try:
            return sorted(os.listdir(path)) if os.path.isdir(path) else []
        except OSError as error:
            raise CheckpointError(f"cannot list {path}: {error.strerror}") from error
    if path.endswith(WEIGHT_FILES):
        return []
    system, key = filesystem(path)
    try:
        if path.startswith(_WEB) and system.info(key).get("mimetype") != "text/html":
            # To list a web address is to load it and look for links: of a file, that would be all of it.
            return []
        found = system.ls(key, detail=False)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except Exception as error:
        raise CheckpointError(f"cannot list {path}: {type(error).__name__}: {error}") from error
    names = {str(name).rstrip("/").rsplit("/", 1)[-1] for name in found} - {key.rsplit("/", 1)[-1], ""}
    for name in names:
        if not is_file_name(name):
            raise UnsafeFileError(f"{path} lists {name!r}, which cannot be the name of a file in it")
    return sorted(names)


def is_file_name(name: str) -> bool:
    """Whether a text names a file in a folder, and nothing else: no way out of it, no text that is no name."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return name not in ("", ".", "..") and not any(letter in name for letter in "/\\\0")


def join(folder: str, name: str) -> str:
    """Return the path of a file in a folder, or of nothing more than the folder itself."""
    return f"{folder.rstrip('/')}/{name}" if is_url(folder) else str(Path(folder) / name)


def check_inside(path: str, file: str) -> None:
    """Refuse a link out of a folder, unless it is the hub cache's own: snapshots link to blobs beside them.

    Raises:
        UnsafeFileError: if the file lies elsewhere.
    """
    if is_url(path):
        return
    real = Path(os.path.realpath(os.path.join(path, file)))
    folder = Path(os.path.realpath(path))
    if real.is_relative_to(folder):
        return
    # models--org--name/snapshots/COMMIT, and a pipeline's components in it, link to models--org--name/blobs.
    for snapshot in (folder, *folder.parents):
        if snapshot.parent.name == "snapshots" and real.is_relative_to(snapshot.parent.parent / "blobs"):
            return
    raise UnsafeFileError(f"{os.path.join(path, file)} is a link out of its folder, to {real}")
