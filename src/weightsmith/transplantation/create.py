"""Giving a model that a person names another one's tokenizer, or doing it again from the recipe in a manifest."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from weightsmith.checkpoint import open_checkpoint
from weightsmith.checkpoint.checkpoint import Checkpoint
from weightsmith.checkpoint.source import Source, as_checkpoint, as_reference
from weightsmith.plan.remake import understood
from weightsmith.tokenizer.facts import open_holder
from weightsmith.transplantation.nearest import Metric
from weightsmith.transplantation.neighbours import Scheme
from weightsmith.transplantation.output import Transplant
from weightsmith.transplantation.recipe import Method, Pieces, Recipe, Template, Where


def transplant(
    model: Source,
    donor: Source,
    method: Method = "omp",
    *,
    head_method: Method | None = None,
    atoms: int | None = None,
    centred: bool = False,
    neighbours: int | None = None,
    temperature: float | None = None,
    weights: Scheme | None = None,
    metric: Metric | None = None,
    pieces: Pieces | None = None,
    byte_match: Where = "none",
    prefix_match: Where = "none",
    trained_only: bool = False,
    auxiliary: str | os.PathLike[str] | None = None,
    pad_to_multiple_of: int | None = None,
    keep_size: bool = False,
    scale: float | None = None,
    chat_template: Template = "donor",
    seed: int = 0,
) -> Transplant:
    """Give a model another one's tokenizer, lazily.

    Tokens that stand for the same text in both keep the model's rows, to the bit; rows of the others are made, in
    embeddings and head each for itself. Everything else is carried as it is. Nothing is read but headers and tokenizers
    until the result is saved, or its tensors are read; with ``trained_only`` the tables of both are.

    Args:
        model: the model: a reference or a checkpoint.
        donor: the model whose tokenizer it gets; for methods that compare no embeddings also a folder that holds a
            tokenizer alone, or its ``tokenizer.json``.
        method: how rows of new tokens are made: ``omp``, orthogonal matching pursuit; ``interpolation`` of the nearest
            anchors, or the ``nearest`` one; ``wechsel`` and ``focus``, by similarity; ``landmark_pca``, by one linear
            map; ``subword``, of the pieces that the model's tokenizer cuts them into; ``mean``, ``zero``; ``random``
            and ``gaussian``, drawn around the mean.
        head_method: how rows of the head are, where it is another way.
        atoms: of ``omp``, of how many anchors a token is made; 64 by default.
        centred: of ``omp``, whether the sums are of rows less the anchors' mean row, here as there: what all rows have
            in common, on which the chances of tokens depend, is kept then. A variant of ours.
        neighbours: of ``omp``, among how many of the nearest anchors they are picked, by default all; of
            ``interpolation`` (64) and ``wechsel`` (10), how many are taken.
        temperature: of ``wechsel``; 0.1 by default.
        weights: of ``interpolation``: by ``distance``, ``barycentric`` or ``least_squares``.
        metric: of ``interpolation``: ``euclidean`` or ``cosine``.
        pieces: of ``subword``: ``mean``, ``sum``, ``weighted_mean`` or ``first_last``.
        byte_match: where ``<0x41>`` is taken for ``A``: ``none``, ``embeddings``, ``head`` or ``both``.
        prefix_match: where a new token takes the row of the longest token that it begins with.
        trained_only: whether tokens that look untrained are no anchors; see
            :func:`weightsmith.transplantation.trained.untrained`.
        auxiliary: a file with a vector for each of the donor's tokens, which are compared in place of its embeddings.
        pad_to_multiple_of: the number of rows is made a multiple of it, by rows of zeros.
        keep_size: whether there are at least as many rows as the model has.
        scale: of ``random`` and ``gaussian``, what deviations from the mean are multiplied by: 1, and the root of 1e-5.
        chat_template: the ``donor``'s, or ``keep`` for the model's, or ``none``.
        seed: of ``random`` and ``gaussian``.

    Returns:
        The model with the tokenizer: ``.save(path)`` writes it, ``.report()`` tells what became of every token.

    Raises:
        MethodError: if the settings contradict one another, or the method needs what is not there.
        PlanError: if the two do not fit one another.
        CheckpointError: if one cannot be read.
    """
    recipe = Recipe(
        as_reference(model),
        as_reference(donor),
        method=method,
        head_method=head_method,
        atoms=atoms,
        centred=centred,
        neighbours=neighbours,
        temperature=temperature,
        weights=weights,
        metric=metric,
        pieces=pieces,
        byte_match=byte_match,
        prefix_match=prefix_match,
        trained_only=trained_only,
        auxiliary=None if auxiliary is None else os.fspath(auxiliary),
        pad_to_multiple_of=pad_to_multiple_of,
        keep_size=keep_size,
        scale=scale,
        chat_template=chat_template,
        seed=seed,
    )
    return Transplant(recipe, as_checkpoint(model), _donor(donor))


def remake(key: str, content: Mapping[str, Any], *, threads: int | None = None) -> Transplant:
    """Return the model that a manifest describes; see :func:`weightsmith.plan.remake.remake`."""
    with understood():
        recipe = Recipe(**content)
    return Transplant(recipe, open_checkpoint(recipe.model), _donor(recipe.donor))


def _donor(source: Source) -> Checkpoint:
    return source if isinstance(source, Checkpoint) else open_holder(os.fspath(source))
