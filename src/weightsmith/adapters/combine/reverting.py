"""An adapter that is restored from a basis and its coefficients."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from weightsmith import dtypes
from weightsmith.adapters.combine import layout
from weightsmith.adapters.combine.bases import COEFFICIENTS, DESCRIPTION_FILE, FORMAT, SIDES, Description, folder_name
from weightsmith.adapters.combine.inputs import Inputs
from weightsmith.adapters.combine.output import CONFIG, AdapterOutput
from weightsmith.adapters.combine.recipe import dtype_of
from weightsmith.adapters.combine.tensors import weighted
from weightsmith.adapters.kinds.low_rank import scale
from weightsmith.adapters.peft_config import config_text
from weightsmith.checkpoint import open_checkpoint
from weightsmith.checkpoint.checkpoint import Checkpoint
from weightsmith.checkpoint.folder import open_weights
from weightsmith.checkpoint.json_text import parse_object
from weightsmith.checkpoint.storage import read_whole
from weightsmith.checkpoint.tensor import Tensor
from weightsmith.errors import CheckpointError, did_you_mean, shown

_LARGEST = 64_000_000
# Adapters, and basis adapters, that are believed to be in one folder.
_MOST = 10_000


class Reverted(AdapterOutput):
    """One of the adapters that a basis was made of, not written yet.

    Attributes:
        task: its name.
    """

    def __init__(self, basis: Path, adapter: str | int, dtype: str | None = None) -> None:
        """Read what the basis says of itself.

        Args:
            basis: the folder.
            adapter: the adapter's name, or its number from 1.
            dtype: the dtype of the result; by default that of the basis.

        Raises:
            CheckpointError: if it is no basis, or not whole, or has no such adapter.
        """
        description = read_description(basis)
        self._basis, self._asked, self._dtype = basis, adapter, dtype
        number = _number_of(basis, description, adapter)
        self.task = list(description.tasks)[number]
        opened = [open_checkpoint(basis / folder_name(place)) for place in range(description.count)]
        coefficients = open_weights(str(basis / COEFFICIENTS), str(basis / COEFFICIENTS))
        inputs = Inputs(opened, [1.0] * len(opened))
        chosen = dtype_of(dtype, inputs.dtype)
        _check_scales(inputs)
        tensors: dict[str, Tensor] = {}
        ranks = {}
        for module, site in inputs.sites.items():
            for side, key in zip(SIDES, layout.keys(site), strict=True):
                rows = [_held(one, key) for one in opened]
                weights = _coefficients(coefficients, f"{module}.{side}", number, description, len(rows))
                tensors[key] = weighted(key, rows, weights, chosen)
            ranks[module] = site.ranks[0] or 1
        config = _config_of(description.tasks[self.task], layout.lora_config(inputs, ranks))
        super().__init__(
            f"{basis}:{self.task}",
            tensors,
            {CONFIG: config_text(config)},
            inputs=[*opened, coefficients],
            beside=opened[0].companions.files,
            config=config,
        )

    def to_yaml(self) -> str:
        """See :meth:`Output.to_yaml`."""
        content = {"basis": str(self._basis), "adapter": self._asked, "dtype": self._dtype}
        return yaml.safe_dump({"adapter_revert": content}, sort_keys=False, allow_unicode=True)


def read_description(basis: Path) -> Description:
    """Read what a basis says of itself.

    Raises:
        CheckpointError: if it is none.
    """
    path = basis / DESCRIPTION_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{basis} has no {DESCRIPTION_FILE}: it is no basis of adapters; 'weightsmith adapter merge --method "
            "rmm' makes one"
        )
    content = parse_object(read_whole(str(path), _LARGEST), str(path))
    count, centre, tasks = content.get("basis"), content.get("centre"), content.get("tasks")
    if content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is of format {shown(content.get('format'))}; this version reads {FORMAT}")
    if (
        isinstance(count, int)
        and isinstance(centre, bool)
        and centre < count <= _MOST
        and isinstance(tasks, dict)
        and 0 < len(tasks) <= _MOST
        and all(isinstance(config, dict) for config in tasks.values())
    ):
        return Description(int(count), centre, tasks)
    raise CheckpointError(f"{path} does not say how many basis adapters there are, and of which adapters")


def _number_of(basis: Path, description: Description, adapter: str | int) -> int:
    names = list(description.tasks)
    if isinstance(adapter, str) and adapter in names:
        return names.index(adapter)
    if (isinstance(adapter, int) or re.fullmatch(r"\d{1,6}", adapter)) and 1 <= int(adapter) <= len(names):
        return int(adapter) - 1
    raise CheckpointError(
        f"{basis} holds no adapter {adapter!r}{did_you_mean(str(adapter), names)}; it holds {', '.join(names)}, or "
        f"give a number from 1 to {len(names)}"
    )


def _held(basis: Checkpoint, key: str) -> Tensor:
    if key not in basis:
        raise CheckpointError(f"{basis.name} lacks {key}: the basis is not whole")
    return basis[key]


def _coefficients(stored: Checkpoint, key: str, number: int, description: Description, count: int) -> list[float]:
    """Return what each basis tensor is multiplied with: 1 the mean, if there is one."""
    tensor = stored.get(key)
    wanted = (len(description.tasks), count - description.centre)
    if tensor is None or tensor.shape != wanted or tensor.dtype != np.dtype(np.float64):
        found = "missing" if tensor is None else f"{dtypes.name_of(tensor.dtype)} {list(tensor.shape)}"
        raise CheckpointError(f"{stored.name}: {shown(key)} is {found}; float64 {list(wanted)} is needed")
    row = tensor.numpy()[number]
    if not np.isfinite(row).all():
        raise CheckpointError(f"{stored.name}: {shown(key)}: a coefficient is NaN or infinite")
    return [1.0] * description.centre + [float(value) for value in row]


def _check_scales(inputs: Inputs) -> None:
    """Check that basis adapters are as they are written: of one rank, with a scale of 1."""
    for adapter in inputs.adapters:
        if adapter.kind.peft_type != "LORA":
            raise CheckpointError(f"{adapter.name} is no LoRA: the basis is not as it was written")
    for module, site in inputs.sites.items():
        scales = {
            scale(adapter.layer(module), rank or 1) for adapter, rank in zip(inputs.adapters, site.ranks, strict=True)
        }
        if len(set(site.ranks)) > 1 or scales != {1.0}:
            raise CheckpointError(
                f"{module} has not one rank and a scale of 1 in all basis adapters: the basis is not as it was written"
            )


def _config_of(own: Mapping[str, Any], made: Mapping[str, Any]) -> dict[str, Any]:
    """Return the restored adapter's config: that of its scale and ranks, and otherwise the adapter's own."""
    return {**made, **{key: own[key] for key in layout.KEPT if key in own}}
