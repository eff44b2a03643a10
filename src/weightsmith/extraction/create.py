"""Taking an adapter out of models that a person names, or again from the recipe in its manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from weightsmith.adapters.codes import Quantizer
from weightsmith.checkpoint import open_checkpoint
from weightsmith.checkpoint.source import Source, as_checkpoint, as_reference
from weightsmith.engine.progress import ProgressListener
from weightsmith.extraction.extraction import Extraction
from weightsmith.extraction.recipe import Kind, Recipe, Scope
from weightsmith.methods.matrices import Decomposition
from weightsmith.plan.remake import understood


def extract(
    finetuned: Source,
    base: Source,
    *,
    kind: Kind = "lora",
    rank: int | None = None,
    energy: float | None = None,
    effective_rank: bool = False,
    budget: int | None = None,
    max_rank: int | None = None,
    dora: bool = False,
    decomposition: Decomposition = "exact",
    density: float | None = None,
    scope: Scope = "tensor",
    bits: int | None = None,
    quantizer: Quantizer | None = None,
    dtype: str | None = None,
    only_matrices: bool = False,
    whole: Sequence[str] = (),
    exclude: Sequence[str] = (),
    rename: Sequence[str] = (),
    threads: int | None = None,
    memory: int | None = None,
    progress: ProgressListener | None = None,
) -> Extraction:
    """Take an adapter out of a fine-tune and its base, lazily.

    Reads which tensors changed and, unless the rank is given, the singular values of every change; the adapter itself
    is computed when it is saved, or its tensors are read.

    Args:
        finetuned: the fine-tune: a reference or a checkpoint.
        base: what it was made from.
        kind: ``lora``, in PEFT's layout; ``sparse``, the entries of largest magnitude; ``sign``, a bit per weight and a
            scale per matrix (BitDelta); ``quantized``, a few bits per weight (RWS).
        rank: of a LoRA, the rank of every matrix. Of a sparse adapter, the rank of the LoRA that has as many
            parameters: it is then written as PEFT's SHiRA.
        energy: the least rank that keeps this share of the sum of squares of each change.
        effective_rank: each change's effective rank, rounded up: the exponential of the entropy of its singular values.
        budget: most bytes of all tensors of the adapter; triples are taken over all matrices, by what they
            keep per byte.
        max_rank: the largest rank of any matrix.
        dora: whether every row has a magnitude (DoRA); never further off than the LoRA of the same rank.
        decomposition: ``exact`` (LAPACK), or ``randomized``: faster where few triples of many are kept.
        density: of a sparse adapter, the share of entries that is kept.
        scope: whether that is the share of each ``tensor`` or of the ``model``.
        bits: of a quantized one, bits per entry.
        quantizer: how its levels lie: ``linear``, ``log2`` or ``tanh``.
        dtype: the dtype of factors and values; by default that of the fine-tune.
        only_matrices: whether changed tensors are left out that are not taken apart; by default they are kept whole.
        whole: patterns, with ``*`` and ``?``, of names of tensors to keep whole.
        exclude: patterns of names of tensors to leave out.
        rename: for modules that are named otherwise where the adapter is loaded: ``PATTERN=REPLACEMENT`` each, regular
            expressions.
        threads: how many threads to use; by default one per core.
        memory: most bytes to hold; fewer matrices are worked on at a time where that takes it.
        progress: told of progress where models are read.

    Returns:
        The adapter: ``.save(path)`` writes it, ``.report()`` tells what it loses.

    Raises:
        MethodError: if the settings contradict one another.
        PlanError: if nothing changed, or the two cannot be compared.
        CheckpointError: if one cannot be read, or holds values that are not finite.
    """
    recipe = Recipe(
        as_reference(finetuned),
        as_reference(base),
        kind=kind,
        rank=rank,
        energy=energy,
        effective_rank=effective_rank,
        budget=budget,
        max_rank=max_rank,
        dora=dora,
        decomposition=decomposition,
        density=density,
        scope=scope,
        bits=bits,
        quantizer=quantizer,
        dtype=dtype,
        only_matrices=only_matrices,
        whole=tuple(whole),
        exclude=tuple(exclude),
        rename=tuple(rename),
    )
    return Extraction(
        recipe, as_checkpoint(finetuned), as_checkpoint(base), threads=threads, memory=memory, progress=progress
    )


def remake(key: str, content: Mapping[str, Any], *, threads: int | None = None) -> Extraction:
    """Return the adapter that a manifest describes; see :func:`weightsmith.plan.remake.remake`."""
    with understood():
        lists = {name: tuple(content.get(name, ())) for name in ("whole", "exclude", "rename")}
        recipe = Recipe(**{**content, **lists})
    return Extraction(recipe, open_checkpoint(recipe.finetuned), open_checkpoint(recipe.base), threads=threads)
