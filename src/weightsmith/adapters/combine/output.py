"""Adapters that are computed as they are written, in folders as PEFT reads them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from weightsmith.checkpoint.checkpoint import Checkpoint, Companions, File
from weightsmith.checkpoint.companions import write_companions
from weightsmith.checkpoint.layout import ONE_FILE, Part
from weightsmith.checkpoint.tensor import Tensor
from weightsmith.engine.executor import Summary
from weightsmith.engine.plan import Plan
from weightsmith.plan.output import Output, check_folder

ADAPTER = "adapter_model"
CONFIG = "adapter_config.json"


class AdapterOutput(Output):
    """An adapter, or several, that can be saved as folders; see :class:`Output`."""

    def __init__(
        self,
        name: str,
        tensors: Mapping[str, Tensor],
        files: Mapping[str, str],
        *,
        inputs: Sequence[Checkpoint],
        beside: Mapping[str, File],
        config: Mapping[str, Any],
        warnings: Sequence[str] = (),
        parts: Sequence[Part] = (Part("", ADAPTER),),
    ) -> None:
        """Collect what is written.

        Args:
            name: how a person names it.
            tensors: its tensors by name.
            files: path -> text, of what is written beside them.
            inputs: the checkpoints that its tensors come from.
            beside: path -> file to copy: tokenizers and the like.
            config: its config, as later steps see it.
            warnings: what a person should know before saving it.
            parts: the folders that it is made of.
        """
        companions = Companions(config, beside)
        super().__init__(name, tensors, inputs=inputs, written={}, companions=companions, warnings=warnings)
        self.is_adapter = len(parts) == 1
        self._files = files
        self._parts = list(parts)

    def parts(self) -> list[Part]:
        """See :meth:`Output.parts`."""
        return self._parts

    def save(self, target: str | os.PathLike[str], **options: Any) -> Summary:
        """Compute the result and write it; see :meth:`Output.save`.

        Args:
            target: the folder to make.
            **options: those of :meth:`Output.save`, but for the shard size: PEFT reads one file.
        """
        check_folder(target, "an adapter is a folder, with its config beside the weights")
        return super().save(target, **{**options, "shard_size": ONE_FILE})

    def write_beside(self, folder: Path, plan: Plan) -> list[str]:
        """See :meth:`Output.write_beside`: configs, and what travels beside the first adapter."""
        for name, text in self._files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, "utf-8")
        return write_companions(folder, {}, self.companions.files)
