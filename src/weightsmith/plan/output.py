"""A checkpoint that can be saved: laid out first, computed as it is written, whole or not there."""

from __future__ import annotations

import hashlib
import json
import os
import time
from abc import abstractmethod
from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from weightsmith import __version__, dtypes
from weightsmith.checkpoint.checkpoint import Checkpoint, Companions
from weightsmith.checkpoint.companions import LARGEST_SETTINGS, read_companion
from weightsmith.checkpoint.gathered import GatheredRows
from weightsmith.checkpoint.layout import DEFAULT_SHARD_SIZE, Part, lay_out
from weightsmith.checkpoint.manifest import MANIFEST_FILE, MANIFEST_KEY, hash_texts
from weightsmith.checkpoint.staging import Staging, check_target, resolve_target, settle
from weightsmith.checkpoint.tensor import Tensor
from weightsmith.dtypes import DType
from weightsmith.engine.backend import NUMPY, Backend, choose_backend
from weightsmith.engine.executor import OnNonfinite, Summary, check_space, execute, nonfinite_of
from weightsmith.engine.expression import stored_within
from weightsmith.engine.journal import Journal
from weightsmith.engine.memory import uncollected
from weightsmith.engine.plan import Plan, Task
from weightsmith.engine.progress import ProgressListener
from weightsmith.engine.threads import default_threads
from weightsmith.errors import CheckpointError, OutputError
from weightsmith.plan.provenance import describe, files_of, hash_inputs, write_into_header, write_manifest
from weightsmith.plan.run_record import RunRecord

# How diffusers names the weights of its own models.
_DIFFUSERS = "diffusion_pytorch_model"


class Output(Checkpoint):
    """A checkpoint whose tensors are computed as they are written.

    Attributes:
        warnings: what a person should know before saving it.
    """

    def __init__(
        self,
        name: str,
        tensors: Mapping[str, Tensor],
        *,
        inputs: Sequence[Checkpoint],
        written: Mapping[str, DType],
        companions: Companions | None = None,
        warnings: Sequence[str] = (),
        components: tuple[str, ...] = (),
    ) -> None:
        """Collect what a result is made of.

        Args:
            name: how a person names it.
            tensors: its tensors by name.
            inputs: the checkpoints that its tensors come from.
            written: tensor name -> dtype in which it is written, where it is not the tensor's own.
            companions: its config and files, as later steps of a pipeline see them.
            warnings: what a person should know before saving it.
            components: see :class:`Checkpoint`.
        """
        identities = dict.fromkeys(identity for one in inputs for identity in one.identities)
        super().__init__(name, tensors, companions, tuple(identities), components)
        self.warnings = tuple(warnings)
        self._written = written
        self._inputs = tuple(inputs)

    @abstractmethod
    def to_yaml(self) -> str:
        """Return the text that says how to make this checkpoint again."""

    def owners(self) -> dict[int, str]:
        """Return the id of every tensor of the inputs, and of theirs where they are steps -> name of its checkpoint."""
        known: dict[int, str] = {}
        for one in self._inputs:
            known |= {id(tensor): one.name for tensor in one.values()}
            if isinstance(one, Output):
                known |= one.owners()
        return known

    def metadata(self) -> Mapping[str, str]:
        """Return texts for the headers of all files of weights."""
        return {}

    @abstractmethod
    def parts(self) -> Sequence[Part]:
        """Return the models whose files the output is made of."""

    @abstractmethod
    def write_beside(self, folder: Path, plan: Plan) -> list[str]:
        """Write everything but weights, indexes and manifest; return what a person should know of it.

        Args:
            folder: the folder that the output is built in, in which all weights are written.
            plan: the plan.
        """

    def prepare(self, kept: Path, *, threads: int, memory: int | None, listener: ProgressListener | None) -> None:
        """Find what all weights rest on, before the first is written: what takes long, and is wanted again.

        Args:
            kept: a folder, there or not, in which the run may keep what was found, for the case that it is stopped and
                gone on with. It goes with the run.
            threads: how many threads to use.
            memory: most bytes to hold, if a person says so.
            listener: told of progress.
        """

    def examine(self, finished: Container[str], threads: int) -> list[str]:
        """Return what a person should know that only the weights tell.

        Args:
            finished: names of tensors that an earlier run wrote; nothing of them is read again.
            threads: how many threads to use.
        """
        return []

    def plan(
        self,
        *,
        shard_size: int = DEFAULT_SHARD_SIZE,
        file: str | None = None,
        arithmetic: str = NUMPY.name,
        contents: Mapping[str, str] | None = None,
    ) -> Plan:
        """Lay the output out, without reading or writing any weight.

        Args:
            shard_size: most bytes of tensors in a file.
            file: the name of a single ``.safetensors`` file to write, instead of shards.
            arithmetic: what will compute it, as the output says it.
            contents: hashes of the inputs, if the output is to name them.
        """
        with uncollected():
            tasks = tuple(Task(name, self._written.get(name, tensor.dtype), tensor) for name, tensor in self.items())
            recipe = self.to_yaml()
            metadata = dict(self.metadata())
            if file is not None:
                # One file holds all there is to say of it in its header, where a place is kept for the hashes.
                kept = describe(
                    tasks,
                    dict.fromkeys(self, file),
                    arithmetic=arithmetic,
                    recipe=recipe,
                    shard_size=shard_size,
                    inputs=self.identities,
                    contents=contents or {},
                )
                metadata[MANIFEST_KEY] = replace(kept, files=hash_texts(self.metadata())).to_text()
            return Plan(
                tasks,
                lay_out(tasks, self.parts(), shard_size, file, metadata),
                self.identities,
                self.owners(),
                recipe,
                self.warnings,
            )

    def save(
        self,
        target: str | os.PathLike[str],
        *,
        shard_size: int = DEFAULT_SHARD_SIZE,
        threads: int | None = None,
        memory: int | None = None,
        device: str | None = None,
        backend: str | None = None,
        overwrite: bool = False,
        restart: bool = False,
        verify: bool = False,
        on_nonfinite: OnNonfinite = "error",
        progress: ProgressListener | None = None,
    ) -> Summary:
        """Compute the weights and write them, with everything that belongs beside them.

        Args:
            target: the folder to make, or a path that ends in ``.safetensors`` for one file of weights alone.
            shard_size: most bytes of tensors in a file.
            threads: how many threads to use; by default one per core.
            memory: most bytes to hold; fewer threads are used where that takes it.
            device: what to compute on: ``cpu``, the default, or a GPU: ``cuda``, ``cuda:1``.
            backend: ``numpy`` or ``torch``; by default NumPy on a CPU, PyTorch on a GPU.
            overwrite: whether a target that exists may be replaced.
            restart: whether to discard what an unfinished run left, instead of going on from there.
            verify: whether to read and hash all inputs first: the output then names the hashes, and an unfinished
                run is only gone on with if they are still the same.
            on_nonfinite: what to do about results that are NaN or infinite where the inputs are not: ``error`` to
                stop, ``warn`` to go on and report them, ``ignore`` to go on.
            progress: told of progress.

        Raises:
            DeviceError: if the device or backend is not there.
            PlanError: if no thread could work within the memory.
            OutputError: if the target exists, is an input, or cannot be written; or a result is not finite.
            Interrupted: on Ctrl-C; the same call goes on from there.
        """
        started = time.monotonic()
        path = resolve_target(Path(target))
        single = path.suffix == ".safetensors"
        chosen = choose_backend(device, backend)
        settle(path)
        check_target(path, overwrite=overwrite)
        self._check_not_input(path)
        count = threads or default_threads()
        contents = hash_inputs(self.identities, count) if verify else {}
        plan = self.plan(
            shard_size=shard_size,
            file=path.name if single else None,
            arithmetic=chosen.name,
            contents=contents,
        )
        if memory is not None:
            count = plan.threads_within(memory, count)
        with Staging(path, overwrite=overwrite, restart=restart) as staging:
            with staging.writing():
                check_space(plan, staging.content)
                journal = Journal(staging.journal, _run_identity(plan, chosen, contents))
                staging.keep({shard.path for shard in plan.layout.shards})
            try:
                self.prepare(staging.prepared, threads=count, memory=memory, listener=progress)
                outcome = execute(
                    plan,
                    staging.content,
                    journal,
                    threads=count,
                    listener=progress,
                    backend=chosen,
                    on_nonfinite=on_nonfinite,
                    memory=memory,
                )
                resumed = len(journal.finished)
            finally:
                journal.close()
            self._check_unchanged()
            manifest = describe(
                plan.tasks,
                files_of(plan.layout),
                arithmetic=chosen.name,
                recipe=plan.recipe,
                shard_size=shard_size,
                inputs=self.identities,
                contents=contents,
                outcome=outcome,
            )
            notes = self.examine(journal.finished, count)
            with staging.writing():
                if single:
                    manifest = replace(manifest, files=hash_texts(self.metadata()))
                    write_into_header(plan, staging.content / path.name, manifest, self.metadata())
                else:
                    write_indexes(plan, staging.content)
                    notes += self.write_beside(staging.content, plan)
                    write_manifest(plan, staging.content, manifest)
                seconds = round(time.monotonic() - started, 3)
                record = RunRecord(seconds, plan.bytes_read, plan.bytes_written, count, len(plan.tasks), resumed)
                record.attach(staging.content / (path.name if single else MANIFEST_FILE))
            staging.publish()
        return Summary(
            target=Path(os.path.abspath(target)),
            tensors=len(plan.tasks),
            resumed=resumed,
            nbytes=plan.bytes_written,
            seconds=time.monotonic() - started,
            nonfinite=() if on_nonfinite == "ignore" else nonfinite_of(outcome.done),
            warnings=tuple(dict.fromkeys((*plan.warnings, *notes))),
        )

    def _check_unchanged(self) -> None:
        """Check that no input was changed while it was read: the result would be of both."""
        for identity in self.identities:
            if "://" in identity.path:
                continue
            try:
                now = os.stat(identity.path)
            except OSError:
                # A file that is gone is read to its end by who has it open.
                continue
            if (now.st_size, now.st_mtime_ns) != (identity.size, identity.modified):
                raise CheckpointError(
                    f"{identity.path} was changed while it was read: the result would be of both states; leave it "
                    "alone, and begin anew with --restart"
                )

    def _check_not_input(self, target: Path) -> None:
        real = os.path.realpath(target)
        for identity in self.identities:
            if "://" in identity.path:
                continue
            source = os.path.realpath(identity.path)
            if source == real or source.startswith(real + os.sep):
                raise OutputError(
                    f"{target} holds {identity.path}, which is an input; inputs are never replaced: choose another "
                    "target"
                )


def check_folder(target: str | os.PathLike[str], what: str) -> None:
    """Refuse the name of a file for what is a folder.

    Args:
        target: where it is to be written.
        what: why it is a folder, as a clause.

    Raises:
        OutputError: if the target's name ends in .safetensors.
    """
    if os.fspath(target).endswith(".safetensors"):
        raise OutputError(f"{target}: {what}; choose a name that does not end in .safetensors")


def parts_of(checkpoint: Checkpoint) -> list[Part]:
    """Return the models whose files a checkpoint is written as: itself, or a pipeline's components."""
    if not checkpoint.components:
        # A model of diffusers by itself is known by its config, which names its class so.
        return [Part("", _DIFFUSERS if "_class_name" in checkpoint.config else "model")]
    return [
        # Models of transformers keep transformers' name within a pipeline.
        Part(f"{component}/", "model" if _is_transformers(checkpoint, component) else _DIFFUSERS)
        for component in checkpoint.components
    ]


def _is_transformers(checkpoint: Checkpoint, component: str) -> bool:
    file = checkpoint.companions.files.get(f"{component}/config.json")
    return file is not None and "architectures" in json.loads(read_companion(file, LARGEST_SETTINGS))


def write_indexes(plan: Plan, folder: Path) -> None:
    """Write the indexes by which transformers reads shards."""
    for name, index in plan.layout.indexes.items():
        (folder / name).write_text(json.dumps(index, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _run_identity(plan: Plan, backend: Backend, contents: Mapping[str, str]) -> dict[str, Any]:
    """What a journal must agree on for its tensors to be taken as done."""
    laid_out = hashlib.blake2b(digest_size=16)
    for task in plan.tasks:
        place = plan.place(task)
        laid_out.update(repr((task.name, dtypes.name_of(task.dtype), task.shape, place.shard, place.offset)).encode())
        # Tokenizers may have changed, which are no inputs: rows would be of both.
        for part in stored_within(task.tensor):
            if isinstance(part, GatheredRows):
                laid_out.update(part.digest)
    identity = {
        "weightsmith version": __version__,
        "recipe": plan.recipe,
        "inputs": [asdict(identity) for identity in plan.identities],
        "layout": laid_out.hexdigest(),
        "arithmetic": backend.name,
    }
    return identity | ({"content of the inputs": dict(contents)} if contents else {})
