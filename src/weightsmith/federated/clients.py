"""Who takes part in a round: client checkpoints or updates, by name, and what is known of each."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from weightsmith import dtypes
from weightsmith.api import merge
from weightsmith.checkpoint.checkpoint import Checkpoint
from weightsmith.checkpoint.source import Source, as_checkpoint, as_reference
from weightsmith.checkpoint.storage import WEIGHT_FILES, list_folder
from weightsmith.errors import CheckpointError, MethodError, RecipeError, did_you_mean
from weightsmith.plan.merged import LazyCheckpoint
from weightsmith.recipe.schema import DTYPES

# A folder with an entry per client, or references or checkpoints by the clients' names, or in any order.
Clients = str | os.PathLike[str] | Mapping[str, Source] | Sequence[Source]
# Whether clients send their models, or what training added to the global model.
Updates = Literal["models", "deltas"]
# Something known of the clients: by name, in their order, or one value for all.
Known = Mapping[str, "Value"] | Sequence["Value"]
Value = TypeVar("Value", int, float)


def clients_of(given: Clients) -> dict[str, Source]:
    """Return the clients by name.

    Args:
        given: a folder in which every sub-folder, or, where it has none, every file of weights is a client's, named by
            it without its suffix, in natural order (``client-2`` before ``client-10``); or a mapping; or a sequence,
            whose clients are named by their positions, ``0`` and on.

    Raises:
        CheckpointError: if there is no such folder, nothing in it can be a client's, or it is a model itself.
        RecipeError: if two files would have one name.
    """
    if isinstance(given, Checkpoint):
        raise RecipeError(f"one checkpoint is given for the clients ({given.name}); give a list or a mapping of them")
    if isinstance(given, Mapping):
        return {str(name): source for name, source in given.items()}
    if not isinstance(given, str | os.PathLike):
        return {str(i): source for i, source in enumerate(given)}
    folder = Path(given)
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder} of clients; it should hold a folder or file for each")
    names = [name for name in list_folder(str(folder)) if not name.startswith(".")]
    if any(name == "config.json" or name.endswith(".index.json") for name in names):
        raise CheckpointError(f"{folder} is one model, not a folder of clients; give the folder around it")
    found = [name for name in names if (folder / name).is_dir()]
    found = found or [name for name in names if name.endswith(WEIGHT_FILES)]
    if not found:
        raise CheckpointError(f"{folder} holds neither folders nor files of weights; give each client one of its own")
    clients: dict[str, Source] = {}
    for file in sorted(found, key=_natural):
        name = file if (folder / file).is_dir() else file.rsplit(".", 1)[0]
        if name in clients:
            raise RecipeError(f"{folder} holds two files of a client {name}; leave one, or give a mapping of clients")
        clients[name] = str(folder / file)
    return clients


def known_of(known: Known[Any] | float | None, names: Sequence[str], what: str, default: float = 1) -> list[Any]:
    """Return what is known of each client.

    Args:
        known: a value per client by name, or in their order; one for all; or None for the default.
        names: the clients' names. A mapping may know of further ones.
        what: what it is, for errors.
        default: the value of each where nothing is given.

    Raises:
        MethodError: if a client has no value, or there are not as many values as clients.
    """
    if known is None or isinstance(known, int | float):
        return [default if known is None else known] * len(names)
    if isinstance(known, Mapping):
        for name in names:
            if name not in known:
                raise MethodError(f"{what} has no value for client {name!r}{did_you_mean(name, map(str, known))}")
        return [known[name] for name in names]
    if len(known) != len(names):
        raise MethodError(f"{what} has {len(known)} values for {len(names)} clients; give one for each")
    return list(known)


def moved(
    base: Source,
    clients: Sequence[Source],
    factors: Sequence[float],
    *,
    updates: Updates,
    stored: Mapping[str, float] | None = None,
    **settings: Any,
) -> LazyCheckpoint:
    """Return the base plus a weighted sum of the clients' updates and of stored ones.

    Args:
        base: the global model that the clients started from.
        clients: their models, or updates.
        factors: one number per client.
        updates: which of the two they are.
        stored: path of a stored update -> its factor.
        **settings: further arguments of :func:`weightsmith.merge`. The dtype is by default the base's, if it has one.
    """
    if updates not in ("models", "deltas"):
        raise RecipeError(f"updates is {updates!r}; it must be 'models' or 'deltas'")
    start = as_checkpoint(base)
    settings = {"dtype": _dtype_of(start), **settings}
    pairs = list(zip(clients, factors, strict=True))
    if updates == "models":
        # Who sends the base back adds nothing to it, and no method takes its base for a model as well.
        pairs = [(client, factor) for client, factor in pairs if as_reference(client) != start.name]
    if not pairs and not stored:
        return merge("passthrough", [start], **settings)
    if updates == "models" and not stored:
        return merge("task_arithmetic", [c for c, _ in pairs], base=start, weight=[f for _, f in pairs], **settings)
    changes = [change_of(start, client, updates) for client, _ in pairs]
    history = dict(stored or {})
    return merge(
        "linear",
        [start, *changes, *history],
        weight=[1.0, *(factor for _, factor in pairs), *history.values()],
        normalize=False,
        **settings,
    )


def change_of(base: Source, client: Source, updates: Updates, dtype: str | None = None) -> Source:
    """Return a client's update: what it sent, or its model minus the base, in float32 at least."""
    if updates == "deltas":
        return client
    return merge("linear", [client, base], weight=[1.0, -1.0], normalize=False, dtype=dtype)


def _dtype_of(base: Checkpoint) -> str | None:
    found = {dtypes.name_of(tensor.dtype) for tensor in base.values() if dtypes.is_float(tensor.dtype)}
    return found.pop() if len(found) == 1 and found <= set(DTYPES) else None


def _natural(name: str) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", name) if part]
