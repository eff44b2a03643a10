"""Random numbers that depend on a key and a position alone.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011): a
counter-based generator, so that any element's number can be had without those before it, on any machine.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def key_of(*parts: object) -> tuple[int, int]:
    """Return the 64-bit key, as two 32-bit numbers, of a sequence of texts and numbers."""
    text = "\0".join(str(part) for part in parts).encode()
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def philox4x32(counters: npt.NDArray[np.uint64], key: tuple[int, int]) -> npt.NDArray[np.uint32]:
    """Encrypt counters.

    Args:
        counters: ``[n, 4]`` of 32-bit numbers.
        key: two 32-bit numbers.

    Returns:
        ``[n, 4]`` uint32: the four random words of each counter.
    """
    c0, c1, c2, c3 = (np.ascontiguousarray(counters[:, i], dtype=np.uint64) for i in range(4))
    k0, k1 = key
    for _ in range(ROUNDS):
        p0 = c0 * np.uint64(MULTIPLIERS[0])
        p1 = c2 * np.uint64(MULTIPLIERS[1])
        c0 = (p1 >> _HALF) ^ c1 ^ np.uint64(k0)
        c1 = p1 & _LOW
        c2 = (p0 >> _HALF) ^ c3 ^ np.uint64(k1)
        c3 = p0 & _LOW
        k0 = (k0 + WEYL[0]) & 0xFFFFFFFF
        k1 = (k1 + WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def uniform(key: tuple[int, int], start: int, stop: int) -> npt.NDArray[Any]:
    """Return uniform random numbers in [0, 1) for positions ``start`` to ``stop``: ``[n]`` float32.

    Position p takes word ``p % 4`` of counter ``p // 4``; its upper 24 bits become the number.
    """
    return (_words(key, start, stop) >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)


def normal(key: tuple[int, int], start: int, stop: int) -> npt.NDArray[Any]:
    """Return standard normal random numbers for positions ``start`` to ``stop``: ``[n]`` float64.

    Positions 2q and 2q + 1 share the words u and v of these positions (Box and Muller 1958): ``sqrt(-2 ln u)`` times
    the cosine and the sine of ``2 pi v``, with ``u = (word + 1) / 2^32`` above 0. None is beyond 6.7.
    """
    first, last = start // 2, -(-stop // 2)
    words = _words(key, 2 * first, 2 * last).astype(np.float64).reshape(-1, 2)
    radius = np.sqrt(-2.0 * np.log((words[:, 0] + 1.0) * 2.0**-32))
    angle = words[:, 1] * (2.0 * np.pi * 2.0**-32)
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return pairs.reshape(-1)[start - 2 * first : stop - 2 * first]


def _words(key: tuple[int, int], start: int, stop: int) -> npt.NDArray[np.uint32]:
    first, last = start // 4, -(-stop // 4)
    blocks = np.arange(first, last, dtype=np.uint64)
    counters = np.zeros((last - first, 4), np.uint64)
    counters[:, 0] = blocks & _LOW
    counters[:, 1] = blocks >> _HALF
    return philox4x32(counters, key).reshape(-1)[start - 4 * first : stop - 4 * first]
