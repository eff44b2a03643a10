"""The hidden folder in which an output is built, and the moment it becomes visible.

Beside the target ``out`` lies ``.out.weightsmith``: a lock, a journal, and ``content``, which is renamed to
the target when all of it is on disk. A target therefore does not exist, or is whole.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from weightsmith.errors import OutputError


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
        self.target = Path(os.path.abspath(target))
        self.overwrite = overwrite
        check_target(self.target, overwrite=overwrite)
        self.folder = self.target.parent / f".{self.target.name}.weightsmith"
        self.content = self.folder / "content"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise OutputError(
                f"cannot write beside {target}: {error.strerror}; an output is built in a hidden folder beside its "
                "target: choose a target in a folder that you may write to"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise OutputError(f"cannot lock {self.folder}: {error.strerror}") from error
            raise OutputError(f"another run is writing {target} now; wait for it, or choose another target") from error
        try:
            if restart:
                # The journal first: content without one is begun anew, and a journal without content would lie.
                self.journal.unlink(missing_ok=True)
                shutil.rmtree(self.content, ignore_errors=True)
            self.content.mkdir(exist_ok=True)
            _sync(self.folder)
            _sync(self.folder.parent)
        except OSError as error:
            os.close(self._lock)
            raise OutputError(f"cannot write in {self.folder}: {error.strerror}") from error

    @property
    def journal(self) -> Path:
        """The file of the run's journal."""
        return self.folder / "journal"

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

    def publish(self) -> None:
        """Sync everything that was built, and rename it to the target.

        Raises:
            OutputError: if a rename or a sync fails; the staging folder is kept.
        """
        try:
            for root, _, files in os.walk(self.content):
                for name in files:
                    _sync(Path(root) / name)
                _sync(Path(root))
            built = self.content / self.target.name if self.single_file else self.content
            replaced = self.folder / "replaced"
            if os.path.lexists(self.target) and self.overwrite:
                _remove(replaced)
                os.rename(self.target, replaced)
            os.rename(built, self.target)
            _sync(self.target.parent)
        except OSError as error:
            raise OutputError(f"cannot publish {self.target}: {error.strerror}") from error
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Staging:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.journal.exists():
            # Nothing was begun, or all of it was published: leave no trace.
            shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)


def check_target(target: Path, *, overwrite: bool) -> None:
    """Check that an output may be made at this place.

    Raises:
        OutputError: if something is there already that may not be replaced.
    """
    if not os.path.lexists(target):
        return
    if target.is_dir() and not any(target.iterdir()):
        return
    if not overwrite:
        raise OutputError(f"{target} exists already; choose another target, or add --overwrite to replace it")
    if target.suffix != ".safetensors" and not target.is_dir():
        raise OutputError(f"{target} is a file, and a folder is to be written there; choose another target")


def sync_folder(folder: Path) -> None:
    """Return when the names in a folder are on disk: syncing a file does not make its name survive a crash."""
    _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
