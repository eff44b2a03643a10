"""Kinds that put something else in the place of a part of the base, which is found from the base itself."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from weightsmith.adapters.change import LowRank, Rows, Whole
from weightsmith.adapters.forms import Form, form
from weightsmith.adapters.kinds.low_rank import check_rank
from weightsmith.adapters.layer import Layer
from weightsmith.adapters.registry import parameterization
from weightsmith.adapters.settings import Setting
from weightsmith.checkpoint.rows import FLOAT64
from weightsmith.checkpoint.tensor import Array
from weightsmith.kernels.convert import narrow, widen


def _left_product(layer: Layer, left: Array) -> Array:
    """Return ``left @ W`` for a matrix of few rows ``[r, out]``: ``[r, columns]``, in tiles of W."""
    total = np.zeros((len(left), layer.columns))
    for start, rows in layer.weight.tiles():
        total += left[:, start : start + len(rows)] @ rows
    return total


def _check_deft(layer: Layer) -> None:
    # PEFT's rank is at most the number of outputs.
    rank, stated = layer.length("r"), layer.number("r")
    if rank != min(stated, layer.rows):
        raise layer.error(f"the adapter's config gives it rank {stated:g}, and its factors have {rank}")
    if layer.flag("para") == ("deft_R" in layer):
        has, says = ("a", "none") if "deft_R" in layer else ("no", "one")
        raise layer.error(f"it has {has} deft_R, and the adapter's config says that there is {says} (para)")


@parameterization(
    "DEFT",
    "DEFT",
    forms=(form("out in", deft_P="out r", optional={"deft_R": "r in"}),),
    settings=(
        Setting("r", "whole", 8, "the rank, or the number of outputs where that is less"),
        Setting("decomposition_method", "text", "relu", "how the projection is made from P", choices=("relu", "qr")),
        Setting("alpha", "number", None, "what is put in is scaled by alpha / r; not at all without alpha"),
        Setting("para", "flag", False, "a subspace is removed, and nothing put in its place (PaRa)"),
    ),
    check=_check_deft,
    source="DEFT: Decompositional Efficient Fine-Tuning for Text-to-Image Models, 2025; PaRa: Personalizing "
    "Text-to-Image Diffusion via Parameter Rank Reduction, ICLR 2025",
)
def deft(layer: Layer) -> LowRank:
    """DEFT: ``W + Q (s R - K' W)``: a part of the base, seen through K, gives way to R; with ``para`` to nothing.

    With ``decomposition_method`` ``qr``, Q and K are the orthonormal factor of P by Householder reflections, as LAPACK
    makes it; with ``relu``, Q is P and K is ``max(P, 0)``. The scale is ``alpha / r``, or 1 without alpha. What is
    added has rank r, and the base decides it: ``K' W`` is read off the base first.
    """
    factor = layer.array("deft_P")
    if layer.text("decomposition_method") == "qr":
        left = seen = np.linalg.qr(factor)[0]
    else:
        left, seen = factor, np.maximum(factor, 0)
    right = -_left_product(layer, np.ascontiguousarray(seen.T))
    if "deft_R" in layer:
        # PEFT takes an alpha of 0 for none.
        alpha = layer.number("alpha") if layer.given("alpha") else 0.0
        right += layer.array("deft_R") * (alpha / factor.shape[1] if alpha else 1.0)
    return LowRank(left, right)


def _check_osf(layer: Layer) -> None:
    if layer.length("r") > min(layer.shape):
        raise layer.error(f"it replaces {layer.length('r')} singular directions of a weight {list(layer.shape)}")


@parameterization(
    "OSF",
    "OSF",
    forms=(
        Form("out in", {"osf_svd_params.U_low": "out r", "osf_svd_params.S_low": "r", "osf_svd_params.V_low": "r in"}),
    ),
    may_be_empty=True,
    whole=True,
    check=_check_osf,
    source="Nayak et al., Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual Learning, 2025, "
    "arXiv:2504.07097",
)
def osf(layer: Layer) -> Whole:
    """OSF: the base's r smallest singular directions give way to trained ones: ``W - U_l S_l V_l + U S V``.

    The file holds the trained directions alone; the base's own are found by its singular value decomposition, rounded
    to the base's dtype as PEFT rounds them. Their signs do not matter, as whole products are exchanged. They are not
    determined if the last singular value that stays equals the first that goes.
    """
    left, values, right = (layer.array(f"osf_svd_params.{part}_low") for part in "USV")
    kept = min(layer.shape) - len(values)
    dtype = layer.weight.tensor.dtype

    def whole(base: Array) -> Array:
        if not np.isfinite(base).all():
            raise layer.error("the base's weight has infinite numbers or NaN, and so no singular directions")
        own = np.linalg.svd(base, full_matrices=False)
        rows, spectrum, columns = (widen(narrow(part, dtype), FLOAT64) for part in own)
        changed: Array = base - (rows[:, kept:] * spectrum[kept:]) @ columns[kept:] + (left * values) @ right
        return changed

    return Whole(whole, [left, values, right])


# The singular values below this part of the largest that an inverse leaves out.
_CUT = 1e-6
# Columns of the base in V's terms that are shorter than this count as zeros.
_SHORT = 1e-12


def _category(module: str) -> str:
    """Return which of the shared matrices a module uses: by the last words of its name."""
    words = module.split(".")
    if len(words) == 1 or words[-2].isdigit():
        return words[-1]
    if words[-3:] == ["attention", "output", "dense"]:
        return "attention_output"
    return f"{words[-2]}_{words[-1]}"


def _check_frod(layer: Layer) -> None:
    category, inputs = _category(layer.name), layer.length("in")
    for part, shape in (("frod_V", (inputs, inputs)), ("frod_s_indices", (2, layer.length("k")))):
        name = f"{part}.{category}"
        if name not in layer.shared:
            raise layer.error(f"{name} is not in the adapter's file; {_SAVED}")
        if layer.shared[name].shape != shape:
            raise layer.error(f"{name} is {list(layer.shared[name].shape)}, and needed is {list(shape)}")


_SAVED = "save it with save_projection=True in PEFT's FrodConfig"


@parameterization(
    "FROD",
    "FRoD",
    forms=(form("out in", frod_lambda_l="in", frod_lambda_s_values="k"),),
    shared=("frod_V", "frod_s_indices", "frod_s_size"),
    places=("frod_s_indices", "frod_s_size"),
    may_be_empty=True,
    lacking=_SAVED,
    check=_check_frod,
    by_rows=True,
    elements=lambda layer: 2 * layer.columns**2,
    source="FRoD, as PEFT 0.21 has it",
)
def frod(layer: Layer) -> Rows:
    """FRoD: ``U (diag(l) + S) V'``, where ``W = U diag(l_0) V'`` is how the base looks in a basis V that layers share.

    The columns of U have norm 1, and are found from the base and V; l and the numbers of the sparse S are trained. All
    modules of the same role (the last two words of their names) share one V ``[in, in]`` and the places of S, which
    the file holds. Where V cannot be inverted, its pseudo-inverse takes its place. Of roles with fewer outputs than
    inputs, the columns of U that the base does not reach are its rounding errors, brought to norm 1, as in PEFT.
    """
    category = _category(layer.name)
    basis = layer.array(f"frod_V.{category}")
    if not np.isfinite(basis).all():
        raise layer.error(f"frod_V.{category} has infinite numbers or NaN")
    try:
        inverse = np.linalg.inv(basis)
    except np.linalg.LinAlgError:
        inverse = np.linalg.pinv(basis, rcond=_CUT)
    squares = np.zeros(len(basis))
    for _, rows in layer.weight.tiles():
        squares += np.square(rows @ inverse.T).sum(axis=0)
    norms = np.sqrt(squares)
    middle = np.zeros(basis.shape)
    places = layer.integers(f"frod_s_indices.{category}", len(basis))
    np.add.at(middle, (places[0], places[1]), layer.array("frod_lambda_s_values"))
    middle[np.diag_indices_from(middle)] += layer.array("frod_lambda_l")
    units = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > _SHORT)
    right = middle @ basis.T
    # In this order: V may be nearly singular, and its inverse times V's own columns would lose digits.
    return Rows(lambda base, _: np.asarray((base @ inverse.T * units) @ right), [inverse, right])


def _sigmoid(x: Array) -> Array:
    return np.asarray(0.5 * (1 + np.tanh(0.5 * x)))


def _tanh_gelu(x: Array) -> Array:
    return np.asarray(0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))


def _erf(x: Array) -> Array:
    return np.asarray(np.vectorize(math.erf, otypes=[np.float64])(x))


def _gelu(x: Array) -> Array:
    return np.asarray(0.5 * x * (1 + _erf(x / math.sqrt(2))))


def _softplus(x: Array) -> Array:
    return np.asarray(np.logaddexp(0, x))


def _silu(x: Array) -> Array:
    return np.asarray(x * _sigmoid(x))


# The activations of transformers by their names there, but for those with numbers of their own to train.
_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": _gelu,
    "gelu_10": lambda x: np.clip(_gelu(x), -10, 10),
    "gelu_accurate": _tanh_gelu,
    "gelu_fast": _tanh_gelu,
    "gelu_new": _tanh_gelu,
    "gelu_python": _gelu,
    "gelu_python_tanh": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "hardswish": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    "laplace": lambda x: 0.5 * (1 + _erf((x - 0.707107) / (0.282095 * math.sqrt(2)))),
    "leaky_relu": lambda x: np.where(x > 0, x, 0.01 * x),
    "linear": lambda x: x,
    "mish": lambda x: x * np.tanh(_softplus(x)),
    "quick_gelu": lambda x: x * _sigmoid(1.702 * x),
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.square(np.maximum(x, 0)),
    "relu6": lambda x: np.clip(x, 0, 6),
    "sigmoid": _sigmoid,
    "silu": _silu,
    "sqrtsoftplus": lambda x: np.sqrt(_softplus(x)),
    "swish": _silu,
    "tanh": np.tanh,
}


def _check_peanut(layer: Layer) -> None:
    check_rank(layer, layer.length("r"))
    for part in ("peanut_encoders", "peanut_decoders"):
        held = sum(name.startswith(f"{part}.") for name in layer.parts)
        if held != layer.whole("depth"):
            raise layer.error(
                f"the adapter's config gives it depth {layer.number('depth'):g}, and it has {held} {part}"
            )


@parameterization(
    "PEANUT",
    "PEANuT",
    forms=(
        form(
            "out in",
            peanut_A="r out",
            peanut_B="out r",
            optional={"peanut_encoders.*": "r r", "peanut_decoders.*": "r r"},
        ),
    ),
    settings=(
        Setting("r", "whole", 32, "the rank"),
        Setting("depth", "whole", 0, "pairs of encoders and decoders"),
        Setting("act_fn", "text", "relu", "the activation after each matrix but the last", choices=tuple(_ACTIVATIONS)),
        Setting("scaling", "number", 1.0, "what the change is multiplied by"),
    ),
    check=_check_peanut,
    source="Zhong et al., PEANuT: Parameter-Efficient Adaptation with Weight-aware Neural Tweakers, 2024, "
    "arXiv:2410.01870",
)
def peanut(layer: Layer) -> LowRank:
    """PEANuT: ``W + s B h(A W)``, where a small network h looks at each column of the base, not at the input.

    ``h_0 = a(A W)``; encoders give ``h_i = a(E_i h_{i-1})``; decoders give ``a(D_i h)`` plus what went into the
    encoder across from it. The activation a is one that transformers names.
    """
    activation = _ACTIVATIONS[str(layer.text("act_fn"))]
    hidden = activation(_left_product(layer, layer.array("peanut_A")))
    skipped = []
    for encoder in layer.numbered("peanut_encoders"):
        skipped.append(hidden)
        hidden = activation(encoder @ hidden)
    for decoder in layer.numbered("peanut_decoders"):
        hidden = activation(decoder @ hidden) + skipped.pop()
    return LowRank(layer.array("peanut_B") * layer.number("scaling"), hidden)
