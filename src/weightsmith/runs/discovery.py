"""The checkpoints of a training run, found by the names that training programs give them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from weightsmith.checkpoint.folder import is_weights
from weightsmith.checkpoint.storage import join, list_folder
from weightsmith.checkpoint.torch_distributed import METADATA_FILE
from weightsmith.errors import CheckpointError
from weightsmith.runs.metrics import metrics_of

_SHOWN = 5
# A number that says how far a run had come, by the name before it; later ones say it less well.
_STEPS = ("step", "steps", "iter", "iteration", "ba", "epoch", "ep")
_NAMED_STEP = re.compile(rf"(?:^|[^a-z])({'|'.join(_STEPS)})[=_-]?(\d+)", re.IGNORECASE)
_SHARD = re.compile(r"-\d+-of-\d+\.")
_NUMBER = re.compile(r"\d+")
# Lightning's number for a second file of the same name.
_VERSION = re.compile(r"-v\d+(?=\.ckpt$)")


@dataclass(frozen=True)
class Saved:
    """One checkpoint of a run.

    Attributes:
        path: its folder or file.
        step: how far the run had come: training steps, or epochs where only these are known.
        metrics: what was logged at or last before that step: name -> number.
    """

    path: str
    step: int
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The last part of its path."""
        return self.path.rstrip("/").rsplit("/", 1)[-1]


@dataclass(frozen=True)
class Run:
    """The checkpoints of one run.

    Attributes:
        path: the folder.
        kind: who wrote them, as a person would say it.
        checkpoints: the checkpoints, by step.
        left_out: files of weights in the folder that are no step of the run.
    """

    path: str
    kind: str
    checkpoints: tuple[Saved, ...]
    left_out: tuple[str, ...] = ()

    def chosen(
        self, *, steps: tuple[int | None, int | None] | None = None, every: int = 1, last: int | None = None
    ) -> tuple[Saved, ...]:
        """Return some of the checkpoints: those of a range, of these every so-manieth, of these the last.

        Args:
            steps: first and last step, both included; None where it is open.
            every: take every so-manieth, counted back from the newest, which is always among them.
            last: take so many of the newest.

        Raises:
            CheckpointError: if none is left, or fewer than ``last``.
        """
        found = self.checkpoints
        if steps is not None:
            first, end = steps
            found = tuple(
                one for one in found if (first is None or one.step >= first) and (end is None or one.step <= end)
            )
            if not found:
                raise CheckpointError(
                    f"{self.path} has no checkpoint of steps {_bound(first)}..{_bound(end)}; its "
                    f"{len(self.checkpoints)} are of steps {self.checkpoints[0].step} to {self.checkpoints[-1].step}"
                )
        found = found[::-1][::every][::-1]
        if last is not None:
            if len(found) < last:
                raise CheckpointError(f"the last {last} checkpoints are asked for, and {self.path} has {len(found)}")
            found = found[-last:]
        return found


def find_run(path: str, pattern: str | None = None) -> Run:
    """Find the checkpoints of a run.

    Known are ``checkpoint-N`` folders of transformers' Trainer, Lightning's ``.ckpt`` files (also in the folder
    ``checkpoints``), folders of torch.distributed.checkpoint, Megatron's ``iter_N`` folders, and any other numbered
    files or folders of weights.

    Args:
        path: the folder, here or behind a URL.
        pattern: with ``*`` and ``?``, which names in it to look at.

    Raises:
        CheckpointError: if there are none, several sequences of them, or two of one step.
    """
    entries = list_folder(path)
    if not entries:
        raise CheckpointError(f"{path} is no folder of checkpoints: there is none of this name, or it is empty")
    looked_at = [entry for entry in entries if pattern is None or fnmatchcase(entry, pattern)]
    sequences: dict[str, dict[str, int]] = {}
    left_out = []
    for entry in looked_at:
        kind = _kind_of(path, entry)
        if kind is None:
            continue
        step = step_of(entry)
        if step is None:
            left_out.append(entry)
        else:
            sequences.setdefault(kind, {})[entry] = step
    if not sequences and "checkpoints" in entries:
        return find_run(join(path, "checkpoints"), pattern)
    if not sequences:
        raise CheckpointError(
            f"{path} holds no checkpoints of a run{f' that fit {pattern}' if pattern else ''}: no numbered files or "
            f"folders of weights; there is: {_shown(entries)}"
        )
    if len(sequences) > 1:
        found = "; ".join(f"{kind} ({_shown(names)})" for kind, names in sequences.items())
        raise CheckpointError(
            f"{path} holds more than one sequence of checkpoints: {found}; choose one by --pattern, such as "
            f"--pattern {_a_pattern(next(iter(sequences.values())))!r}"
        )
    ((kind, names),) = sequences.items()
    _check_steps(path, names)
    ordered = sorted(names, key=lambda entry: names[entry])
    found_metrics = metrics_of(path, {entry: names[entry] for entry in ordered})
    saved = [Saved(join(path, entry), names[entry], found_metrics[entry]) for entry in ordered]
    return Run(path, kind, tuple(saved), tuple(left_out))


def step_of(name: str) -> int | None:
    """Return the step that a file's or folder's name tells, or None.

    It is the number behind ``step``, ``iter`` or ``ba`` (batches), else behind ``epoch``, else the last whole number.
    """
    stem = _VERSION.sub("", name)
    found = {word.lower(): int(number) for word, number in _NAMED_STEP.findall(stem)}
    for word in _STEPS:
        if word in found:
            return found[word]
    numbers: list[str] = _NUMBER.findall(_without_metrics(stem))
    return int(numbers[-1]) if numbers else None


def _without_metrics(stem: str) -> str:
    """Return a name without ``name=value`` and its ending: these hold numbers that are no steps."""
    return re.sub(r"\.(safetensors|bin|pth?|ckpt)$", "", re.sub(r"[\w/]+=-?\d+\.\d+", "", stem))


def _kind_of(path: str, entry: str) -> str | None:
    """Return which sequence an entry of a run's folder belongs to, or None where it is no checkpoint."""
    if is_weights(entry):
        if _SHARD.search(entry):
            return None
        return "Lightning .ckpt files" if entry.endswith(".ckpt") else f"numbered files {_shape(entry)}"
    if step_of(entry) is None:
        return None
    inner = list_folder(join(path, entry))
    if METADATA_FILE in inner:
        return "torch.distributed.checkpoint folders"
    if re.fullmatch(r"checkpoint-\d+", entry):
        return "checkpoint-N folders of transformers' Trainer"
    if not any(is_weights(name) for name in inner):
        return None
    return "Megatron-style iter_N folders" if re.fullmatch(r"iter_\d+", entry) else f"numbered folders {_shape(entry)}"


def _shape(entry: str) -> str:
    """Return a name with ``*`` for its numbers: what the names of one sequence have in common."""
    return _NUMBER.sub("*", entry)


def _check_steps(path: str, names: Mapping[str, int]) -> None:
    owners: dict[int, str] = {}
    for entry, step in names.items():
        other = owners.setdefault(step, entry)
        if other != entry:
            raise CheckpointError(
                f"{path}: {other} and {entry} are both of step {step}; choose by --pattern, or move one"
            )


def _shown(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:_SHOWN]) + (f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else "")


def _a_pattern(names: Iterable[str]) -> str:
    return _shape(next(iter(names)))


def _bound(step: int | None) -> str:
    return "" if step is None else str(step)
