"""Changes that ``weightsmith extract`` keeps in little room: their largest entries, their signs, or a few bits each."""

from __future__ import annotations

import numpy as np

from weightsmith.adapters.change import Added, Change
from weightsmith.adapters.codes import (
    CODES,
    PLACES,
    QUANTIZERS,
    RANGE,
    SCALE,
    SIGNS,
    VALUES,
    Quantization,
    unpack_codes,
)
from weightsmith.adapters.forms import Form
from weightsmith.adapters.kinds.sparse import Scattered
from weightsmith.adapters.layer import Layer
from weightsmith.adapters.registry import parameterization
from weightsmith.adapters.settings import Setting
from weightsmith.bundle.tiles import bytes_of_bits
from weightsmith.checkpoint.tensor import Array


@parameterization(
    "WEIGHTSMITH_SPARSE",
    "sparse change",
    forms=(Form("...", {PLACES: "n", VALUES: "n"}),),
    places=(PLACES,),
    source="the entries of largest magnitude, as TIES and BitDelta's comparisons keep them; the layout is ours",
)
def sparse(layer: Layer) -> Change:
    """Sparse: single entries are added to.

    ``weightsmith_places`` holds their flat positions in the weight, rising; ``weightsmith_values`` what is added.
    """
    places, values = layer.integers(PLACES, layer.rows * layer.columns), layer.array(VALUES)
    if (np.diff(places) <= 0).any():
        raise layer.error(f"{PLACES} must rise, so that no entry is there twice")
    return Scattered(places, values, layer.columns)


def _check_signs(layer: Layer) -> None:
    _check_bytes(layer, SIGNS, 1)


@parameterization(
    "WEIGHTSMITH_SIGNS",
    "signs and a scale",
    forms=(Form("...", {SIGNS: "n", SCALE: "1"}),),
    places=(SIGNS,),
    check=_check_signs,
    source="Liu et al., BitDelta, NeurIPS 2024, arXiv:2402.10193; the layout is ours",
)
def signs(layer: Layer) -> Change:
    """Signs: ``W + a sign(D)``: a bit for every entry, set for plus, and one scale.

    Entry i of ``weightsmith_signs`` is bit ``i % 8`` of byte ``i // 8``; ``weightsmith_scale`` is a.
    """
    bits, scale = layer.integers(SIGNS, 256).astype(np.uint8), float(layer.array(SCALE)[0])
    columns = layer.columns

    def delta(start: int, stop: int) -> Array:
        found = _of_bits(bits, start * columns, stop * columns, 1)
        return np.where(found > 0, scale, -scale).reshape(stop - start, columns)

    return Added(delta, [bits])


_BITS = Setting("bits", "whole", None, "bits of an entry, from 1 to 8")
_QUANTIZER = Setting("quantizer", "text", None, "how levels lie", choices=QUANTIZERS)


def _quantization(layer: Layer) -> Quantization:
    bits, name = layer.whole("bits"), layer.text("quantizer")
    found = next((one for one in QUANTIZERS if one == name), None)
    if found is None:
        raise layer.error(f"adapter_config.json must give quantizer: {', '.join(QUANTIZERS)}")
    least = 3 if found == "log2" else 1
    if not least <= bits <= 8:
        raise layer.error(f"bits is {bits} in adapter_config.json; {found} has {least} to 8")
    return Quantization(found, bits)


def _check_codes(layer: Layer) -> None:
    _check_bytes(layer, CODES, _quantization(layer).bits)


@parameterization(
    "WEIGHTSMITH_QUANTIZED",
    "quantised change",
    forms=(Form("...", {CODES: "n", RANGE: "2"}),),
    settings=(_BITS, _QUANTIZER),
    places=(CODES,),
    check=_check_codes,
    source="Saha et al., Robust Weight Signatures, arXiv:2302.12480; the layout is ours",
)
def quantized(layer: Layer) -> Change:
    """Quantised: every entry of the change is one of a few levels.

    ``weightsmith_codes`` holds ``bits`` bits of every entry, the lowest first, one entry behind the other;
    ``weightsmith_range`` the lowest and the highest level: of the entries (``linear``), of their hyperbolic tangents
    (``tanh``), or of the binary logarithms of their magnitudes (``log2``), where the highest bit is the sign and the
    code 0 stands for zero.
    """
    how, limits = _quantization(layer), layer.array(RANGE)
    packed = layer.integers(CODES, 256).astype(np.uint8)
    columns = layer.columns

    def delta(start: int, stop: int) -> Array:
        codes = _of_bits(packed, start * columns, stop * columns, how.bits)
        return how.decode(codes, limits).reshape(stop - start, columns)

    return Added(delta, [packed])


def _check_bytes(layer: Layer, part: str, bits: int) -> None:
    """Check that a row of bits is as long as the weight needs."""
    needed = bytes_of_bits(layer.rows * layer.columns * bits)
    if layer.length("n") != needed:
        raise layer.error(
            f"{part} is [{layer.length('n')}], and {bits} bit{'s' if bits > 1 else ''} for each entry of a weight "
            f"{list(layer.shape)} take {needed} bytes"
        )


def _of_bits(packed: Array, start: int, stop: int, bits: int) -> Array:
    """Return the codes of entries ``start`` to ``stop``: uint8 ``[stop - start]``."""
    # Eight codes fill whole bytes.
    first = start // 8 * 8
    held = packed[first * bits // 8 : bytes_of_bits(stop * bits)]
    return unpack_codes(held, bits, stop - first)[start - first :]
