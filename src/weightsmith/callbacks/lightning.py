"""The callback for Lightning."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from weightsmith.callbacks.averaging import AveragingWhileTraining
from weightsmith.callbacks.snapshots import weights_of
from weightsmith.checkpoint.checkpoint import Companions

if TYPE_CHECKING or find_spec("lightning") is not None:
    from lightning.pytorch.callbacks import Callback
else:
    from pytorch_lightning.callbacks import Callback


class LightningRunningAverage(AveragingWhileTraining, Callback):  # type: ignore[misc]
    """Keeps a running average of a LightningModule's weights while Lightning trains it.

    ``Trainer(callbacks=[LightningRunningAverage("run/average", every=50, out="run/averaged.safetensors")])``. Tensors
    have the names of the module's ``state_dict``. A step is a step of ``trainer.global_step``: with several optimisers
    each of them counts. Where several processes train copies of one model, the first averages; weights that are shared
    out among them are refused. Parameters: :class:`weightsmith.callbacks.averaging.AveragingWhileTraining`.
    """

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin, or go on where a training is resumed."""
        if trainer.is_global_zero:
            self.begin(trainer.global_step)
            self._last = trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Take a snapshot, if one is due; batches whose gradients are only accumulated are no steps."""
        if trainer.is_global_zero and trainer.global_step != self._last:
            self._last = trainer.global_step
            self.after_step(trainer.global_step, lambda: weights_of(pl_module))
            if self.is_due(trainer.global_step):
                self.save(_companions)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Write the state with the checkpoint, so that a training resumed from it finds both of one step."""
        if trainer.is_global_zero and self.saves_with_checkpoints:
            self.save(_companions)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Write state and model."""
        if trainer.is_global_zero:
            try:
                self.save(_companions)
            finally:
                self.end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """End the thread; the state on disk stays the one that was written last."""
        if trainer.is_global_zero:
            self.end()


def _companions() -> tuple[Companions, bool]:
    return Companions(), False
