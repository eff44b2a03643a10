"""One linear map from the donor's space to the model's, fitted to the rows of all anchors.

The baseline ``landmark_pca`` of mergekit-tokensurgeon: both spaces in their principal axes, and the rotation between
them that brings the anchors nearest to each other (orthogonal Procrustes: Schönemann, Psychometrika 1966). That tool
applies the rotation's transpose, which is the map back; here it is the one that minimises the distance.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from weightsmith.checkpoint.tensor import Array
from weightsmith.errors import MethodError
from weightsmith.transplantation.gaussian import mean_of, wide_tiles
from weightsmith.transplantation.rows import Rows


@dataclass(frozen=True)
class LandmarkMap:
    """``t -> (t - start) matrix + end``.

    Attributes:
        start: ``[d]`` float64: the mean of the anchors' rows in the donor.
        matrix: ``[d, d']`` float64.
        end: ``[d']`` float64: their mean in the model.
    """

    start: Array
    matrix: Array
    end: Array

    @classmethod
    def of(cls, donor: Rows, donor_numbers: Array, model: Rows, model_numbers: Array) -> LandmarkMap:
        """Fit the map.

        With the covariances' leading axes ``V_a [d, q]`` and ``V_b [d', q]``, q the lesser of d and d', and ``A V_a``,
        ``B V_b`` the centred rows in them: ``matrix = V_a U W^T V_b^T``, where ``U S W^T = (A V_a)^T (B V_b)``.

        Args:
            donor: the donor's rows, ``[V, d]``.
            donor_numbers: ``[S]``: the anchors' rows in it.
            model: the model's rows, ``[V', d']``.
            model_numbers: ``[S]``: the same anchors' rows in it.

        Raises:
            MethodError: if there are no anchors, or not as many here as there.
            CheckpointError: if a row holds what is not finite.
        """
        count = len(donor_numbers)
        if not count or count != len(model_numbers):
            raise MethodError(
                f"expected one row of the model for each of the donor's; found {len(model_numbers):,} for {count:,}"
            )
        start, end = mean_of(donor, donor_numbers), mean_of(model, model_numbers)
        here = np.zeros((donor.shape[1], donor.shape[1]))
        there = np.zeros((model.shape[1], model.shape[1]))
        across = np.zeros((donor.shape[1], model.shape[1]))
        for a, b in zip(wide_tiles(donor, donor_numbers), wide_tiles(model, model_numbers), strict=True):
            a -= start
            b -= end
            here += a.T @ a
            there += b.T @ b
            across += a.T @ b
        rank = min(donor.shape[1], model.shape[1])
        axes_here, axes_there = (np.linalg.eigh(squares)[1][:, -rank:] for squares in (here, there))
        left, _, right = np.linalg.svd(axes_here.T @ across @ axes_there)
        return cls(start, axes_here @ (left @ right) @ axes_there.T, end)

    def apply(self, rows: Array) -> Array:
        """Return rows of the donor in the model's space: ``[n, d']`` float64; each by itself.

        Args:
            rows: ``[n, d]``.
        """
        result = np.empty((len(rows), len(self.end)))
        for place, row in enumerate(rows):
            result[place] = (row - self.start) @ self.matrix + self.end
        return result
