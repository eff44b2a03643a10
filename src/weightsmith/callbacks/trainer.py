"""The callback for transformers' Trainer."""

from __future__ import annotations

import os
import tempfile
from typing import Any

from transformers import PreTrainedModel, TrainerCallback
from transformers.core_model_loading import revert_weight_conversion

from weightsmith.callbacks.averaging import AveragingWhileTraining
from weightsmith.callbacks.snapshots import unwrapped, weights_of
from weightsmith.checkpoint.checkpoint import Companions
from weightsmith.checkpoint.folder import read_companions


class RunningAverage(AveragingWhileTraining, TrainerCallback):  # type: ignore[misc]
    """Keeps a running average of a model's weights while transformers' Trainer trains it.

    ``Trainer(…, callbacks=[RunningAverage("run/average", every=50, start=1000, out="run/averaged")])``. ``out`` is a
    folder that ``from_pretrained`` loads, with config and tokenizer. Of a PEFT model the adapter is averaged,
    factor by factor. Several processes may train copies of one model (DDP), of which the first averages; weights that
    are shared out among them are refused. Parameters: :class:`weightsmith.callbacks.averaging.AveragingWhileTraining`.
    """

    _files: tempfile.TemporaryDirectory[str] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Begin, or go on where a training is resumed."""
        if state.is_world_process_zero:
            self.begin(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Take a snapshot, if one is due."""
        if state.is_world_process_zero:
            model = given["model"]
            self.after_step(state.global_step, lambda: _weights(model))
            if self.is_due(state.global_step):
                self._save(given)

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Write the state with the checkpoint, so that a training resumed from it finds both of one step."""
        if state.is_world_process_zero and self.saves_with_checkpoints:
            self._save(given)

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Write state and model."""
        if state.is_world_process_zero:
            try:
                self._save(given)
            finally:
                self.end()
                if self._files is not None:
                    self._files.cleanup()
                    self._files = None

    def _save(self, given: dict[str, Any]) -> None:
        self.save(lambda: self._companions(given))

    def _companions(self, given: dict[str, Any]) -> tuple[Companions, bool]:
        """Return config, tokenizer and all else that belongs beside the model, as the model writes them."""
        model = unwrapped(given["model"])
        adapter = _adapter(model)
        if self._files is None:
            self._files = tempfile.TemporaryDirectory(prefix="weightsmith-")
        folder = self._files.name
        if adapter is not None:
            model.peft_config[adapter].save_pretrained(folder)
        else:
            for part in ("config", "generation_config"):
                if hasattr(getattr(model, part, None), "save_pretrained"):
                    getattr(model, part).save_pretrained(folder)
        if given.get("processing_class") is not None:
            given["processing_class"].save_pretrained(folder)
        found = read_companions(folder, sorted(os.listdir(folder)), adapter=adapter is not None)
        config = dict(found.config)
        if isinstance(model, PreTrainedModel) and adapter is None:
            config["architectures"] = [type(model).__name__]
            config["dtype"] = self._dtype or str(model.dtype).removeprefix("torch.")
        return Companions(config, found.files), adapter is not None


def _adapter(model: Any) -> str | None:
    """Return the name of the adapter that a PEFT model trains; None if it is no PEFT model."""
    if not (hasattr(model, "peft_config") and hasattr(model, "active_adapter")):
        return None
    active = model.active_adapter
    return str(active() if callable(active) else active)


def _weights(model: Any) -> dict[str, Any]:
    """Return a model's weights under the names that it saves them by."""
    model = unwrapped(model)
    adapter = _adapter(model)
    if adapter is not None:
        from peft import get_peft_model_state_dict

        return dict(get_peft_model_state_dict(model, adapter_name=adapter))
    found = weights_of(model)
    # Experts that are fused in memory, say, are separate in files.
    return dict(revert_weight_conversion(model, found)) if isinstance(model, PreTrainedModel) else found
