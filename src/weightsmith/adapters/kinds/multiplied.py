"""Kinds that multiply a base's entries by what the adapter says."""

from __future__ import annotations

from itertools import product

import numpy as np

from weightsmith.adapters.change import Rows
from weightsmith.adapters.forms import Form, form
from weightsmith.adapters.kinds.low_rank import check_rank
from weightsmith.adapters.layer import Layer
from weightsmith.adapters.registry import parameterization
from weightsmith.adapters.settings import Setting
from weightsmith.checkpoint.tensor import Array


@parameterization(
    "HIRA",
    "HiRA",
    forms=(
        form("out in", hira_A="r in", hira_B="out r"),
        form("out in k", hira_A="r in k", hira_B="out r 1"),
        form("out in h w", hira_A="r in h w", hira_B="out r 1 1"),
        form("out in d h w", hira_A="r in d h w", hira_B="out r 1 1 1"),
        form("v d", hira_embedding_A="r v", hira_embedding_B="d r"),
    ),
    by_rows=True,
    source="Huang et al., HiRA: Parameter-Efficient Hadamard High-Rank Adaptation, ICLR 2025",
)
def hira(layer: Layer) -> Rows:
    """HiRA: ``W * (1 + B A)``, entry by entry.

    Of convolutions A is a kernel and B a pointwise one; of embeddings the factors are stored transposed, as LoRA's are.
    There is no scale, and the factors alone tell the rank: PEFT 0.21 reads a ``rank_pattern``, and does not heed it.
    """
    if "hira_embedding_A" in layer:
        left = np.ascontiguousarray(layer.array("hira_embedding_A").T)
        right = np.ascontiguousarray(layer.array("hira_embedding_B").T)
    else:
        down, up = layer.array("hira_A"), layer.array("hira_B")
        left, right = up.reshape(len(up), -1), down.reshape(len(down), -1)

    def rows(base: Array, start: int) -> Array:
        changed: Array = base + base * (left[start : start + len(base)] @ right)
        return changed

    return Rows(rows, [left, right])


# The ways in which one path of GLoRA may be held; the last is a path that is switched off, as zeros or not at all.
_OFF: dict[str, str] = {}
_MATRIX = ({"Xd": "out r", "Xu": "r in"}, {"X": "out 1"}, {"X": "1"}, _OFF)
_COLUMN = {"Xd": "in r", "Xu": "r 1", "X": "in 1", "zeros": "in 1"}


def _glora_forms() -> tuple[Form, ...]:
    """Return one form for every pair of ways in which A and B may be held."""
    forms = []
    for ways in product(_MATRIX, _MATRIX):
        paths = list(zip("AB", ways, strict=True))
        parts = {
            f"glora_{path}.{part}": text.replace("r", f"r{path}") for path, way in paths for part, text in way.items()
        }
        optional = {f"glora_{path}.zeros": "out in" for path, way in paths if way is _OFF}
        optional |= {f"glora_C.{part}": text.replace("r", "rC") for part, text in _COLUMN.items()}
        optional |= {f"glora_{path}.X": f"n{path}" for path in "DE"}
        optional |= {f"glora_{path}.zeros": "out" for path in "DE"}
        forms.append(Form("out in", parts, optional))
    return tuple(forms)


def _check_glora(layer: Layer) -> None:
    for path in "AB":
        if f"glora_{path}.Xd" in layer:
            check_rank(layer, layer.length(f"r{path}"))
    column = {part for part in layer.parts if part.startswith("glora_C.")}
    if column not in (set(), {"glora_C.Xd", "glora_C.Xu"}, {"glora_C.X"}, {"glora_C.zeros"}):
        raise layer.error(f"it has {' and '.join(sorted(column))}, which are no way to hold one path")
    for path in "DE":
        if f"glora_{path}.X" in layer and layer.length(f"n{path}") not in (1, layer.rows):
            raise layer.error(
                f"glora_{path}.X has {layer.length(f'n{path}')} numbers; needed is 1, or one for each of "
                f"{layer.rows} outputs"
            )


class _Path:
    """One path: a matrix that is a product, is broadcast from less, or is zero."""

    def __init__(self, layer: Layer, path: str) -> None:
        name = f"glora_{path}"
        self.factors = [layer.array(f"{name}.X{side}") for side in "du"] if f"{name}.Xd" in layer else []
        self.held = layer.array(f"{name}.X") if f"{name}.X" in layer else None

    @property
    def arrays(self) -> list[Array]:
        return self.factors if self.held is None else [self.held]

    def rows(self, start: int = 0, stop: int | None = None) -> Array | float:
        """Return some rows, as what they are broadcast from."""
        if self.factors:
            left, right = self.factors
            return np.asarray(left[start:stop] @ right)
        if self.held is None:
            return 0.0
        return self.held if len(self.held) == 1 else self.held[start:stop]


def _glora_bias(layer: Layer, bias: Array) -> Array:
    scale, shift, column = (_Path(layer, path).rows() for path in "DEC")
    changed: Array = bias + bias * scale + shift
    if isinstance(column, np.ndarray):
        for start, rows in layer.weight.tiles():
            changed[start : start + len(rows)] += (rows @ column)[:, 0]
    return changed


_GLORA_NAMES = {f"{path}{short}": f"glora_{path}.X{short}" for path in "ABC" for short in "du"}


@parameterization(
    "GLORA",
    "GLoRA",
    forms=_glora_forms(),
    settings=(Setting("r", "whole", 8, "the rank of paths that are products"),),
    refuses={"prompt": "it adds virtual tokens to the input of layers, which are no weights"},
    aliases={**_GLORA_NAMES, "D": "glora_D.X", "E": "glora_E.X"},
    check=_check_glora,
    changes_bias=lambda layer: any(f"glora_{path}.{part}" in layer for path in "CDE" for part in ("X", "Xd")),
    bias=_glora_bias,
    by_rows=True,
    source="Chavan et al., One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning, 2023, arXiv:2306.07967",
)
def glora(layer: Layer) -> Rows:
    """GLoRA without prompts: ``W + W * A + B``, and a bias ``b + b * D + E + W C``; ``*`` is entry by entry.

    Each path is held as a product (``Xd Xu``), a vector (``X``, a number for every output; of C, for every input), a
    constant (``X`` of one number), or switched off (``zeros``, or not at all). PEFT has one setting for A and B and one
    for D and E; the authors' search picks every path by itself, and so may a file. Their names for the parts (``Ad``,
    ``Au``, ``Bd``, ``Bu``, ``Cd``, ``Cu``, ``D``, ``E``) are read too: keep of each what the path that was picked uses,
    the first r columns and rows of a product, for their super-network holds all of them at once. What the paper calls
    a prompt is ``W C`` there, a change of the bias; virtual tokens do not fold.
    """
    scale, shift = _Path(layer, "A"), _Path(layer, "B")

    def rows(base: Array, start: int) -> Array:
        stop = start + len(base)
        changed: Array = base + base * scale.rows(start, stop) + shift.rows(start, stop)
        return changed

    return Rows(rows, [*scale.arrays, *shift.arrays])
