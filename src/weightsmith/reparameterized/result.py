"""A model in another form, which is saved with the model's own files beside it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from weightsmith import dtypes
from weightsmith.checkpoint.checkpoint import Checkpoint
from weightsmith.checkpoint.companions import write_companions
from weightsmith.checkpoint.layout import Part
from weightsmith.checkpoint.safetensors import natural_order
from weightsmith.checkpoint.source import Source, as_checkpoint
from weightsmith.checkpoint.tensor import Tensor
from weightsmith.engine.plan import Plan
from weightsmith.errors import PlanError
from weightsmith.plan.output import Output, parts_of

# The key of the recipe in a manifest.
RECIPE_KEY = "reparameterized"


class Restructured(Output):
    """A model in another form.

    Attributes:
        model: the model as it is.
        dtype: the dtype in which floats are written, or None for their own.
    """

    def __init__(
        self,
        model: Checkpoint,
        name: str,
        tensors: Mapping[str, Tensor],
        warnings: Sequence[str] = (),
        dtype: str | None = None,
    ) -> None:
        """Collect what it is made of.

        Args:
            model: the model.
            name: how a person names the result.
            tensors: the result's tensors by name.
            warnings: what a person should know before saving it.
            dtype: the dtype in which floats are written; None for their own.
        """
        self.model = model
        self.dtype = dtype
        written = None if dtype is None else dtypes.float_from_name(dtype)
        super().__init__(
            name,
            {name: tensors[name] for name in sorted(tensors, key=natural_order)},
            inputs=[model],
            written={}
            if written is None
            else {name: written for name, tensor in tensors.items() if dtypes.is_float(tensor.dtype)},
            companions=model.companions,
            warnings=warnings,
            components=model.components,
        )

    @abstractmethod
    def how(self) -> dict[str, Any]:
        """Return what a recipe says beside the model: enough to make it again."""

    def to_yaml(self) -> str:
        """See :meth:`Output.to_yaml`."""
        content = {"model": self.model.name, "dtype": self.dtype, **self.how()}
        return yaml.safe_dump({RECIPE_KEY: content}, sort_keys=False, allow_unicode=True)

    def parts(self) -> list[Part]:
        """See :meth:`Output.parts`."""
        return parts_of(self)

    def write_beside(self, folder: Path, plan: Plan) -> list[str]:
        """See :meth:`Output.write_beside`."""
        return write_companions(folder, self.config, self.companions.files)


def opened(model: Source) -> Checkpoint:
    """Open a model whose tensors are weights.

    Raises:
        PlanError: if it is an adapter, or quantised.
        CheckpointError: if it cannot be read.
    """
    found = as_checkpoint(model)
    if found.is_adapter:
        raise PlanError(f"{found.name} is an adapter, which is folded into its base: name the base as well")
    if found.config.get("quantization_config"):
        raise PlanError(f"{found.name} is quantised: its tensors are codes, not weights; take what it was made from")
    return found
