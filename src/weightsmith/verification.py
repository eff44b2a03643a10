"""Whether an output is still what was written, and whether its recipe makes the same again."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from weightsmith import __version__, dtypes
from weightsmith.checkpoint.folder import open_weights
from weightsmith.checkpoint.layout import make_header
from weightsmith.checkpoint.manifest import (
    MANIFEST_FILE,
    MANIFEST_KEY,
    Manifest,
    hash_file,
    hash_of,
    hash_range,
    hash_texts,
    join_parts,
    manifest_of,
    manifest_text,
    read_manifest,
    steps,
)
from weightsmith.checkpoint.safetensors import StoredTensor, read_header, read_metadata
from weightsmith.checkpoint.storage import LocalSource, check_inside
from weightsmith.engine.progress import ProgressListener, Silent
from weightsmith.engine.threads import ThreadMapper, default_threads
from weightsmith.errors import CheckpointError, WeightsmithError

if TYPE_CHECKING:
    from weightsmith.engine.plan import Plan


@dataclass(frozen=True)
class Problem:
    """Something that is not as it should be.

    Attributes:
        file: the file, relative to what was checked.
        tensor: the tensor, or None where it is not one tensor's matter.
        text: what is wrong.
    """

    file: str
    tensor: str | None
    text: str

    def __str__(self) -> str:
        """One line for people."""
        return f"{self.file}: {self.tensor}: {self.text}" if self.tensor else f"{self.file}: {self.text}"


@dataclass(frozen=True)
class Verification:
    """What was found.

    Attributes:
        path: what was checked.
        manifest: what it should be, or None if it does not say.
        tensors: how many tensors were checked.
        nbytes: how many bytes of them.
        problems: what is not as it should be.
        notes: what a person should know beside that.
    """

    path: Path
    manifest: Manifest | None
    tensors: int
    nbytes: int
    problems: tuple[Problem, ...]
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def verify(
    path: str | os.PathLike[str], *, threads: int | None = None, progress: ProgressListener | None = None
) -> Verification:
    """Check an output against its manifest: every header, every tensor, every file. A single flipped bit is found.

    Of a checkpoint that has no manifest the headers, and what an index says of them, are checked alone.

    Args:
        path: a folder or a ``.safetensors`` file that weightsmith wrote.
        threads: how many threads to use; by default one per core.
        progress: told of progress.

    Raises:
        CheckpointError: if there is no checkpoint, or its manifest cannot be read.
    """
    root = Path(path)
    if not root.is_dir() and root.suffix != ".safetensors":
        return _headers_alone(root, "it is no safetensors file")
    text, where = manifest_text(root)
    if text is None:
        return _headers_alone(root, f"it has no {MANIFEST_FILE}" if root.is_dir() else "its header has no manifest")
    manifest, folder, only = read_manifest(text, where), root, None
    if not root.is_dir():
        # A file may be given another name; what is in it stays the same.
        entries = {name: replace(entry, file=root.name) for name, entry in manifest.tensors.items()}
        manifest, folder, only = replace(manifest, tensors=entries), root.parent, text
    return _Verifying(root, folder, manifest, only).run(threads or default_threads(), progress or Silent())


def reproduce(
    path: str | os.PathLike[str],
    *,
    threads: int | None = None,
    device: str | None = None,
    backend: str | None = None,
    progress: ProgressListener | None = None,
) -> Verification:
    """Run the recipe of an output again, from the same inputs, and compare; nothing is written.

    References of the recipe are looked up as ``merge`` looks them up: paths are relative to the current folder.

    Args:
        path: a folder or a ``.safetensors`` file that weightsmith wrote.
        threads: how many threads to use; by default one per core.
        device: what to compute on; see :meth:`weightsmith.plan.output.Output.save`.
        backend: ``numpy`` or ``torch``.
        progress: told of progress.

    Raises:
        CheckpointError: if there is no manifest, or an input cannot be read.
        RecipeError: if this version does not understand the recipe.
        PlanError: if the recipe cannot be run any more.
    """
    from weightsmith.engine.backend import choose_backend
    from weightsmith.engine.executor import recompute
    from weightsmith.plan.provenance import hash_inputs
    from weightsmith.plan.remake import remake

    root = Path(path)
    manifest = manifest_of(root)
    count = threads or default_threads()
    chosen = choose_backend(device, backend)
    merged = remake(manifest.recipe, threads=count)
    contents = hash_inputs(merged.identities, count) if manifest.contents else {}
    plan = merged.plan(shard_size=manifest.shard_size, file=None if root.is_dir() else root.name)
    problems = [*_changed_inputs(manifest, plan, contents), *_changed_tensors(manifest, plan)]
    notes = []
    if manifest.version != __version__:
        notes.append(f"it was written by weightsmith {manifest.version}, and this is {__version__}")
    if manifest.arithmetic != chosen.name:
        notes.append(f"it was computed by {manifest.arithmetic}, and now by {chosen.name}: last digits may differ")
    if not any(problem.tensor for problem in problems):
        spans = {name: entry.digest.step for name, entry in manifest.tensors.items() if entry.digest.step}
        done = recompute(plan, spans, threads=count, listener=progress, backend=chosen)
        problems += [
            Problem(entry.file, name, "the recipe makes other numbers now")
            for name, entry in manifest.tensors.items()
            if done[name].digest != entry.digest
        ]
    nbytes = sum(task.nbytes for task in plan.tasks)
    return Verification(root, manifest, len(plan.tasks), nbytes, tuple(problems), tuple(notes))


class _Verifying:
    """The check of one output against its manifest."""

    def __init__(self, root: Path, folder: Path, manifest: Manifest, only: str | None) -> None:
        """Start with nothing found.

        Args:
            root: what is checked.
            folder: the folder that the manifest's files are in.
            manifest: what it should be.
            only: the text of the manifest, where it is in the header of the only file.
        """
        self.root = root
        self.folder = folder
        self.manifest = manifest
        self.only = only
        self.problems: list[Problem] = []

    def run(self, threads: int, listener: ProgressListener) -> Verification:
        present: dict[str, StoredTensor] = {}
        for file in dict.fromkeys(entry.file for entry in self.manifest.tensors.values()):
            present |= self._open(file)
        for name, entry in self.manifest.tensors.items():
            if name not in present and not any(problem.file == entry.file for problem in self.problems):
                self._say(entry.file, name, "the file does not hold it")
        nbytes = sum(tensor.nbytes for tensor in present.values())
        listener.start(nbytes, len(present), 0)
        try:
            self._compare(present, threads, listener)
        finally:
            listener.finish()
        notes = self._other_files()
        return Verification(self.root, self.manifest, len(present), nbytes, tuple(self.problems), tuple(notes))

    def _open(self, file: str) -> dict[str, StoredTensor]:
        """Check the header of a file of weights, and return those of its tensors that can be compared."""
        try:
            check_inside(str(self.folder), file)
            source = LocalSource(self.folder / file)
            found, _ = read_header(source)
        except CheckpointError as error:
            self._say(file, None, _without_path(error, self.folder / file))
            return {}
        prefix = file.rpartition("/")[0]
        prefix = f"{prefix}/" if prefix else ""
        tensors = {prefix + name: tensor for name, tensor in found.items()}
        if not self._header_fits(file, source, found):
            self._say(file, None, "the header is not the one that was written")
        fitting = {}
        for name, tensor in tensors.items():
            entry = self.manifest.tensors.get(name)
            if entry is None or entry.file != file:
                self._say(file, name, "it is not among the tensors that were written")
            elif (entry.dtype, entry.shape) != (dtypes.code_of(tensor.dtype), tensor.shape):
                self._say(file, name, f"it was written as {entry.dtype} {list(entry.shape)}, and is not that any more")
            else:
                fitting[name] = tensor
        return fitting

    def _header_fits(self, file: str, source: LocalSource, found: Mapping[str, StoredTensor]) -> bool:
        ordered = sorted(found.values(), key=lambda tensor: tensor.offset)
        begin = min((tensor.offset for tensor in ordered), default=source.size)
        header = bytes(source.read(0, begin))
        if self.only is None:
            return hash_of(header) == self.manifest.files.get(file)
        # A header cannot hold its own hash; but it can be written anew, and must come out the same.
        texts = {key: text for key, text in read_metadata(source).items() if key not in ("format", MANIFEST_KEY)}
        again = make_header(ordered, metadata={**texts, MANIFEST_KEY: self.only})[0]
        return header == again and hash_texts(texts) == self.manifest.files

    def _compare(self, present: Mapping[str, StoredTensor], threads: int, listener: ProgressListener) -> None:
        def blocks() -> Iterator[tuple[str, StoredTensor, int, int]]:
            for name, tensor in present.items():
                step = self.manifest.tensors[name].digest.step
                for start, stop in steps(tensor.nbytes, step):
                    yield name, tensor, start, stop

        def hashed(block: tuple[str, StoredTensor, int, int]) -> tuple[str, bytes | None, str]:
            name, tensor, start, stop = block
            try:
                part = hash_range(tensor.source, tensor.offset + start, tensor.offset + stop).digest()
            except CheckpointError as error:
                return name, None, str(error)
            listener.advance(stop - start)
            return name, part, ""

        parts: dict[str, list[bytes]] = {name: [] for name in present}
        with ThreadMapper(threads) as mapper:
            for name, part, error in mapper(hashed, blocks()):
                if part is None:
                    self._say(self.manifest.tensors[name].file, name, error)
                else:
                    parts[name].append(part)
        for name, found in parts.items():
            entry = self.manifest.tensors[name]
            if join_parts(found) != entry.digest.hash:
                self._say(entry.file, name, "its content is not what was written")
            listener.tensor_done(name)

    def _other_files(self) -> list[str]:
        """Check every file that holds no weights, and name those that the manifest does not know."""
        if self.only is not None:
            return []
        weights = {entry.file for entry in self.manifest.tensors.values()}
        for file, digest in self.manifest.files.items():
            if file in weights:
                continue
            try:
                check_inside(str(self.folder), file)
                if hash_file(self.folder / file) != digest:
                    self._say(file, None, "its content is not what was written")
            except CheckpointError as error:
                self._say(file, None, _without_path(error, self.folder / file))
            except OSError as error:
                self._say(file, None, f"it cannot be read: {error.strerror}")
        known = {*self.manifest.files, *weights, MANIFEST_FILE}
        found = sorted(
            path.relative_to(self.folder).as_posix()
            for path in self.folder.rglob("*")
            if not path.is_dir() and not any(part.startswith(".") for part in path.relative_to(self.folder).parts)
        )
        return [f"{file} was not written by the merge" for file in found if file not in known]

    def _say(self, file: str, tensor: str | None, text: str) -> None:
        self.problems.append(Problem(file, tensor, text))


def _headers_alone(root: Path, reason: str) -> Verification:
    found = open_weights(str(root), str(root))
    nbytes = sum(tensor.nbytes for tensor in found.values())
    note = f"{reason}, so only headers were checked: there is nothing to compare the content with"
    return Verification(root, None, len(found), nbytes, (), (note,))


def _changed_inputs(manifest: Manifest, plan: Plan, contents: Mapping[str, str]) -> Iterator[Problem]:
    before = {identity.path: identity for identity in manifest.inputs}
    now = {identity.path: identity for identity in plan.identities}
    for path in dict.fromkeys((*before, *now)):
        if path not in now:
            yield Problem(path, None, "it was an input, and is not any more")
        elif path not in before:
            yield Problem(path, None, "it is an input now, and was not")
        elif before[path].size != now[path].size:
            yield Problem(path, None, f"the input had {before[path].size:,} bytes, and has {now[path].size:,}")
        elif before[path].header != now[path].header:
            yield Problem(path, None, "the input's header has changed")
        elif manifest.contents.get(path, contents.get(path)) != contents.get(path):
            yield Problem(path, None, "the input's content has changed")


def _changed_tensors(manifest: Manifest, plan: Plan) -> Iterator[Problem]:
    now = {task.name: task for task in plan.tasks}
    for name, entry in manifest.tensors.items():
        if name not in now:
            yield Problem(entry.file, name, "the recipe does not make it any more")
        elif (entry.dtype, entry.shape) != (dtypes.code_of(now[name].dtype), now[name].shape):
            task = now[name]
            yield Problem(entry.file, name, f"the recipe makes it {dtypes.code_of(task.dtype)} {list(task.shape)} now")
    for name in now:
        if name not in manifest.tensors:
            yield Problem("", name, "the recipe makes it now, and did not")


def _without_path(error: WeightsmithError, path: Path) -> str:
    return str(error).removeprefix(f"{path}: ").removeprefix(f"{path} ")
