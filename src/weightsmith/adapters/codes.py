"""How changes are laid out that are no products of factors: single entries, signs, and a few bits for every entry.

The layouts are ours, where PEFT has none, and described in docs/guide/extract.md:

- ``WEIGHTSMITH_SPARSE``: ``M.weightsmith_places`` int32 or int64 ``[n]``, flat positions in the weight, rising; and
  ``M.weightsmith_values`` ``[n]``.
- ``WEIGHTSMITH_SIGNS``: ``M.weightsmith_signs`` uint8, a bit per entry, set for plus: entry i is bit ``i % 8`` of byte
  ``i // 8``; and ``M.weightsmith_scale`` float32 ``[1]``.
- ``WEIGHTSMITH_QUANTIZED``: ``M.weightsmith_codes`` uint8, ``bits`` bits per entry, the lowest first, one entry behind
  the other; and ``M.weightsmith_range`` float64 ``[2]``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from weightsmith.bundle.tiles import TILE, tile_starts
from weightsmith.checkpoint.tensor import Array

Quantizer = Literal["linear", "log2", "tanh"]
QUANTIZERS: tuple[Quantizer, ...] = ("linear", "log2", "tanh")
PLACES, VALUES = "weightsmith_places", "weightsmith_values"
SIGNS, SCALE = "weightsmith_signs", "weightsmith_scale"
CODES, RANGE = "weightsmith_codes", "weightsmith_range"
_UINT8 = np.dtype(np.uint8)
_INT64 = np.dtype(np.int64)
_FLOAT64 = np.dtype(np.float64)


@dataclass(frozen=True)
class Quantization:
    """How entries become codes: levels that lie evenly between the least and the greatest, of the entries or of what a
    function makes of them.

    - ``linear``: the entries themselves, ``2^bits`` levels between their minimum and maximum.
    - ``tanh``: their hyperbolic tangents, ``2^bits`` levels between the largest magnitude and its negative.
    - ``log2``: the sign in the highest bit, and for the magnitude's logarithm ``2^(bits-1) - 1`` levels; the code 0
      stands for entries of a magnitude up to 10^-11, which become zero.

    As in the code of Robust Weight Signatures (Saha et al.), which computes with the numbers that such levels stand
    for, where these are their codes; it leaves those of ``tanh`` as tangents, and we take them back (inferred).

    Attributes:
        name: which of the three.
        bits: of a code, from 1 to 8; for ``log2`` from 3.
    """

    name: Quantizer
    bits: int
    _EPSILON: ClassVar[float] = 1e-11

    @property
    def levels(self) -> int:
        """How many levels there are."""
        return (1 << (self.bits - 1)) - 1 if self.name == "log2" else 1 << self.bits

    def range(self, change: Array) -> Array:
        """Return the lowest and the highest level: float64 ``[2]``."""
        if self.name == "log2":
            least, most = math.inf, 0.0
            for start in tile_starts(len(change)):
                magnitude = np.abs(change[start : start + TILE].astype(_FLOAT64))
                counted = magnitude[magnitude > self._EPSILON]
                if counted.size:
                    least, most = min(least, float(counted.min())), max(most, float(counted.max()))
            return np.array([math.log2(least), math.log2(most)]) if most else np.zeros(2)
        if self.name == "tanh":
            most = math.tanh(float(np.abs(change).max()))
            return np.array([-most, most])
        return np.array([change.min(), change.max()], _FLOAT64)

    def encode(self, values: Array, limits: Array) -> Array:
        """Return the codes of entries: uint8 ``[n]``.

        Args:
            values: ``[n]``.
            limits: what :meth:`range` gave.
        """
        wide = values.astype(_FLOAT64)
        if self.name == "log2":
            counted = np.abs(wide) > self._EPSILON
            logarithms = np.log2(np.abs(wide), out=np.full(len(wide), limits[0]), where=counted)
            magnitude = np.where(counted, 1 + self._nearest(logarithms, limits), 0)
            with_sign: Array = (magnitude + ((wide < 0) << (self.bits - 1))).astype(_UINT8)
            return with_sign
        codes: Array = self._nearest(np.tanh(wide) if self.name == "tanh" else wide, limits).astype(_UINT8)
        return codes

    def decode(self, codes: Array, limits: Array) -> Array:
        """Return the entries that codes stand for: float64 ``[n]``; see :meth:`encode`."""
        if self.name == "log2":
            magnitude = codes & ((1 << (self.bits - 1)) - 1)
            found = np.where(magnitude > 0, np.exp2(self._level(magnitude.astype(_FLOAT64) - 1, limits)), 0.0)
            signed: Array = np.where(codes >> (self.bits - 1), -found, found)
            return signed
        level = self._level(codes.astype(_FLOAT64), limits)
        if self.name != "tanh":
            return level
        # The tangent of what is beyond 18 is 1 in float64, of which there is no way back.
        edge = np.nextafter(1.0, 0.0)
        inverse: Array = np.arctanh(np.clip(level, -edge, edge))
        return inverse

    def _nearest(self, values: Array, limits: Array) -> Array:
        low, high = limits
        share = (values - low) / (high - low) if high > low else np.zeros(len(values))
        nearest: Array = np.clip(np.rint(share * (self.levels - 1)), 0, self.levels - 1).astype(_INT64)
        return nearest

    def _level(self, place: Array, limits: Array) -> Array:
        low, high = limits
        level: Array = low + place / max(self.levels - 1, 1) * (high - low)
        return level


def pack_codes(codes: Array, bits: int) -> Array:
    """Return codes as a row of bits, the lowest of each first: uint8; eight codes fill ``bits`` bytes."""
    spread = np.unpackbits(codes[:, None], axis=1, bitorder="little")[:, :bits]
    return np.packbits(spread.reshape(-1), bitorder="little")


def unpack_codes(packed: Array, bits: int, count: int) -> Array:
    """Return the codes of a row of bits: uint8 ``[count]``."""
    spread = np.unpackbits(packed, count=count * bits, bitorder="little").reshape(count, bits)
    return np.packbits(spread, axis=1, bitorder="little").reshape(-1)
