"""Kinds that train a few entries of a change's spectrum: FourierFT."""

from __future__ import annotations

import numpy as np

from weightsmith.adapters.change import Added, Change, LowRank
from weightsmith.adapters.forms import form
from weightsmith.adapters.layer import Layer
from weightsmith.adapters.registry import parameterization
from weightsmith.adapters.settings import Setting
from weightsmith.adapters.torch_random import MOST_SHUFFLED, shuffled


def _check(layer: Layer) -> None:
    count, size = layer.length("n"), layer.rows * layer.columns
    if count > size:
        raise layer.error(f"it holds {count} entries of a spectrum, and its weight has {size}")
    if size >= MOST_SHUFFLED:
        raise layer.error(
            f"its weight has {size:,} elements; which of its frequencies are meant is known below {MOST_SHUFFLED:,}"
        )
    layer.whole("random_loc_seed")


@parameterization(
    "FOURIERFT",
    "FourierFT",
    forms=(form("out in", fourierft_spectrum="n"),),
    settings=(
        Setting("scaling", "number", 150.0, "the change is multiplied by it"),
        Setting("random_loc_seed", "whole", 777, "the seed that decides which frequencies are trained"),
    ),
    check=_check,
    elements=lambda layer: 3 * layer.rows * layer.columns,
    source="Gao et al., FourierFT, ICML 2024, arXiv:2405.03003",
)
def fourierft(layer: Layer) -> Change:
    """FourierFT: ``W + s Re(ifft2(F))``: F ``[out, in]`` is zero but for n entries, at random places.

    The places are not saved. They are the first n of PyTorch's random permutation of all places, which its seed
    decides: a shuffle by numbers of the Mersenne Twister, repeated here bit for bit (as PyTorch 2 has it on the CPU,
    where PEFT always draws them). The cosines of the frequencies are two low-rank factors, with two columns for each
    row of F in which there are entries; where those are many, the change is formed whole. No shape tells whether a
    square layer is stored transposed: the config does, for all layers at once.
    """
    entries = layer.array("fourierft_spectrum")
    rows, columns = layer.rows, layer.columns
    places = shuffled(rows * columns, len(entries), layer.whole("random_loc_seed"))
    vertical, which = np.unique(places // columns, return_inverse=True)
    if 2 * len(vertical) > min(rows, columns):
        full = np.zeros((rows, columns))
        full.reshape(-1)[places] = entries
        formed = np.fft.ifft2(full).real * layer.number("scaling")
        return Added(lambda start, stop: formed[start:stop], [formed])
    spectrum = np.zeros((len(vertical), columns))
    spectrum[which, places % columns] = entries
    across = np.fft.ifft(spectrum, axis=1) * (layer.number("scaling") / rows)
    # Whole turns are taken off while the angles are integers.
    angles = np.outer(np.arange(rows), vertical) % rows * (2 * np.pi / rows)
    return LowRank(
        np.concatenate([np.cos(angles), -np.sin(angles)], axis=1), np.concatenate([across.real, across.imag])
    )
