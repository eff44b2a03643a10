"""What a tensor's module is, as far as names and shapes tell: it decides how PEFT lays an adapter of it out.

PEFT looks at the modules of a model that is loaded. Here there are only tensors, and a key that PEFT does not expect is
ignored without a word. So a tensor is taken for the weight of a linear layer, an embedding or a convolution only where
nothing speaks against it; every other one counts as none of these, and is kept whole.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from weightsmith import dtypes
from weightsmith.architecture.config import is_head
from weightsmith.checkpoint.tensor import Array, Tensor

Form = Literal["linear", "transposed", "embedding", "convolution"]

_EMBEDDING = re.compile(
    r"(wte|wpe|wtt|emb|embd|shared|(\w+_)?embeddings?|embed_(tokens|positions|in|tokens_per_layer|scale)|rel_embeddings"
    r"|(tokens|positions|position|token|tok|word)_embed(s|dings?)?|relative_attention_bias)"
)
# What speaks of embeddings and may be anything.
_PERHAPS = re.compile(r"emb", re.IGNORECASE)
# Linear layers whose names speak of embeddings.
_NO_EMBEDDING = re.compile(r"embed_out|\w*(proj\w*|project\w*|linear\w*|mapping\w*|dense|head|out|fc\d*)")
# Models whose layers are Conv1D of transformers: weights [in, out]. GPT-BigCode has the names, and linear layers.
_CONV1D_MODELS = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
_CONV1D = re.compile(r"(c_attn|c_proj|c_fc|q_attn)")


@dataclass(frozen=True)
class Module:
    """A module with a weight of which a low-rank adapter can be made.

    Attributes:
        name: its name.
        form: ``linear``, weight ``[out, in]``; ``transposed``, ``[in, out]``; ``embedding``, ``[rows, width]``, which
            is that of a layer from rows to width stored ``[in, out]``; ``convolution``, ``[out, in, …]``.
        shape: the weight's shape.
    """

    name: str
    form: Form
    shape: tuple[int, ...]

    @property
    def stored_transposed(self) -> bool:
        """Whether the weight is stored as ``[in, out]``."""
        return self.form in ("transposed", "embedding")

    @cached_property
    def sides(self) -> tuple[int, int]:
        """Rows and columns of the weight as the layer uses it: out, and in times the kernel."""
        rows = self.shape[0]
        columns = 1
        for length in self.shape[1:]:
            columns *= length
        return (columns, rows) if self.stored_transposed else (rows, columns)

    def oriented(self, flat: Array) -> Array:
        """Return all elements, as stored, as the matrix ``[out, in times kernel]``; a view."""
        rows, columns = self.sides
        return flat.reshape(columns, rows).T if self.stored_transposed else flat.reshape(rows, columns)


class Modules:
    """The modules of a model, by their tensors."""

    def __init__(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
        """Look at names and shapes.

        Args:
            tensors: the model's.
            config: its config.
        """
        self._tensors = tensors
        self._model_type = str(config.get("model_type"))

    @cached_property
    def paths(self) -> frozenset[str]:
        """All modules that hold tensors, themselves or in modules within."""
        found: set[str] = set()
        for name in self._tensors:
            words = name.split(".")
            found.update(".".join(words[:count]) for count in range(1, len(words)))
        return frozenset(found)

    @cached_property
    def _has_conv1d(self) -> bool:
        if self._model_type in _CONV1D_MODELS:
            return True
        return any(
            self._bias_length(name.removesuffix(".weight")) == tensor.shape[1] != tensor.shape[0]
            for name, tensor in self._tensors.items()
            if name.endswith(".weight") and len(tensor.shape) == 2 and _CONV1D.fullmatch(_last(name))
        )

    def find(self, name: str) -> Module | None:
        """Return the module that a tensor is the weight of, or None where it is none that is understood.

        Args:
            name: the tensor's name.
        """
        tensor = self._tensors[name]
        module, _, leaf = name.rpartition(".")
        if leaf != "weight" or not module or not dtypes.is_float(tensor.dtype) or not tensor.size:
            return None
        form = self._form(module, tensor.shape)
        return None if form is None else Module(module, form, tensor.shape)

    def _form(self, module: str, shape: tuple[int, ...]) -> Form | None:
        bias = self._bias_length(module)
        if len(shape) > 2:
            return "convolution" if self._is_convolution(module, shape, bias) else None
        if len(shape) != 2:
            return None
        last = _last(f"{module}.weight")
        if bias is None and not is_head(f"{module}.weight"):
            if _EMBEDDING.fullmatch(last):
                return "embedding"
            if _PERHAPS.search(last) and not _NO_EMBEDDING.fullmatch(last):
                return None
        if self._has_conv1d and _CONV1D.fullmatch(last) and bias in (None, shape[1]):
            return "transposed"
        return "linear" if bias in (None, shape[0]) else None

    def _is_convolution(self, module: str, shape: tuple[int, ...], bias: int | None) -> bool:
        if len(shape) > 5 or bias not in (None, shape[0]):
            # The bias of a transposed convolution has the length of the second axis.
            return False
        if len(shape) == 3 and "conv" not in _last(f"{module}.weight").lower():
            # Experts are stored so, too.
            return False
        # One channel in, many out: a convolution in groups, of which PEFT's form is another.
        return not (shape[1] == 1 and shape[0] > 1)

    def _bias_length(self, module: str) -> int | None:
        bias = self._tensors.get(f"{module}.bias")
        return bias.shape[0] if bias is not None and len(bias.shape) == 1 else None


def _last(name: str) -> str:
    """Return the last part of a tensor's module that is no number."""
    words = [word for word in name.split(".")[:-1] if not word.isdigit()]
    return words[-1] if words else ""
