"""Whether models were trained from the base that was named: a test on their weights.

Weights of networks that were trained apart are independent vectors of many entries, and such vectors are almost
orthogonal; a model that was trained from a base stays near it. So the cosine of each large matrix with the base's
tells the two apart: among three networks that were trained apart (silero-vad 5.1.2, 6.0.0 and 6.2.3) it is at most
0.033, between one and what further training made of it (chgnet 0.3.0 and r2scan) 0.993 at the median.

How large a cosine chance makes: let A and B be matrices of m rows, and the directions that one of them uses among
the rows be random against the other's. Then E cos(A, B) = 0, and E cos(A, B)^2 <= 1/m, whatever else the two have in
common; independent entries give 1/(m n). We take the smaller side for m, so ``cos * sqrt(min(m, n))`` is at most a
standard normal z value, and z values of k matrices add up to one over ``sqrt(k)`` (Stouffer). With millions of
entries every trace of a relation is beyond chance, so a small p value alone says little: the verdict goes by size.

Only matrices are looked at. Norms and biases are near 1 or 0 in every model, trained together or not: biases of those
three networks have cosines of 0.15 to 0.29. Embeddings and heads are left out as well: models with other vocabularies
have other rows.

The size of the cosine, and the geometry of several models (:func:`better_base`), are inferred, not published.
"""

from __future__ import annotations

import itertools
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from weightsmith.architecture.components import TOKEN_TABLES
from weightsmith.report.findings import Agreement, BaseTest, Change, Figure, Report, TensorFacts

# Of two vectors of one length with a cosine above this, each is nearer to the other than to zero.
RELATED = 0.5
# Below it, less than a hundredth of the energy of a matrix lies along the base's. Networks that were trained apart have
# at most 0.033 (see above); means that are not zero can make it a few times that.
UNRELATED = 0.1
# The share of the tested entries that decides: a re-initialised layer or two do not make another model.
MOST = 0.9
# A relation that chance explains so often is none. Chance is overestimated, so this is on the safe side.
CHANCE = 1e-3
# A permutation of units leaves norms as they are, and training a little besides changes them by half the square of
# the relative distance; those of networks that were trained apart are some per cent from each other. Inferred.
SAME_NORM = 2e-3
# Matrices with fewer rows or columns have too large cosines by chance.
SMALLEST_SIDE = 16
# Left out: see above.
LEFT_OUT = TOKEN_TABLES | {"norm"}
# Task vectors from their true base are orthogonal or a little alike (arXiv:2212.04089); from a base that is
# itself such a fine-tune, cosines are near 0.5, as of the edges of a regular simplex. A model is suggested as a base
# where its cosine is below the middle of the two, and well below the named base's.
CENTRE = 0.35
CENTRE_GAIN = 0.15
# Below it, the others lie on opposite sides of a model: it is made of them. From the mean of n models, their mean
# cosine is -1/(n - 1).
BETWEEN = -0.05


@dataclass(frozen=True)
class Nearness:
    """How near a model's matrices are to the base's.

    Attributes:
        label: the model's.
        tested: number of matrices.
        z: their combined z value, above chance where it is large.
        cosine: median cosine with the base, over matrices.
        relative: norm of the difference over the norm of the base, over all the matrices together.
        related: share of the entries that lie in matrices with a cosine of at least ``RELATED``.
        unrelated: share of the entries that lie in matrices with a cosine below ``UNRELATED``.
        strangers: names of these matrices.
        permuted: whether each of them has the norm that it has in the base, so that it may be the base's with its
            rows or columns in another order.
    """

    label: str
    tested: int
    z: float
    cosine: float
    relative: float
    related: float
    unrelated: float
    strangers: tuple[str, ...]
    permuted: bool

    @property
    def p(self) -> float:
        """The chance of such a z value, or a larger one, of weights that have nothing to do with the base's.

        It is an upper bound, so it is never 0: below the least normal number of float64, that number stands for it.
        """
        return max(0.5 * math.erfc(self.z / math.sqrt(2.0)), sys.float_info.min)

    @property
    def mixed(self) -> bool:
        """Whether a part of the model that matters has nothing to do with the base, and not all of it."""
        return 1.0 - MOST < self.unrelated < MOST

    @property
    def shares(self) -> bool | None:
        """The verdict: see :class:`weightsmith.report.findings.BaseTest`."""
        if self.unrelated >= MOST:
            return False
        if self.related >= MOST and self.p <= CHANCE:
            return True
        return None


@dataclass(frozen=True)
class Candidate:
    """A model that would be a better base than the one that was named.

    Attributes:
        label: the model's.
        cosine: mean cosine of the other related models' task vectors, taken from this model.
        named: the same, taken from the base; None where the base is not related to them, or nobody named it.
        models: labels of those other models.
    """

    label: str
    cosine: float
    named: float | None
    models: tuple[str, ...]


def base_tests(report: Report) -> tuple[BaseTest, ...]:
    """Return the test of each model of a report.

    Args:
        report: its rows per tensor (``changes.tensors``) are what is tested; its own ``base_tests`` are not looked at.

    Returns:
        One for each model, in order. Where no matrix could be tested, verdict and p value are None.
    """
    found = nearness(report)
    totals = {row.model: row for row in report.changes.total}
    return tuple(_told(model.label, found.get(model.label), totals.get(model.label)) for model in report.models)


def nearness(report: Report) -> dict[str, Nearness]:
    """Return how near each model's matrices are to the base's, of those models that have any that can be tested."""
    sides = _sides(report.tensors)
    rows: dict[str, list[Change]] = {model.label: [] for model in report.models}
    for row in report.changes.tensors:
        if row.scope.tensor in sides and row.cosine_base is not None and row.model in rows:
            rows[row.model].append(row)
    return {label: _nearness(label, found, sides) for label, found in rows.items() if found}


def better_base(report: Report) -> Candidate | None:
    """Return the model of a report that the other ones were rather trained from than from its base, if there is one.

    Fine-tunes of one model point away from it in directions that have little to do with each other. So from the true
    base, the cosines of task vectors are small; from a base that is itself one of the fine-tunes, every task vector
    contains the way back from it, and cosines are near 0.5; from an unrelated base they are near 0.5 for the
    same reason. From a merge of the others, which lies between them, they are below zero. It takes two models besides
    the candidate to tell.

    Args:
        report: its rows per tensor are what is looked at. Where nobody named its base, that is a model like the
            others, and may be the one that is returned.
    """
    distances = _distances(report)
    if distances is None:
        return None
    base = report.base.label
    models = [label for label in distances.labels if label != base or not report.base_named]
    found = []
    for label in models:
        family = [other for other in models if other != label and distances.related(label, other)]
        cosine = _mean_cosine(distances, label, family)
        if cosine is None or not BETWEEN <= cosine <= CENTRE:
            continue
        if not report.base_named:
            found.append(Candidate(label, cosine, None, tuple(family)))
            continue
        others = [other for other in family if distances.squared(other, base) > 0.0]
        named = _mean_cosine(distances, base, others) if distances.related(label, base) else None
        if named is None and distances.related(label, base):
            continue
        if named is None or named - cosine >= CENTRE_GAIN:
            found.append(Candidate(label, cosine, named, tuple(family)))
    return min(found, key=lambda one: one.cosine, default=None)


def _sides(tensors: Sequence[TensorFacts]) -> dict[str, int]:
    """Return the smaller side of each tensor that is tested."""
    sides = {}
    for one in tensors:
        if len(one.shape) < 2 or one.component in LEFT_OUT:
            continue
        # Experts that lie in one tensor are a matrix each; their number is no side.
        stacked = len(one.shape) == 3 and one.component.startswith("expert")
        side = min(one.shape[1:]) if stacked else min(one.shape[0], math.prod(one.shape[1:]))
        if side >= SMALLEST_SIDE:
            sides[one.name] = side
    return sides


def _nearness(label: str, rows: Sequence[Change], sides: Mapping[str, int]) -> Nearness:
    entries = sum(row.entries for row in rows)
    cosines = {row.scope.tensor: row.cosine_base or 0.0 for row in rows}
    base = math.sqrt(math.fsum(row.base_norm**2 for row in rows))
    strangers = [row for row in rows if (row.cosine_base or 0.0) < UNRELATED]
    z = math.fsum((row.cosine_base or 0.0) * math.sqrt(sides[str(row.scope.tensor)]) for row in rows)
    return Nearness(
        label=label,
        tested=len(rows),
        z=z / math.sqrt(len(rows)),
        cosine=statistics.median(cosines.values()),
        relative=math.sqrt(math.fsum(row.delta_norm**2 for row in rows)) / base,
        related=sum(row.entries for row in rows if (row.cosine_base or 0.0) >= RELATED) / entries,
        unrelated=sum(row.entries for row in strangers) / entries,
        strangers=tuple(str(row.scope.tensor) for row in strangers),
        permuted=len(strangers) > 2 and all(abs(row.norm / row.base_norm - 1.0) <= SAME_NORM for row in strangers),
    )


def _told(label: str, found: Nearness | None, total: Change | None) -> BaseTest:
    if found is None:
        return BaseTest(label, None, None)
    figures = [
        Figure("matrices tested", found.tested, "matrices"),
        Figure("median cosine of a matrix with the base's", found.cosine, "cosine"),
        Figure("distance from the base over the base's norm", found.relative, "ratio"),
        Figure("share of entries in matrices that are near the base's", found.related, "share"),
        Figure("share of entries in matrices that have nothing to do with the base's", found.unrelated, "share"),
        Figure("combined z value of the cosines", found.z, "z"),
    ]
    if total is not None and total.delta_cosine_base is not None:
        figures.append(Figure("cosine of the task vector with the base", total.delta_cosine_base, "cosine"))
    return BaseTest(label, found.shares, found.p, tuple(figures))


@dataclass(frozen=True)
class _Distances:
    """Squared norms of models, the base among them, and of their differences, over matrices that all of them have."""

    labels: tuple[str, ...]
    norms: Mapping[str, float]
    between: Mapping[frozenset[str], float]

    def squared(self, first: str, second: str) -> float:
        return self.between[frozenset((first, second))]

    def related(self, first: str, second: str) -> bool:
        product = (self.norms[first] + self.norms[second] - self.squared(first, second)) / 2.0
        size = math.sqrt(self.norms[first] * self.norms[second])
        return size > 0.0 and product >= RELATED * size

    def cosine(self, origin: str, first: str, second: str) -> float | None:
        """Return the cosine of the ways from ``origin`` to two models, by the law of cosines."""
        a, b = self.squared(origin, first), self.squared(origin, second)
        return (a + b - self.squared(first, second)) / (2.0 * math.sqrt(a * b)) if a > 0.0 and b > 0.0 else None


def _distances(report: Report) -> _Distances | None:
    """Return the distances between models, or None where they have no matrix in common, or one has none of them."""
    base = report.base.label
    labels = tuple(model.label for model in report.models)
    sides = _sides(report.tensors)
    changes: dict[str, dict[str, Change]] = {name: {} for name in sides}
    for row in report.changes.tensors:
        if row.scope.tensor in changes and row.model in labels:
            changes[row.scope.tensor][row.model] = row
    shared = {name for name, rows in changes.items() if len(rows) == len(labels)}
    if not labels or not shared:
        return None
    pairs: dict[frozenset[str], list[Agreement]] = {}
    for agreement in report.agreements.tensors:
        if agreement.scope.tensor in shared:
            pairs.setdefault(frozenset((agreement.first, agreement.second)), []).append(agreement)
    rows = {label: [changes[name][label] for name in shared] for label in labels}
    norms = {label: math.fsum(row.norm**2 for row in found) for label, found in rows.items()}
    norms[base] = math.fsum(row.base_norm**2 for row in rows[labels[0]])
    between = {pair: math.fsum(row.distance**2 for row in found) for pair, found in pairs.items()}
    between |= {frozenset((label, base)): math.fsum(row.delta_norm**2 for row in rows[label]) for label in labels}
    if any(frozenset(pair) not in between for pair in itertools.combinations((base, *labels), 2)):
        return None
    return _Distances((base, *labels), norms, between)


def _mean_cosine(distances: _Distances, origin: str, models: Sequence[str]) -> float | None:
    cosines = [distances.cosine(origin, *pair) for pair in itertools.combinations(models, 2)]
    known = [cosine for cosine in cosines if cosine is not None]
    return statistics.fmean(known) if known else None
