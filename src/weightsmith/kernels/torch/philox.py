"""The twin of :mod:`weightsmith.kernels.philox`: the same random bits, made on the device.

PyTorch has no unsigned 64-bit arithmetic to speak of. The product of two 32-bit numbers wraps around in int64 without
losing a bit, so masks after each shift give what unsigned numbers would.
"""

from __future__ import annotations

from typing import Any

import torch

from weightsmith.kernels.philox import MULTIPLIERS, ROUNDS, WEYL

_LOW = 0xFFFFFFFF


def uniform(key: tuple[int, int], start: int, stop: int, device: Any) -> Any:
    """Return the numbers of :func:`weightsmith.kernels.philox.uniform`: ``[n]`` float32 on a device, bit for bit."""
    first, last = start // 4, -(-stop // 4)
    counters = torch.arange(first, last, dtype=torch.int64, device=device)
    c0, c1 = counters & _LOW, counters >> 32
    c2, c3 = torch.zeros_like(counters), torch.zeros_like(counters)
    k0, k1 = key
    for _ in range(ROUNDS):
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1 = ((p1 >> 32) & _LOW) ^ c1 ^ k0, p1 & _LOW
        c2, c3 = ((p0 >> 32) & _LOW) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + WEYL[0]) & _LOW, (k1 + WEYL[1]) & _LOW
    words = torch.stack([c0, c1, c2, c3], dim=1).reshape(-1)[start - 4 * first : stop - 4 * first]
    return (words >> 8).to(torch.float32) * 2.0**-24
