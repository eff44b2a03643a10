"""Kinds that train a few coefficients of a change's wavelet transform: WaveFT."""

from __future__ import annotations

import numpy as np

from weightsmith.adapters.change import Added
from weightsmith.adapters.forms import form
from weightsmith.adapters.kinds.sparse import Scattered
from weightsmith.adapters.layer import Layer
from weightsmith.adapters.registry import parameterization
from weightsmith.adapters.settings import Setting
from weightsmith.adapters.torch_random import MOST_SHUFFLED, shuffled
from weightsmith.adapters.wavelet_filters import FILTERS, bank
from weightsmith.checkpoint.tensor import Array


def _check(layer: Layer) -> None:
    count, size = layer.length("n"), layer.rows * layer.columns
    if count > size:
        raise layer.error(f"it holds {count} coefficients, and its weight has {size} elements")
    if not layer.flag("proportional_parameters") and count != layer.number("n_frequency"):
        raise layer.error(
            f"the adapter's config gives it {layer.number('n_frequency'):g} coefficients (n_frequency), and it has "
            f"{count}"
        )
    if size >= MOST_SHUFFLED:
        raise layer.error(
            f"its weight has {size:,} elements; which coefficients are meant is known below {MOST_SHUFFLED:,}"
        )


@parameterization(
    "WAVEFT",
    "WaveFT",
    forms=(form("out in", waveft_spectrum="n"),),
    settings=(
        Setting("n_frequency", "whole", 2592, "how many coefficients are trained", patterns="n_frequency_pattern"),
        Setting("proportional_parameters", "flag", False, "larger layers have more of them"),
        Setting("scaling", "number", 25.0, "the change is multiplied by it"),
        Setting("wavelet_family", "text", "db1", "the wavelet", choices=tuple(FILTERS)),
        Setting("use_idwt", "flag", True, "whether coefficients are of wavelets; of single entries otherwise"),
        Setting("random_loc_seed", "whole", 777, "the seed that decides which coefficients are trained"),
    ),
    check=_check,
    by_rows=True,
    source="Bilican et al., Exploring Sparsity for Parameter Efficient Fine Tuning Using Wavelets, 2025, "
    "arXiv:2505.12532",
)
def waveft(layer: Layer) -> Added:
    """WaveFT: ``W + s IDWT(C)``: C is zero but for n coefficients of one level of a two-dimensional wavelet transform.

    Their places are not saved: they are the first n of PyTorch's random permutation of ``[out, in]``, which the seed
    decides and which is drawn again here, exactly. C is padded on all sides by half of what the filters are longer
    than 2; its quarters are the approximation, and the details that PEFT calls horizontal (high-pass along rows' axis),
    vertical and diagonal. Of the families that PEFT 0.21 lists, its tables have db1 to db10, sym2 to sym10 and coif1 to
    coif4; with its coif5 it cannot compute. Without ``use_idwt`` C itself is added.
    """
    rows, columns = layer.rows, layer.columns
    values = layer.array("waveft_spectrum") * layer.number("scaling")
    places = shuffled(rows * columns, len(values), layer.whole("random_loc_seed"))
    if not layer.flag("use_idwt"):
        return Scattered(places, values, columns)
    return _Synthesis(np.stack(bank(str(layer.text("wavelet_family")))), places, values, (rows, columns))


class _Synthesis(Added):
    """The inverse of one level of a two-dimensional wavelet transform, of few coefficients."""

    def __init__(self, bank: Array, places: Array, values: Array, shape: tuple[int, int]) -> None:
        """Sort coefficients by the rows that they reach.

        Args:
            bank: the low-pass and the high-pass filter: float64 ``[2, taps]``.
            places: of the coefficients, flat in a matrix of this shape: int64 ``[n]``.
            values: the coefficients: float64 ``[n]``.
            shape: the weight's.
        """
        self._bank, self._columns = bank, shape[1]
        # What the filters reach beyond the weight, on each side.
        self._beyond = bank.shape[1] - 2
        (self._bottom, above, _), (self._right, self._across, self._width) = (
            self._split(at, length) for at, length in zip(divmod(places, shape[1]), shape, strict=True)
        )
        self._first = 2 * above - self._beyond
        order = np.argsort(self._first, kind="stable")
        self._values = values
        for name in ("_bottom", "_right", "_across", "_first", "_values"):
            setattr(self, name, getattr(self, name)[order])
        super().__init__(self._made, [self._bottom, self._right, self._across, self._first, self._values])

    def _split(self, at: Array, length: int) -> tuple[Array, Array, int]:
        """Return for places along an axis: the half that they are in, where there, and how long a half is."""
        half = (length + self._beyond + 1) // 2
        padded = at + (2 * half - length) // 2
        return padded // half, padded % half, half

    def _made(self, start: int, stop: int) -> Array:
        taps = self._bank.shape[1]
        begin, end = np.searchsorted(self._first, (start - taps + 1, stop))
        chosen = slice(begin, end)
        # PEFT's order of the details: the half along one axis decides the filter along the other.
        weights = self._values[chosen, None] * self._bank[self._right[chosen]]
        reached = self._first[chosen, None] + np.arange(taps)
        inside = (reached >= start) & (reached < stop)
        cells = (self._bottom[chosen, None] * (stop - start) + reached - start) * self._width + self._across[
            chosen, None
        ]
        size = 2 * (stop - start) * self._width
        halves = np.bincount(cells[inside], weights=weights[inside], minlength=size).reshape(2, -1, self._width)
        made = np.zeros((stop - start, 2 * self._width + self._beyond))
        for tap in range(taps):
            made[:, tap : tap + 2 * self._width : 2] += np.tensordot(self._bank[:, tap], halves, 1)
        return made[:, self._beyond : self._beyond + self._columns]
