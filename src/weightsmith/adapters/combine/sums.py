"""The weighted sum of adapters, exactly: their factors side by side, and made small again where that loses nothing."""

from __future__ import annotations

from typing import Annotated

import numpy as np

from weightsmith.adapters.change import LowRank
from weightsmith.adapters.combine.registry import products
from weightsmith.adapters.combine.stack import Stack
from weightsmith.errors import MethodError
from weightsmith.methods.parameters import Param


@products("linear", exact=True, source="the definition of a weighted sum; recompressed by Eckart and Young, 1936")
def linear(stack: Stack) -> LowRank:
    """The true weighted sum of the deltas: ``sum_i w_i s_i B_i A_i``, in as few ranks as hold it.

    The factors are laid side by side, which is exact, both stacks are orthogonalised (QR), and the small matrix between
    them is decomposed: no B A is ever formed. By default every rank above rounding is kept. ``--rank`` and ``--energy``
    keep the largest singular values, which no other product of that rank comes nearer to.

    PEFT's ``linear`` is another thing: it adds the factors, each with the square root of its weight, and so adds every
    B_i A_j with i other than j. ``--compat peft`` gives its numbers.
    """
    return stack.sum()


@products("cat", exact=True, source="PEFT's cat, with the factors as they are", rank=lambda ranks, _: sum(ranks))
def cat(stack: Stack) -> LowRank:
    """The weighted sum by concatenation alone: the factors side by side, as they are; the rank is the sum of ranks.

    A is that of the inputs to the bit, and B is multiplied with weight and scale. With ``--rank`` or ``--energy`` it is
    ``linear``.
    """
    return stack.sum()


@products("svd", exact=True, source="PEFT's svd, through the factors", rank=lambda ranks, _: max(ranks))
def svd(stack: Stack) -> LowRank:
    """The weighted sum cut to the largest rank among the adapters, or to ``--rank``, as PEFT's ``svd`` does.

    The numbers are those of a truncated SVD of the dense sum, which is not formed.
    """
    return stack.sum()


@products(
    "orthogonal",
    exact=True,
    source="Po et al., Orthogonal adaptation for modular customization of diffusion models, CVPR 2024, "
    "arXiv:2312.02432; from paper knowledge",
)
def orthogonal(
    stack: Stack,
    *,
    tolerance: Annotated[
        float | None, Param("refuse adapters whose fixed factors have a larger cosine than this", minimum=0, maximum=1)
    ] = None,
) -> LowRank:
    """Orthogonal Adaptation: the weighted sum of adapters whose fixed factors A were drawn orthogonal to each other.

    Inputs in the space of one adapter's A are then left alone by all others, and the sum does on each task's inputs
    what that task's adapter does. Whether it is so is checked, and the report says how far from it: the largest cosine
    of an angle between the spaces that the rows of two adapters' A span, 0 where they are orthogonal, 1 where they
    share a direction. LoRAs that were not trained so share about ``sqrt(rank / in)`` by chance.
    """
    if tolerance is not None:
        cosine = largest_cosine(stack)
        if cosine > tolerance:
            raise MethodError(
                f"{stack.module}: the fixed factors of two adapters have a cosine of {cosine:.3g}, and at most "
                f"{tolerance:g} is wanted: they were not trained to be orthogonal; use linear, or raise the tolerance"
            )
    return stack.sum()


def largest_cosine(stack: Stack) -> float:
    """Return the largest cosine of an angle between the row spaces of two adapters' right factors; 0 for one alone."""
    bases = []
    for _, part, _ in stack.taking_part():
        u, s, _ = np.linalg.svd(part.right.T, full_matrices=False)
        bases.append(u[:, s > s.max(initial=0.0) * 1e-12])
    found = 0.0
    for place, one in enumerate(bases):
        for other in bases[place + 1 :]:
            if one.size and other.size:
                found = max(found, float(np.linalg.norm(one.T @ other, 2)))
    return min(found, 1.0)
