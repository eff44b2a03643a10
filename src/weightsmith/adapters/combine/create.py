"""Combining adapters that a person names, and restoring one of those that a basis holds."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from weightsmith.adapters.combine.combination import Combination
from weightsmith.adapters.combine.recipe import Recipe
from weightsmith.adapters.combine.registry import Saved
from weightsmith.adapters.combine.reverting import Reverted
from weightsmith.checkpoint import open_checkpoint
from weightsmith.checkpoint.checkpoint import Checkpoint
from weightsmith.checkpoint.source import Source, as_checkpoint, as_reference
from weightsmith.errors import MethodError, PlanError
from weightsmith.methods.matrices import Decomposition
from weightsmith.plan.output import Output
from weightsmith.plan.remake import understood


def merge(
    adapters: Sequence[Source],
    method: str = "linear",
    *,
    weight: float | Sequence[float] = 1.0,
    rank: int | None = None,
    energy: float | None = None,
    base: Source | None = None,
    dtype: str | None = None,
    compat: Literal["peft"] | None = None,
    saved: Saved | None = None,
    seed: int = 0,
    decomposition: Decomposition = "exact",
    threads: int | None = None,
    memory: int | None = None,
    **parameters: Any,
) -> Combination:
    """Combine adapters into one, lazily.

    Args:
        adapters: references, or opened adapters, of any kind whose changes are products of two factors.
        method: ``linear``, the true weighted sum, by default; one of those of ``weightsmith adapter merge --help``; or
            a method on task vectors (``weightsmith methods``), which then works on the deltas' entries.
        weight: of every adapter, or one for each; 1 by default. Below 0 takes an adapter's change away.
        rank: the greatest rank of a layer; by default all that hold the result.
        energy: the share of the squared norm of a layer's change that is kept, instead.
        base: the model that they are for: needed for changes of no low rank (DoRA), and for sums of saved modules.
        dtype: the dtype of the result; by default that of the adapters.
        compat: ``"peft"`` for the numbers of PEFT's ``add_weighted_adapter`` where they are others.
        saved: what becomes of biases and saved modules: ``"sum"`` of their changes, ``"mean"``, or ``"drop"``; by
            default what the method does with layers.
        seed: of random methods.
        decomposition: of dense results: ``exact`` or ``randomized``.
        threads: how many threads to use where values must be read to plan.
        memory: most bytes to hold meanwhile.
        **parameters: the method's parameters (``lambda_`` for ``lambda``).

    Returns:
        A checkpoint whose tensors are computed when they are read; ``.save(path)`` writes it, ``.report()`` tells ranks
        and errors.

    Raises:
        MethodError: if the method is unknown, or does not take these parameters.
        PlanError: if the adapters cannot be combined so.
        CheckpointError: if one cannot be read, is no adapter, or has no factors.
    """
    opened = [_opened(one) for one in adapters]
    if not opened:
        raise PlanError("nothing to combine: name one adapter or more")
    recipe = Recipe(
        method,
        tuple(map(as_reference, adapters)),
        _weights(weight, len(opened)),
        {name.rstrip("_"): value for name, value in parameters.items()},
        _whole("rank", rank),
        _share("energy", energy),
        None if base is None else as_reference(base),
        dtype,
        _choice("compat", compat, ("peft",)),
        _choice("saved", saved, ("sum", "mean", "drop")),
        seed,
        decomposition,
    )
    _choice("decomposition", decomposition, ("exact", "randomized"))
    return Combination(recipe, opened, None if base is None else _opened(base), threads=threads, memory=memory)


def revert(basis: str | os.PathLike[str], adapter: str | int, *, dtype: str | None = None) -> Reverted:
    """Restore one of the adapters that a basis was made of (``--method rmm``), lazily.

    Args:
        basis: the folder with the basis.
        adapter: its name, or its number from 1.
        dtype: the dtype of the result; by default that of the basis.

    Raises:
        CheckpointError: if it is no basis, or has no such adapter.
    """
    return Reverted(Path(basis), adapter, dtype)


def remake(key: str, content: Mapping[str, Any], *, threads: int | None = None) -> Output:
    """Return the combination, or the restored adapter; see :func:`weightsmith.plan.remake.remake`."""
    with understood():
        if key == "adapter_revert":
            return revert(content["basis"], content["adapter"], dtype=content["dtype"])
        recipe = Recipe(
            **{
                **content,
                "adapters": tuple(map(str, content["adapters"])),
                "weights": tuple(map(float, content["weights"])),
                "parameters": dict(content["parameters"]),
            }
        )
    opened = [open_checkpoint(reference) for reference in recipe.adapters]
    base = None if recipe.base is None else open_checkpoint(recipe.base)
    return Combination(recipe, opened, base, threads=threads)


def _opened(source: Source) -> Checkpoint:
    if isinstance(source, Output):
        raise PlanError(f"{source.name} is not written yet: save it, and name the folder")
    return as_checkpoint(source)


def _weights(weight: float | Sequence[float], count: int) -> tuple[float, ...]:
    given = [weight] * count if isinstance(weight, int | float) else list(weight)
    if len(given) == 1:
        given *= count
    if len(given) != count:
        raise MethodError(f"{len(given)} weights for {count} adapters; give one, or one for each")
    found = tuple(float(one) for one in given)
    if not all(abs(one) < 1e18 for one in found):
        raise MethodError(f"the weights are {', '.join(f'{one:g}' for one in found)}; finite numbers are needed")
    return found


def _whole(name: str, value: Any) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise MethodError(f"{name} is {value!r}; a whole number from 1 is needed")
    return value


def _share(name: str, value: Any) -> float | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1):
        raise MethodError(f"{name} is {value!r}; a share above 0 and up to 1 is needed, such as 0.95")
    return None if value is None else float(value)


def _choice(name: str, value: Any, choices: tuple[str, ...]) -> Any:
    if value is not None and value not in choices:
        raise MethodError(f"{name} is {value!r}; one of {', '.join(choices)} is needed")
    return value
