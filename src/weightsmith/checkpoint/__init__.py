"""A model on disk as a lazy mapping from name to tensor, and the place where an output is built."""

from __future__ import annotations

import os
from dataclasses import replace

from weightsmith.checkpoint.checkpoint import Checkpoint
from weightsmith.checkpoint.folder import open_weights
from weightsmith.checkpoint.hub import is_hub_id, resolve
from weightsmith.checkpoint.reference import Reference, parse_reference
from weightsmith.checkpoint.storage import is_url
from weightsmith.errors import CheckpointError

__all__ = ["Checkpoint", "open_checkpoint"]


def open_checkpoint(reference: str | os.PathLike[str] | Reference) -> Checkpoint:
    """Open a model by its reference, reading headers only.

    Args:
        reference: a folder, a file, a hub id or a URL, with ``@revision``, ``#task``,
            ``+adapter`` and ``+0.5*adapter`` where they apply.

    Raises:
        CheckpointError: if there is nothing there that can be read as a checkpoint.
        UnsafeFileError: if a file asks for something that no file of weights should ask for.
    """
    parsed = reference if isinstance(reference, Reference) else parse_reference(reference)
    model = _open_one(replace(parsed, adapters=()))
    adapters = list(parsed.adapters)
    if adapters and adapters[0].reference.task is not None and adapters[0].weight == 1:
        model = _open_task(adapters.pop(0).reference, base=model)
    if not adapters:
        return model
    from weightsmith.adapters.fold import fold

    opened = [_open_adapter(one.reference) for one in adapters]
    return fold(model, opened, [one.weight for one in adapters], name=str(parsed))


def _open_adapter(reference: Reference) -> Checkpoint:
    if reference.task is not None:
        raise CheckpointError(
            f"{reference} is a model of a bundle, not an adapter: it stands first behind its base, without a weight"
        )
    return open_weights(locate(reference), str(reference))


def _open_one(reference: Reference) -> Checkpoint:
    if reference.task is not None:
        return _open_task(reference)
    return open_weights(locate(reference), str(reference))


def _open_task(reference: Reference, base: Checkpoint | None = None) -> Checkpoint:
    from weightsmith.bundle.bundle import Bundle

    bundle = Bundle(locate(reference), str(replace(reference, task=None)), base=base)
    return bundle.task(reference.task or "")


def locate(reference: Reference) -> str:
    """Return the folder, file or URL of a model, fetched from the hub where it is there.

    Raises:
        CheckpointError: if the hub does not give it, or it has a revision and is not on the hub.
    """
    path = os.path.expanduser(reference.path)
    if is_url(path) or os.path.exists(path) or not is_hub_id(path):
        if reference.revision is not None:
            raise CheckpointError(
                f"{path} is no model on the hub, and only those have revisions: leave out @{reference.revision}"
            )
        return path
    return resolve(path, reference.revision)
