"""Beginning a training on a base that a person names, or again from the recipe in a manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from weightsmith.checkpoint import open_checkpoint
from weightsmith.checkpoint.source import Source, as_checkpoint, as_reference
from weightsmith.initialization.recipe import Recipe
from weightsmith.initialization.starting import StartingAdapter, StartingBase
from weightsmith.methods.matrices import Decomposition
from weightsmith.plan.remake import understood


def initialize_adapter(
    base: Source,
    *,
    method: str,
    rank: int,
    alpha: float | None = None,
    targets: Sequence[str] = (),
    activations: Source | None = None,
    rho: float = 1.0,
    smallest: bool = False,
    decomposition: Decomposition = "exact",
    seed: int = 0,
    dtype: str = "float32",
    residual_dtype: str | None = None,
    trained_on: str | None = None,
    threads: int | None = None,
) -> StartingAdapter:
    """Make a LoRA to begin a training with, lazily.

    Args:
        base: the base: a reference or a checkpoint.
        method: ``kaiming``: random A and B zero, as LoRA begins; ``pissa``: the leading singular triples of each
            weight; ``milora``: the trailing ones; ``olora``: the first rows of its QR decomposition; ``eva``: the
            directions in which inputs vary most as A, B zero; ``corda``: singular triples as the inputs weigh them.
        rank: the rank.
        alpha: lora_alpha; the rank by default, so that the scale is 1.
        targets: patterns of names of modules, or their last parts; by default all linear layers within layers.
        activations: for ``eva`` and ``corda``, inputs of the layers: a file with a tensor ``[samples, in]``, or a Gram
            matrix ``[in, in]``, under each module's name. Without it ``eva`` takes the right singular vectors of the
            weights, and ``corda`` takes inputs for white, which makes it PiSSA.
        rho: of ``eva``, how much larger than the rank one layer's may become as ranks are shared out by what directions
            explain.
        smallest: of ``corda``, whether the smallest singular values are taken (``kpm``) and not the largest (``ipm``).
        decomposition: ``exact``, or ``randomized``.
        seed: of random numbers.
        dtype: the dtype of the factors.
        residual_dtype: the dtype of the base that belongs to the adapter; its own by default.
        trained_on: how the adapter's config names the base that it is trained on, where that is another.
        threads: how many threads to use.

    Returns:
        The adapter: ``.save(path)`` writes it. Of ``pissa``, ``milora``, ``olora`` and ``corda``, ``.residual()`` is
        the base that it must be trained on: the two together compute what the base did.

    Raises:
        MethodError: if there is no such method, or a setting does not fit it.
        PlanError: if the base has no such layers.
        CheckpointError: if a file cannot be read, or activations do not fit.
    """
    recipe = Recipe(
        as_reference(base),
        method,
        rank,
        alpha=alpha,
        targets=tuple(targets),
        activations=None if activations is None else as_reference(activations),
        rho=rho,
        smallest=smallest,
        decomposition=decomposition,
        seed=seed,
        dtype=dtype,
        residual_dtype=residual_dtype,
        trained_on=trained_on,
    )
    found = None if activations is None else as_checkpoint(activations)
    return StartingAdapter(recipe, as_checkpoint(base), found, threads=threads)


def remake(key: str, content: Mapping[str, Any], *, threads: int | None = None) -> StartingAdapter | StartingBase:
    """Return the adapter, or the base that belongs to it; see :func:`weightsmith.plan.remake.remake`."""
    with understood():
        settings = dict(content)
        residual = settings.pop("residual", False)
        recipe = Recipe(**{**settings, "targets": tuple(settings.get("targets", ()))})
    activations = None if recipe.activations is None else open_checkpoint(recipe.activations)
    adapter = StartingAdapter(recipe, open_checkpoint(recipe.base), activations, threads=threads)
    return adapter.residual() if residual else adapter
