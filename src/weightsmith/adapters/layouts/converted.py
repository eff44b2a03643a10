"""An adapter in another layout, before it is written."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from weightsmith import dtypes
from weightsmith.adapters.layouts.places import recognize
from weightsmith.adapters.layouts.read import read
from weightsmith.adapters.layouts.towers import towers_of
from weightsmith.adapters.layouts.write import WRITERS, Written
from weightsmith.checkpoint.checkpoint import Checkpoint
from weightsmith.checkpoint.layout import ONE_FILE, Part
from weightsmith.checkpoint.source import Source, as_checkpoint
from weightsmith.engine.executor import Summary
from weightsmith.engine.plan import Plan
from weightsmith.errors import CheckpointError, RecipeError, did_you_mean
from weightsmith.plan.output import Output, check_folder
from weightsmith.plan.remake import understood

LAYOUTS = tuple(WRITERS)


def convert(adapter: Source, to: str, *, base: Source | None = None, dtype: str | None = None) -> ConvertedAdapter:
    """Bring an adapter into a layout, lazily.

    Args:
        adapter: a reference, or an opened adapter, in any layout.
        to: ``peft``, ``kohya``, ``diffusers`` or ``mlx``.
        base: the model that it is for, where names alone do not tell enough.
        dtype: ``float32``, ``float16`` or ``bfloat16`` (``fp32``, ``fp16``, ``bf16``); by default that of its tensors.

    Returns:
        The adapter in that layout; ``.save(path)`` writes it.

    Raises:
        RecipeError: if there is no such layout or dtype.
        CheckpointError: if it is no adapter, cannot be understood, or the layout cannot say what it does.
        PlanError: if it does not fit the base.
    """
    if to not in WRITERS:
        raise RecipeError(f"there is no layout {to!r}{did_you_mean(to, WRITERS)}; there are {', '.join(WRITERS)}")
    short = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
    opened, model = as_checkpoint(adapter), None if base is None else as_checkpoint(base)
    return ConvertedAdapter(opened, to, model, None if dtype is None else short.get(dtype, dtype))


class ConvertedAdapter(Output):
    """An adapter in another layout, before it is written.

    Attributes:
        layout: the layout.
        base: the model that it is for, if one was named.
    """

    def __init__(self, adapter: Checkpoint, layout: str, base: Checkpoint | None, dtype: str | None) -> None:
        """Bring an adapter into a layout; see :func:`convert`."""
        self.layout = layout
        self.base = base
        self._adapter = adapter
        self._dtype = dtype
        wanted = None if dtype is None else dtypes.float_from_name(dtype)
        if wanted is not None and wanted.itemsize < 2:
            raise RecipeError(f"the factors of an adapter cannot be kept as {dtype}; use float32, bfloat16 or float16")
        self._written_as = _write(adapter, layout, base)
        tensors = self._written_as.tensors
        # An alpha is a number: rounding it would change the scale of all that stands beside it.
        kept = {name for name in tensors if name.endswith(".alpha")}
        change = (
            {} if wanted is None else {n: wanted for n, t in tensors.items() if n not in kept and t.dtype != wanted}
        )
        inputs = [adapter] if base is None else [adapter, base]
        super().__init__(
            f"{adapter.name} as {layout}", tensors, inputs=inputs, written=change, warnings=self._written_as.notes
        )
        self.is_adapter = True

    def to_yaml(self) -> str:
        """See :meth:`Output.to_yaml`."""
        base = None if self.base is None else self.base.name
        content = {"adapter": self._adapter.name, "to": self.layout, "base": base, "dtype": self._dtype}
        return yaml.safe_dump({"convert": content}, sort_keys=False, allow_unicode=True)

    def parts(self) -> list[Part]:
        """See :meth:`Output.parts`."""
        return list(self._written_as.parts)

    def metadata(self) -> Mapping[str, str]:
        """See :meth:`Output.metadata`."""
        return self._written_as.metadata

    def plan(self, *, shard_size: int = ONE_FILE, **options: Any) -> Plan:
        """See :meth:`Output.plan`; an adapter is never divided into shards."""
        return super().plan(shard_size=ONE_FILE, **options)

    def save(self, target: str | os.PathLike[str], **options: Any) -> Summary:
        """See :meth:`Output.save`.

        Raises:
            OutputError: also if the layout is a folder, and the target one file.
        """
        if not self._written_as.one_file:
            check_folder(target, f"the {self.layout} layout is a folder with a config")
        return super().save(target, **{**options, "shard_size": ONE_FILE})

    def write_beside(self, folder: Path, plan: Plan) -> list[str]:
        """See :meth:`Output.write_beside`: the configs."""
        for path, content in self._written_as.files.items():
            (folder / path).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
        return []


def _write(adapter: Checkpoint, layout: str, base: Checkpoint | None) -> Written:
    config = adapter.config
    if layout == "peft" and base is None and config.get("peft_type") is not None and not adapter.components:
        # Nothing is said otherwise, so any kind will do.
        files: dict[str, Mapping[str, Any]] = {"adapter_config.json": config}
        return Written(dict(adapter), [Part("", "adapter_model")], files=files, one_file=False)
    if not adapter.is_adapter and recognize(adapter) is None:
        raise CheckpointError(
            f"{adapter.name} is no adapter, but a model: 'weightsmith extract' makes one of a fine-tune"
        )
    towers = () if base is None else towers_of(base)
    return WRITERS[layout](read(adapter, towers), towers)


def remake(key: str, content: Mapping[str, Any], *, threads: int | None = None) -> ConvertedAdapter:
    """Return the adapter that a manifest describes; see :func:`weightsmith.plan.remake.remake`."""
    with understood():
        adapter, to, base, dtype = (content[name] for name in ("adapter", "to", "base", "dtype"))
    return convert(adapter, to, base=base, dtype=dtype)
