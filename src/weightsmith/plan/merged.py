"""A merge that has not been run: a checkpoint whose tensors are expressions."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from weightsmith import __version__, dtypes
from weightsmith.checkpoint.checkpoint import Checkpoint, Companions
from weightsmith.checkpoint.companions import write_companions
from weightsmith.checkpoint.layout import DEFAULT_SHARD_SIZE, Part, lay_out
from weightsmith.checkpoint.staging import Staging, check_target
from weightsmith.checkpoint.tensor import Tensor
from weightsmith.dtypes import DType
from weightsmith.engine.backend import Backend, choose_backend
from weightsmith.engine.executor import Summary, check_space, execute
from weightsmith.engine.journal import Journal
from weightsmith.engine.plan import Plan, Task
from weightsmith.engine.progress import ProgressListener
from weightsmith.engine.threads import default_threads
from weightsmith.errors import OutputError
from weightsmith.recipe.dump import to_yaml
from weightsmith.recipe.schema import Merge

RECIPE_FILE = "weightsmith.yaml"


@dataclass(frozen=True)
class Beside:
    """What is written beside the weights.

    Attributes:
        files: relative path -> file to copy.
        chat_template: the chat template's text, or None to leave the tokenizer's own.
        card: the text of README.md, or None for none.
    """

    files: Mapping[str, Path]
    chat_template: str | None = None
    card: str | None = None


class LazyCheckpoint(Checkpoint):
    """A checkpoint that can be saved: its tensors are computed as they are written.

    Attributes:
        recipe: the recipe that makes it.
        beside: what is written beside the weights.
        warnings: what a person should know before saving it.
    """

    def __init__(
        self,
        name: str,
        tensors: Mapping[str, Tensor],
        *,
        recipe: Merge,
        companions: Companions,
        beside: Beside,
        inputs: Sequence[Checkpoint],
        written: Mapping[str, DType],
        warnings: Sequence[str] = (),
        components: tuple[str, ...] = (),
    ) -> None:
        """Collect what a result is made of.

        Args:
            name: how a person names it.
            tensors: its tensors by name.
            recipe: the recipe that makes it.
            companions: its config and files, as later steps of a pipeline see them.
            beside: what is written beside the weights.
            inputs: the checkpoints that its tensors come from.
            written: tensor name -> dtype in which it is written.
            warnings: what a person should know before saving it.
            components: see :class:`Checkpoint`.
        """
        identities = dict.fromkeys(identity for one in inputs for identity in one.identities)
        super().__init__(name, tensors, companions, tuple(identities), components)
        self.recipe = recipe
        self.beside = beside
        self.warnings = tuple(warnings)
        self._written = written
        self._inputs = tuple(inputs)

    def to_yaml(self) -> str:
        """Return the recipe that makes this checkpoint."""
        return to_yaml(self.recipe)

    def plan(self, *, shard_size: int = DEFAULT_SHARD_SIZE, file: str | None = None) -> Plan:
        """Lay the output out, without reading or writing any weight.

        Args:
            shard_size: most bytes of tensors in a file.
            file: the name of a single ``.safetensors`` file to write, instead of shards.
        """
        tasks = tuple(Task(name, self._written.get(name, tensor.dtype), tensor) for name, tensor in self.items())
        return Plan(
            tasks,
            lay_out(tasks, _parts(self), shard_size, file),
            self.identities,
            _sources(self._inputs),
            self.to_yaml(),
            self.warnings,
        )

    def save(
        self,
        target: str | os.PathLike[str],
        *,
        shard_size: int = DEFAULT_SHARD_SIZE,
        threads: int | None = None,
        overwrite: bool = False,
        restart: bool = False,
        progress: ProgressListener | None = None,
        device: str | None = None,
        backend: str | None = None,
    ) -> Summary:
        """Compute the weights and write them, with everything that belongs beside them.

        Args:
            target: the folder to make, or a path that ends in ``.safetensors`` for one file of weights alone.
            shard_size: most bytes of tensors in a file.
            threads: how many threads to use; by default one per core.
            overwrite: whether a target that exists may be replaced.
            restart: whether to discard what an unfinished run left, instead of going on from there.
            progress: told of progress.
            device: what to compute on: ``cpu``, the default, or ``cuda`` (``cuda:1`` for the second GPU).
            backend: ``numpy`` or ``torch``; by default NumPy and fused loops on the CPU, PyTorch on a GPU.

        Raises:
            DeviceError: if there is no such device, or PyTorch is wanted and not installed.
            OutputError: if the target exists, is an input, or cannot be written.
            Interrupted: on Ctrl-C; the same call goes on from there.
        """
        started = time.monotonic()
        computing = choose_backend(device, backend)
        path = Path(os.path.abspath(target))
        single = path.suffix == ".safetensors"
        plan = self.plan(shard_size=shard_size, file=path.name if single else None)
        check_target(path, overwrite=overwrite)
        self._check_not_input(path)
        with Staging(path, overwrite=overwrite, restart=restart) as staging:
            check_space(plan, staging.content)
            journal = Journal(staging.journal, _run_identity(plan, computing))
            try:
                nonfinite = execute(
                    plan,
                    staging.content,
                    journal,
                    threads=threads or default_threads(),
                    listener=progress,
                    backend=computing,
                )
            finally:
                journal.close()
            notes = [] if single else self._write_beside(staging.content, plan)
            staging.publish()
        return Summary(
            target=path,
            tensors=len(plan.tasks),
            resumed=len(journal.finished),
            nbytes=plan.bytes_written,
            seconds=time.monotonic() - started,
            nonfinite=nonfinite,
            warnings=tuple(dict.fromkeys((*plan.warnings, *notes))),
        )

    def _write_beside(self, folder: Path, plan: Plan) -> list[str]:
        """Write everything but the weights, and return what a person should know of it."""
        for name, index in plan.layout.indexes.items():
            (folder / name).write_text(json.dumps(index, indent=2, ensure_ascii=False) + "\n", "utf-8")
        notes = write_companions(folder, self.config, self.beside.files, chat_template=self.beside.chat_template)
        (folder / RECIPE_FILE).write_text(plan.recipe, "utf-8")
        if self.beside.card is not None:
            (folder / "README.md").write_text(self.beside.card, "utf-8")
        return notes

    def _check_not_input(self, target: Path) -> None:
        real = os.path.realpath(target)
        for identity in self.identities:
            if "://" in identity.path:
                continue
            source = os.path.realpath(identity.path)
            if source == real or source.startswith(real + os.sep):
                raise OutputError(
                    f"{target} holds {identity.path}, which is an input of this merge; inputs are never "
                    "replaced: choose another target"
                )


def _parts(checkpoint: Checkpoint) -> list[Part]:
    if not checkpoint.components:
        return [Part()]
    return [
        # diffusers names the weights of its own models so; those of transformers keep transformers' name.
        Part(f"{component}/", "model" if _is_transformers(checkpoint, component) else "diffusion_pytorch_model")
        for component in checkpoint.components
    ]


def _is_transformers(checkpoint: Checkpoint, component: str) -> bool:
    file = checkpoint.companions.files.get(f"{component}/config.json")
    if file is None:
        return False
    return "architectures" in json.loads(file.read_bytes())


def _sources(inputs: Sequence[Checkpoint]) -> dict[int, str]:
    return {id(tensor): one.name for one in inputs for tensor in one.values()}


def _run_identity(plan: Plan, backend: Backend) -> dict[str, Any]:
    """What a journal must agree on for its tensors to be taken as done."""
    laid_out = hashlib.blake2b(digest_size=16)
    for task in plan.tasks:
        place = plan.place(task)
        laid_out.update(repr((task.name, dtypes.name_of(task.dtype), task.shape, place.shard, place.offset)).encode())
    return {
        "weightsmith version": __version__,
        "recipe": plan.recipe,
        "inputs": [asdict(identity) for identity in plan.identities],
        "layout": laid_out.hexdigest(),
        "arithmetic": backend.name,
    }
