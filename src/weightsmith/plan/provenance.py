"""Where an output comes from, written into it: its manifest, and hashes of the inputs where they are asked for."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from weightsmith import __version__, dtypes
from weightsmith.checkpoint.checkpoint import Identity
from weightsmith.checkpoint.layout import Layout, make_header
from weightsmith.checkpoint.manifest import (
    MANIFEST_FILE,
    MANIFEST_KEY,
    UNKNOWN,
    Digest,
    Entry,
    Manifest,
    hash_file,
    hash_of,
    hash_range,
)
from weightsmith.checkpoint.staging import raise_it
from weightsmith.checkpoint.storage import open_source
from weightsmith.engine import state
from weightsmith.engine.executor import Outcome
from weightsmith.engine.plan import Plan, Task

_NOT_YET = Digest(UNKNOWN, 0)


def describe(
    tasks: Sequence[Task],
    files: Mapping[str, str],
    *,
    arithmetic: str,
    recipe: str,
    shard_size: int,
    inputs: Sequence[Identity],
    contents: Mapping[str, str],
    outcome: Outcome | None = None,
) -> Manifest:
    """Return the manifest of an output, without the hashes of headers and files beside the weights.

    Args:
        tasks: its tensors.
        files: tensor name -> the file it is in.
        arithmetic: what computes it.
        recipe: its recipe, as YAML.
        shard_size: most bytes of tensors in a file.
        inputs: the files that are read.
        contents: path of an input -> hash of all of it, where that was asked for.
        outcome: what is known of the output; before it is computed, nothing.
    """
    found = (outcome.state if outcome else None) or {}
    return Manifest(
        version=__version__,
        arithmetic=arithmetic,
        recipe=recipe,
        shard_size=shard_size,
        inputs=tuple(inputs),
        contents=contents,
        tensors={
            task.name: Entry(
                dtypes.code_of(task.dtype),
                task.shape,
                files[task.name],
                _NOT_YET if outcome is None else outcome.done[task.name].digest,
            )
            for task in tasks
        },
        files={},
        # None where the merge cannot be gone on with; which parameters there are is known before their values.
        state={name: found.get(name) for name in state.names(tasks)} if state.continuing(tasks) else None,
    )


def write_manifest(plan: Plan, content: Path, manifest: Manifest) -> None:
    """Write the manifest of a finished output into it.

    Args:
        plan: the plan.
        content: the folder that the output was built in; all its files are there.
        manifest: the manifest, but for the hashes of files.

    Raises:
        OSError: if it cannot be written.
    """
    hashes = {shard.path: hash_of(shard.header) for shard in plan.layout.shards}
    for root, _, names in os.walk(content, onerror=raise_it):
        for name in names:
            path = Path(root) / name
            relative = path.relative_to(content).as_posix()
            if relative not in hashes:
                hashes[relative] = hash_file(path)
    complete = replace(manifest, files=dict(sorted(hashes.items())))
    (content / MANIFEST_FILE).write_text(complete.to_text() + "\n", "ascii")


def write_into_header(plan: Plan, path: Path, manifest: Manifest, metadata: Mapping[str, str]) -> None:
    """Write the manifest of a single file into its header, in the place that was kept for it.

    Args:
        plan: the plan.
        path: the file.
        manifest: the manifest.
        metadata: the other texts of the header.

    Raises:
        OSError: if it cannot be written.
    """
    (shard,) = plan.layout.shards
    by_name = {task.name: task for task in plan.tasks}
    ordered = [by_name[name] for name in shard.tensors]
    header, _ = make_header(ordered, metadata={**metadata, MANIFEST_KEY: manifest.to_text()})
    assert len(header) == len(shard.header), "a manifest's length must not depend on its hashes"
    with path.open("r+b") as file:
        file.write(header)


def files_of(layout: Layout) -> dict[str, str]:
    """Return tensor name -> the file it is in."""
    return {name: layout.shards[place.shard].path for name, place in layout.placements.items()}


def hash_inputs(inputs: Sequence[Identity], threads: int) -> dict[str, str]:
    """Return path -> hash of all of it, for every input.

    Raises:
        CheckpointError: if one cannot be read.
    """

    def hashed(identity: Identity) -> str:
        source = open_source(identity.path)
        digits: str = hash_range(source, 0, source.size).hexdigest()
        return digits

    with ThreadPoolExecutor(threads) as pool:
        return dict(zip((identity.path for identity in inputs), pool.map(hashed, inputs), strict=True))
