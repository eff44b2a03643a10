"""A layer between the code under test and the files it writes, in which any call can fail, or be the process's last.

Everything below one folder is watched: calls are counted, and one of them, by its number, fails, is done by half, or
ends the process. A power cut ends the process too, and takes back what was not synced: pages of files back to what
they held at the last ``fsync`` (any of them may have reached the disk, as on a real one), and names made, renamed or
removed in a folder since that folder was synced (the last so many of them, in each folder on its own).

Code runs under the layer in a forked child, so that a kill is one: no ``finally`` runs, and no lock is given back.
"""

from __future__ import annotations

import builtins
import errno
import io
import itertools
import json
import os
import random
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

from weightsmith.checkpoint import staging
from weightsmith.errors import WeightsmithError

KILLED, REFUSED, CRASHED, TOUCHED = 137, 10, 11, 99
_PAGE = 512
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

Kind = Literal["none", "raise", "half", "half-kill", "before", "after", "power"]


@dataclass(frozen=True)
class Fault:
    """What happens at a call.

    Attributes:
        at: the number of the call, from 1.
        kind: ``raise`` an OSError instead of the call; write ``half`` and raise, or ``half-kill``; end the process
            ``before`` or ``after`` the call; ``power`` cuts the power after it.
        number: of the error.
        stays: whether every later call fails too.
        seed: what a power cut takes back.
    """

    at: int = 0
    kind: Kind = "none"
    number: int = errno.EIO
    stays: bool = False
    seed: int = 0


@dataclass
class Outcome:
    """How a child ended: its exit code, what it was told to say, and the calls it made."""

    code: int
    text: str = ""
    calls: list[str] = field(default_factory=list)


def run(action: Callable[[], Any], watched: Path, fault: Fault = Fault(), untouched: Path | None = None) -> Outcome:
    """Run an action in a forked child under the layer.

    Args:
        action: what to do.
        watched: the folder whose calls are counted; a folder ``graveyard`` is made beside it.
        fault: what goes wrong.
        untouched: a folder in which nothing may be changed or opened for writing.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _in_child(action, _Layer(watched, fault, untouched), writer)
    os.close(writer)
    with open(reader, "rb") as said:
        text = said.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    found = json.loads(text) if text else {}
    return Outcome(code, found.get("text", ""), found.get("calls", []))


def kill_after(seconds: float, action: Callable[[], Any], watched: Path, delay: float) -> Outcome:
    """Run an action in a forked child whose calls each take a while, and kill it after some time.

    Args:
        seconds: when to send SIGKILL.
        action: what to do.
        watched: see :func:`run`.
        delay: seconds that each call takes longer.

    Returns:
        How it ended, and the calls it had begun by then.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        layer = _Layer(watched, Fault(), None)
        layer.told, layer.delay = writer, delay
        _in_child(action, layer, os.open(os.devnull, os.O_WRONLY))
    os.close(writer)
    timer = threading.Timer(seconds, os.kill, (child, signal.SIGKILL))
    timer.start()
    with open(reader) as said:
        calls = said.read().splitlines()
    timer.cancel()
    timer.join()
    return Outcome(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), calls=calls)


def _in_child(action: Callable[[], Any], layer: _Layer, writer: int) -> NoReturn:
    code, text = CRASHED, ""
    try:
        layer.install()
        action()
        code = 0
    except WeightsmithError as error:
        code, text = REFUSED, str(error)
    except BaseException:
        text = traceback.format_exc()
    finally:
        layer.off = True
        with layer.plain_open(writer, "wb") as said:
            said.write(json.dumps({"text": text, "calls": layer.calls}).encode())
        os._exit(code)


class _Layer:
    def __init__(self, watched: Path, fault: Fault, untouched: Path | None) -> None:
        self.watched, self.untouched = os.path.realpath(watched), untouched and os.path.realpath(untouched)
        self.fault = fault
        self.calls: list[str] = []
        self.off = False
        self.told: int | None = None
        self.delay = 0.0
        self.plain: dict[str, Any] = {}
        self.plain_open = io.open
        self.lock = threading.RLock()
        self.opened: dict[int, str] = {}
        self.graveyard = Path(self.watched).parent / "graveyard"
        self.graveyard.mkdir(exist_ok=True)
        self.graves = itertools.count()
        # inode -> (descriptor, content at the last sync)
        self.dirty: dict[tuple[int, int], tuple[int, bytes]] = {}
        # What was done to names: (inode of the folder, how to take it back), in order.
        self.names: list[tuple[tuple[int, int], Callable[[], None]]] = []

    def install(self) -> None:
        by_path = ("open", "mkdir", "unlink", "remove", "rmdir", "rename", "replace", "scandir", "listdir")
        by_handle = ("write", "pwrite", "ftruncate", "posix_fallocate", "fsync", "copy_file_range", "close")
        for name in (*by_path, *by_handle, "truncate", "link", "symlink", "chmod", "utime"):
            self.plain[name] = getattr(os, name)
        for name in by_path:
            setattr(os, name, self._by_path(name))
        for name in by_handle:
            setattr(os, name, self._by_handle(name))
        for name in ("truncate", "link", "symlink", "chmod", "utime"):
            setattr(os, name, self._never(name))
        self.plain["exchange"] = staging._exchange
        staging._exchange = self._by_path("exchange")
        io.open = builtins.open = self._open  # type: ignore[assignment]

    # -- which calls --------------------------------------------------------------------------------------------------

    def _by_path(self, name: str) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            path = None if self.off else self._path(arguments, named)
            if path is not None and self._inside(path, self.untouched):
                writes = name not in ("open", "scandir", "listdir") or (name == "open" and arguments[1] & _WRITES)
                if writes:
                    os._exit(TOUCHED)
            if path is None or not self._inside(path, self.watched):
                return self.plain[name](*arguments, **named)
            with self.lock:
                return self._counted(name, path, arguments, named)

        return call

    def _by_handle(self, name: str) -> Any:
        def call(handle: int, *arguments: Any) -> Any:
            # The kernel's copy names its target second.
            target = arguments[0] if name == "copy_file_range" else handle
            if self.off or target not in self.opened:
                return self.plain[name](handle, *arguments)
            with self.lock:
                if name == "close":
                    del self.opened[handle]
                    return self.plain[name](handle)
                return self._counted(name, self.opened[target], (handle, *arguments), {})

        return call

    def _never(self, name: str) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            path = self._path(arguments, named)
            if not self.off and path and (self._inside(path, self.watched) or self._inside(path, self.untouched)):
                os._exit(TOUCHED)
            return self.plain[name](*arguments, **named)

        return call

    def _path(self, arguments: tuple[Any, ...], named: dict[str, Any]) -> str | None:
        first = arguments[0] if arguments else "."
        if isinstance(first, int):
            return self.opened.get(first)
        folder = named.get("dir_fd")
        start = os.getcwd() if folder is None else os.readlink(f"/proc/self/fd/{folder}")
        return os.path.join(start, os.fsdecode(first))

    @staticmethod
    def _inside(path: str, folder: str | None) -> bool:
        return folder is not None and (path == folder or path.startswith(folder + "/"))

    # -- what happens at a call ---------------------------------------------------------------------------------------

    def _counted(self, name: str, path: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        self.calls.append(f"{name} {os.path.relpath(path, self.watched)}")
        if self.told is not None:
            self.plain["write"](self.told, f"{self.calls[-1]}\n".encode())
            time.sleep(self.delay)
        fault, number = self.fault, len(self.calls)
        due = number == fault.at
        if due and fault.kind == "before":
            os._exit(KILLED)
        if (due or (fault.stays and number > fault.at)) and fault.kind in ("raise", "half"):
            if fault.kind == "half" and due and name in ("write", "pwrite"):
                content = memoryview(arguments[1])
                self._noted(name, path, (arguments[0], content[: len(content) // 2], *arguments[2:]), named)
            raise OSError(fault.number, os.strerror(fault.number), path)
        if due and fault.kind == "half-kill" and name in ("write", "pwrite"):
            content = memoryview(arguments[1])
            self._noted(name, path, (arguments[0], content[: len(content) // 2], *arguments[2:]), named)
            os._exit(KILLED)
        found = self._noted(name, path, arguments, named)
        if due and fault.kind in ("after", "half-kill"):
            os._exit(KILLED)
        if due and fault.kind == "power":
            self.off = True
            self._cut(random.Random(fault.seed))
        return found

    def _noted(self, name: str, path: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Do a call, and note how to take it back."""
        plain = self.plain[name]
        if name in ("scandir", "listdir"):
            return plain(*arguments, **named)
        if name == "fsync":
            # Not to the disk: what a sync is for is in the notes, and waiting for it would take the tests' time.
            self._synced(arguments[0])
            return None
        if name in ("write", "pwrite", "ftruncate", "posix_fallocate", "copy_file_range"):
            self._keep(arguments[1] if name == "copy_file_range" else arguments[0])
            return plain(*arguments)
        folder, base = self._folder(path), os.path.basename(path)
        if name == "open":
            return self._noted_open(path, folder, base, arguments, named)
        if name == "mkdir":
            plain(*arguments, **named)
            self._note(folder, lambda: shutil.rmtree(base, dir_fd=folder))
        elif name in ("unlink", "remove"):
            grave = self._bury(path)
            plain(*arguments, **named)
            self._note(folder, lambda: os.link(grave, base, dst_dir_fd=folder))
        elif name == "rmdir":
            plain(*arguments, **named)
            self._note(folder, lambda: os.mkdir(base, dir_fd=folder))
        elif name in ("rename", "replace", "exchange"):
            return self._noted_rename(name, path, os.fspath(arguments[1]))
        return None

    def _noted_open(self, path: str, folder: int, base: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> int:
        new = not os.path.lexists(path)
        old = b"" if new or not arguments[1] & os.O_TRUNC else Path(path).read_bytes()
        handle: int = self.plain["open"](*arguments, **named)
        self.opened[handle] = path
        if new:
            self._note(folder, lambda: os.unlink(base, dir_fd=folder))
        elif arguments[1] & os.O_TRUNC:
            self._keep(handle, old)
        return handle

    def _noted_rename(self, name: str, source: str, target: str) -> bool:
        one, other = self._folder(source), self._folder(target)
        first, second = os.path.basename(source), os.path.basename(target)
        if name == "exchange":
            if not self.plain[name](Path(source), Path(target)):
                return False
            self._note(other, lambda: self.plain["exchange"](_at(one, first), _at(other, second)))
            return True
        replaced = os.path.isdir(target) and not os.path.islink(target)
        grave = self._bury(target) if os.path.lexists(target) and not replaced else None
        self.plain[name](source, target)

        def back() -> None:
            os.rename(second, first, src_dir_fd=other, dst_dir_fd=one)
            if grave is not None:
                os.link(grave, second, dst_dir_fd=other)
            elif replaced:
                os.mkdir(second, dir_fd=other)

        self._note(other, back)
        return True

    # -- what a power cut takes back ----------------------------------------------------------------------------------

    def _folder(self, path: str) -> int:
        """Open the folder that a name is in, which may be renamed later."""
        found: int = self.plain["open"](os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
        return found

    def _bury(self, path: str) -> str:
        grave = str(self.graveyard / f"{os.getpid()}-{next(self.graves)}")
        self.plain["link"](path, grave, follow_symlinks=False)
        return grave

    def _note(self, folder: int, back: Callable[[], None]) -> None:
        self.names.append((_inode(folder), back))

    def _keep(self, handle: int, content: bytes | None = None) -> None:
        """Keep what a file held when it was last synced, before it is changed for the first time since."""
        key = _inode(handle)
        if key not in self.dirty:
            own: int = self.plain["open"](f"/proc/self/fd/{handle}", os.O_RDWR)
            self.dirty[key] = own, os.pread(own, 1 << 30, 0) if content is None else content

    def _synced(self, handle: int) -> None:
        key = _inode(handle)
        self.dirty.pop(key, None)
        self.names = [(folder, back) for folder, back in self.names if folder != key]

    def _cut(self, rng: random.Random) -> NoReturn:
        for key in {folder for folder, _ in self.names}:
            mine = [i for i, (folder, _) in enumerate(self.names) if folder == key]
            for i in mine[: rng.randint(0, len(mine))]:
                self.names[i] = key, lambda: None
        for handle, old in self.dirty.values():
            new = os.pread(handle, 1 << 30, 0)
            length = rng.choice((len(old), len(new)))
            for start in range(0, length, _PAGE):
                page = rng.choice((old, new))[start : min(start + _PAGE, length)]
                page += b"\0" * (min(start + _PAGE, length) - start - len(page))
                self.plain["pwrite"](handle, page, start)
            self.plain["ftruncate"](handle, length)
        for _, back in reversed(self.names):
            # What was in a folder that is gone is gone with it.
            with suppress(FileNotFoundError, NotADirectoryError):
                back()
        os._exit(KILLED)

    # -- files opened by Python ---------------------------------------------------------------------------------------

    def _open(
        self,
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        *rest: Any,
        **named: Any,
    ) -> Any:
        if self.off or isinstance(file, int) or rest or named:
            return self.plain_open(file, mode, buffering, encoding, errors, newline, *rest, **named)
        flags = {"r": os.O_RDONLY, "w": os.O_WRONLY | os.O_CREAT | os.O_TRUNC, "a": os.O_WRONLY | os.O_CREAT}[mode[0]]
        if "+" in mode:
            flags = flags & ~os.O_WRONLY | os.O_RDWR
        raw = _Raw(file, flags)
        if buffering == 0:
            return raw
        buffered: Any = io.BufferedRandom(raw) if "+" in mode else None
        buffered = buffered or (io.BufferedReader(raw) if mode[0] == "r" else io.BufferedWriter(raw))
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)


class _Raw(io.RawIOBase):
    """What ``io.FileIO`` is, by calls that can be watched."""

    def __init__(self, path: Any, flags: int) -> None:
        self._handle = -1
        self._flags = flags
        self._handle = os.open(path, flags | os.O_CLOEXEC, 0o666)

    def fileno(self) -> int:
        return self._handle

    def readable(self) -> bool:
        return not self._flags & os.O_WRONLY

    def writable(self) -> bool:
        return bool(self._flags & (os.O_WRONLY | os.O_RDWR))

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return os.readv(self._handle, [buffer])

    def write(self, content: Any) -> int:
        return os.write(self._handle, content)

    def seek(self, position: int, whence: int = 0) -> int:
        return os.lseek(self._handle, position, whence)

    def truncate(self, size: int | None = None) -> int:
        size = self.tell() if size is None else size
        os.ftruncate(self._handle, size)
        return size

    def close(self) -> None:
        if not self.closed:
            super().close()
            if self._handle >= 0:
                os.close(self._handle)


def _inode(handle: int) -> tuple[int, int]:
    status = os.fstat(handle)
    return status.st_dev, status.st_ino


def _at(folder: int, name: str) -> Path:
    return Path(os.readlink(f"/proc/self/fd/{folder}")) / name
