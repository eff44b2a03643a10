"""What Python functions take for a model: its reference, or the checkpoint itself."""

from __future__ import annotations

import os

from weightsmith.checkpoint import open_checkpoint
from weightsmith.checkpoint.checkpoint import Checkpoint

Source = str | os.PathLike[str] | Checkpoint


def as_checkpoint(source: Source) -> Checkpoint:
    """Return a checkpoint, opened if it was named.

    Raises:
        CheckpointError: if there is nothing there that can be read as a checkpoint.
    """
    return source if isinstance(source, Checkpoint) else open_checkpoint(source)


def as_reference(source: Source) -> str:
    """Return the text by which a manifest names a model."""
    return source.name if isinstance(source, Checkpoint) else os.fspath(source)
