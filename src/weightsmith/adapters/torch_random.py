"""Random numbers as PyTorch draws them on the CPU, for what adapters' files leave to be drawn again.

PyTorch's generator is the Mersenne Twister, seeded by the lower 32 bits of a seed, as NumPy's legacy generator is; both
are frozen, and so are the ways in which PyTorch 2 makes permutations and normal numbers of them.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from weightsmith.checkpoint.tensor import Array

# PyTorch shuffles this many elements and more with other numbers.
MOST_SHUFFLED = (2**32 - 1) // 20
# From so many numbers on, PyTorch makes normal numbers in chunks.
_CHUNK = 16


def _bits(seed: int, count: int) -> Array:
    """Return the first numbers of the generator: uint32 ``[count]``."""
    return np.random.RandomState(seed & 0xFFFFFFFF).randint(0, 1 << 32, size=count, dtype=np.uint32)


@lru_cache(maxsize=4)
def shuffled(size: int, count: int, seed: int) -> Array:
    """Return the first elements of ``torch.randperm(size)``, for a generator with this seed: int64 ``[count]``.

    Element i is exchanged with one at or after it, by the remainder of a 32-bit number. Only what was exchanged is
    kept, so that the rest of the permutation is never formed.

    Args:
        size: how many elements there are, less than ``MOST_SHUFFLED``.
        count: how many of them to return.
        seed: as ``torch.Generator.manual_seed`` takes it.
    """
    numbers = _bits(seed, min(count, size - 1))
    steps = numbers.astype(np.int64) % (size - np.arange(len(numbers)))
    moved: dict[int, int] = {}
    first = []
    for i, step in enumerate(steps.tolist()):
        first.append(moved.get(i + step, i + step))
        moved[i + step] = moved.get(i, i)
    if count == size:
        first.append(moved.get(size - 1, size - 1))
    places = np.array(first, np.int64)
    # The cache's own.
    places.setflags(write=False)
    return places


def normals(count: int, seed: int) -> Array:
    """Return ``torch.randn(count)`` in float32, for a generator with this seed, to its rounding: float64 ``[count]``.

    The last bits depend on the machine, in PyTorch too. Fewer than 16 numbers are made in pairs, of 53 bits each; more
    are made in chunks of 16, of 24 bits each, the last 16 anew where a chunk is not full.
    """
    if count < _CHUNK:
        pairs = _bits(seed, 4 * -(-count // 2)).astype(np.uint64).reshape(-1, 2, 2)
        uniform = ((pairs[..., 0] << np.uint64(32) | pairs[..., 1]) & np.uint64((1 << 53) - 1)) * 2.0**-53
        return _polar(-np.log1p(-uniform[:, 1]), uniform[:, 0]).T.reshape(-1)[:count]
    odd = count % _CHUNK
    uniform = (_bits(seed, count + (_CHUNK if odd else 0)) & np.uint32((1 << 24) - 1)) * 2.0**-24
    drawn = np.empty(count)
    drawn[: count - odd] = _chunks(uniform[: count - odd])
    if odd:
        # The chunk that overlaps the one before it.
        drawn[-_CHUNK:] = _chunks(uniform[-_CHUNK:])
    return drawn


def _chunks(uniform: Array) -> Array:
    halves = uniform.reshape(-1, 2, _CHUNK // 2)
    return _polar(-np.log(1 - halves[:, 0]), halves[:, 1]).transpose(1, 0, 2).reshape(-1)


def _polar(depth: Array, turn: Array) -> Array:
    """Return pairs of normal numbers, one axis more in front: Box and Muller's transform."""
    radius, angle = np.sqrt(2 * depth), 2 * math.pi * turn
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)])
