"""The hidden folder in which an output is built, and the moment it becomes visible.

Beside the target ``out`` lies ``.out.weightsmith``: a lock, a journal, and ``content``, which is renamed to
the target when all of it is on disk. A target therefore does not exist, or is whole. One that is replaced
changes places with its successor in one step where the system can do so (Linux); elsewhere two renames follow
each other, and a run that finds the first without the second takes it back.

In the moment of publishing a note says by its inode number what is published: who finds the note and not that
inode in the hidden folder knows that what is left there is rubbish, and no half-built output.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import shutil
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from weightsmith.errors import OutputError
from weightsmith.libc import libc_function

# Tries to lock a folder that others remove as they end.
_TRIES = 100
# From Linux's fcntl.h and fs.h.
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_ON_LINUX = sys.platform == "linux"
# What filesystems say that cannot sync a folder (some in user space, some over a network).
_NO_SYNC = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF})


class Staging:
    """Builds one output beside its target.

    Attributes:
        target: what will appear: a folder, or a single ``.safetensors`` file.
        folder: the hidden folder.
        content: where to build: everything in it is published.
    """

    def __init__(self, target: Path, *, overwrite: bool = False, restart: bool = False) -> None:
        """Claim a target.

        Args:
            target: the folder, or the single ``.safetensors`` file, to make.
            overwrite: whether a target that exists may be replaced, in the moment the new one is whole.
            restart: whether to discard what an unfinished run left.

        Raises:
            OutputError: if the target exists and may not be replaced, if another run is building it, or if
                the folder around it cannot be written.
        """
        self.target = resolve_target(target)
        self.overwrite = overwrite
        self.folder = _hidden(self.target)
        self.content = self.folder / "content"
        self._lock = _claim(self.folder, target)
        try:
            self._settle()
            check_target(self.target, overwrite=overwrite)
            if restart:
                # The journal first: content without one is begun anew, and a journal without content would lie.
                self.journal.unlink(missing_ok=True)
                _sync(self.folder)
                _remove(self.content)
                _remove(self.prepared)
            self.content.mkdir(exist_ok=True)
            _sync(self.folder)
        except OSError as error:
            self._leave()
            raise OutputError(f"cannot write in {self.folder}: {error.strerror}") from error
        except BaseException:
            self._leave()
            raise

    @property
    def journal(self) -> Path:
        """The file of the run's journal."""
        return self.folder / "journal"

    @property
    def prepared(self) -> Path:
        """Where the run keeps what it found before it began to write; a folder that need not be there."""
        return self.folder / "prepared"

    @property
    def single_file(self) -> bool:
        """Whether the target is one ``.safetensors`` file rather than a folder."""
        return self.target.suffix == ".safetensors"

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Say of files that are written what went wrong, if something does.

        Raises:
            OutputError: in place of OSError.
        """
        try:
            yield
        except OSError as error:
            what = f" {Path(error.filename).name}" if error.filename else ""
            raise OutputError(
                f"cannot write{what} for {self.target}: {error.strerror}; what is finished is kept in {self.folder}: "
                "the same command goes on from there"
            ) from error

    def keep(self, files: Collection[str]) -> None:
        """Remove everything but some files from what is there already: what else a run left is of no use.

        Args:
            files: paths relative to the content.

        Raises:
            OSError: if something cannot be removed.
        """
        for root, _, names in os.walk(self.content, topdown=False, onerror=raise_it):
            here = Path(root)
            for name in names:
                if (here / name).relative_to(self.content).as_posix() not in files:
                    (here / name).unlink()
            if here != self.content and not os.listdir(here):
                here.rmdir()

    def publish(self) -> None:
        """Sync everything that was built, and rename it to the target.

        Raises:
            OutputError: if a rename or a sync fails, or something else has appeared at the target; the staging
                folder is kept.
        """
        check_target(self.target, overwrite=self.overwrite)
        try:
            for root, _, files in os.walk(self.content, onerror=raise_it):
                for name in files:
                    _sync(Path(root) / name)
                _sync(Path(root))
            self._write_note()
            self._rename()
            _sync(self.target.parent)
            _sync(self.folder)
        except OSError as error:
            raise OutputError(
                f"cannot publish {self.target}: {error.strerror}; what is finished is kept in {self.folder}: the same "
                "command goes on from there"
            ) from error
        self._clear()

    @property
    def _built(self) -> Path:
        return self.content / self.target.name if self.single_file else self.content

    @property
    def _replaced(self) -> Path:
        return self.folder / "replaced"

    @property
    def _note(self) -> Path:
        return self.folder / "publishing"

    def _rename(self) -> None:
        occupied = self.target.is_dir() and any(self.target.iterdir()) and not self.single_file
        if occupied and not _exchange(self._built, self.target):
            _remove(self._replaced)
            os.rename(self.target, self._replaced)
            # On disk before the second: a crash that kept the second alone would have lost the old one.
            _sync(self.folder)
            _sync(self.target.parent)
            os.rename(self._built, self.target)
        elif not occupied:
            os.rename(self._built, self.target)

    def _write_note(self) -> None:
        with self._note.open("wb") as file:
            file.write(b"%d\n" % os.lstat(self._built).st_ino)
            file.flush()
            os.fsync(file.fileno())
        _sync(self.folder)

    def _settle(self) -> None:
        """End what a run that was killed while it published has begun, or take it back."""
        try:
            found = re.fullmatch(rb"(\d+)\n", self._note.read_bytes())
        except FileNotFoundError:
            return
        # A note that is cut short was never acted on: it is on disk before anything is renamed.
        if found is not None and _inode(self._built) != int(found[1]):
            self._clear()
            return
        if os.path.lexists(self._replaced) and not os.path.lexists(self.target):
            os.rename(self._replaced, self.target)
            _sync(self.target.parent)
        self._note.unlink()
        _sync(self.folder)

    def _clear(self) -> None:
        """Remove the staging folder of an output that is published; what cannot be removed is left to the next run."""
        with suppress(OSError):
            # The content may be the old output now, of the same lengths: no journal may speak of it for a moment.
            self.journal.unlink(missing_ok=True)
            _sync(self.folder)
            _remove(self.content)
            _remove(self._replaced)
            _sync(self.folder)
            self._note.unlink()

    def _leave(self) -> None:
        """Give the target free, and leave no trace where nothing was begun, or all was published."""
        if not _is_there(self.journal) and not _is_there(self._note):
            shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)

    def __enter__(self) -> Staging:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()


def settle(target: Path) -> None:
    """End what a run into this target began to publish before it was killed, if one did.

    Raises:
        OutputError: if another run is writing the target now, or the folder around it cannot be written.
    """
    real = resolve_target(target)
    folder = _hidden(real)
    if os.path.lexists(folder) and (_is_there(folder / "publishing") or not _is_there(folder / "journal")):
        Staging(real, overwrite=True)._leave()


def check_target(target: Path, *, overwrite: bool) -> None:
    """Check that an output may be made at this place.

    Raises:
        OutputError: if something is there already that may not be replaced, or it cannot be looked at.
    """
    try:
        _check_target(target, overwrite=overwrite)
    except OSError as error:
        raise OutputError(f"cannot look at {target}: {error.strerror}") from error


def _check_target(target: Path, *, overwrite: bool) -> None:
    if not os.path.lexists(target):
        return
    if os.path.ismount(target):
        raise OutputError(
            f"{target} is where a filesystem is mounted, and an output appears by a rename; choose a folder in it: "
            f"{target / 'merged'}"
        )
    if target.is_dir() and target.suffix == ".safetensors":
        raise OutputError(f"{target} is a folder, and a file is to be written there; choose another target")
    if target.is_dir() and not any(target.iterdir()):
        return
    if not overwrite:
        raise OutputError(f"{target} exists already; choose another target, or add --overwrite to replace it")
    if target.suffix != ".safetensors" and not target.is_dir():
        raise OutputError(f"{target} is a file, and a folder is to be written there; choose another target")


def sync_folder(folder: Path) -> None:
    """Return when the names in a folder are on disk: syncing a file does not make its name survive a crash."""
    _sync(folder)


def make_folder(folder: Path) -> None:
    """Make a folder and those around it, where they are not there, so that their names survive a crash.

    Raises:
        OSError: if one cannot be made.
    """
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for one in missing:
        _sync(one.parent)


def resolve_target(target: Path) -> Path:
    """Follow a link to a folder, so that all is built on the folder's filesystem; a link to a file is replaced."""
    path = os.path.abspath(target)
    if os.path.islink(path) and os.path.isfile(path):
        return Path(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
    return Path(os.path.realpath(path))


def _hidden(target: Path) -> Path:
    return target.parent / f".{target.name}.weightsmith"


def _claim(folder: Path, target: Path) -> int:
    """Make the hidden folder and lock it; return the descriptor that holds the lock."""
    for _ in range(_TRIES):
        try:
            make_folder(folder)
            lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise OutputError(
                f"cannot write beside {target}: {error.strerror}; an output is built in a hidden folder beside its "
                "target: choose a target in a folder that you may write to"
            ) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise OutputError(f"cannot lock {folder}: {error.strerror}") from error
            raise OutputError(f"another run is writing {target} now; wait for it, or choose another target") from error
        # Whoever held it before may have removed the file: then this is the lock of a folder that is gone.
        if os.fstat(lock).st_ino == _inode(folder / "lock"):
            return lock
        os.close(lock)
    raise OutputError(f"cannot lock {folder}: others remove it as often as it is made")


def _inode(path: Path) -> int | None:
    try:
        return os.lstat(path).st_ino
    except FileNotFoundError:
        return None


def _is_there(path: Path) -> bool:
    """Whether a file is there, or may be: where that cannot be told."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return True


def _exchange(one: Path, other: Path) -> bool:
    """Let two names change places in one step; return whether system and filesystem can."""
    path, number = ctypes.c_char_p, ctypes.c_int
    function = libc_function("renameat2", number, path, number, path, ctypes.c_uint) if _ON_LINUX else None
    if function is None:
        return False
    if function(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    failed = ctypes.get_errno()
    if failed in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(failed, os.strerror(failed), str(other))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_SYNC or not path.is_dir():
            raise
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def raise_it(error: OSError) -> None:
    """Raise an error: for ``os.walk``, which passes over folders that cannot be read unless it is told to."""
    raise error
