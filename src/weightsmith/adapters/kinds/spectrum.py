"""Kinds that train a few entries of a change's spectrum: FourierFT."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from weightsmith.adapters.change import Added, Change, LowRank
from weightsmith.adapters.forms import form
from weightsmith.adapters.layer import Layer
from weightsmith.adapters.registry import parameterization
from weightsmith.adapters.settings import Setting
from weightsmith.checkpoint.tensor import Array

# PyTorch shuffles more elements than this with other numbers.
_MOST_SHUFFLED = (2**32 - 1) // 20


def _check(layer: Layer) -> None:
    count, size = layer.length("n"), layer.rows * layer.columns
    if count > size:
        raise layer.error(f"it holds {count} entries of a spectrum, and its weight has {size}")
    if size >= _MOST_SHUFFLED:
        raise layer.error(
            f"its weight has {size:,} elements; which of its frequencies are meant is known below {_MOST_SHUFFLED:,}"
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
    places = np.asarray(shuffled(rows * columns, len(entries), layer.whole("random_loc_seed")))
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


@lru_cache(maxsize=4)
def shuffled(size: int, count: int, seed: int) -> tuple[int, ...]:
    """Return the first elements of ``torch.randperm(size)`` on the CPU, for a generator with this seed.

    Element i is exchanged with one at or after it, by the remainder of a 32-bit number of the Mersenne Twister. What
    was exchanged is kept alone, so that the rest of the permutation is never formed.

    Args:
        size: how many elements there are, less than 2^32 / 20.
        count: how many of them to return.
        seed: as ``torch.Generator.manual_seed`` takes it.
    """
    # PyTorch seeds the generator with the seed's lower half, as NumPy's legacy generator does; both are frozen.
    numbers = np.random.RandomState(seed & 0xFFFFFFFF).randint(0, 1 << 32, size=min(count, size - 1), dtype=np.uint32)
    steps: Array = numbers.astype(np.int64) % (size - np.arange(len(numbers)))
    moved: dict[int, int] = {}
    first = []
    for i, step in enumerate(steps.tolist()):
        first.append(moved.get(i + step, i + step))
        moved[i + step] = moved.get(i, i)
    if count == size:
        first.append(moved.get(size - 1, size - 1))
    return tuple(first)
