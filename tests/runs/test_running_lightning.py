"""The callback in a real training by Lightning, and the checkpoints that it leaves."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import weightsmith as ws
from weightsmith.errors import CheckpointError

torch = pytest.importorskip("torch")
lightning = pytest.importorskip("lightning")
pytestmark = pytest.mark.filterwarnings("ignore")
EVERY = 5


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = torch.nn.Linear(6, 2)

    def training_step(self, batch: Any, index: int) -> Any:
        (inputs,) = batch
        return (self.model(inputs) - inputs[:, :2]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Snapshots(lightning.Callback):
    """Keeps what the average is to be of, by other means."""

    def __init__(self) -> None:
        self.found: list[np.ndarray[Any, Any]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        if trainer.global_step and trainer.global_step % EVERY == 0:
            self.found.append(module.model.weight.detach().double().numpy().copy())


def train(
    folder: Path, epochs: int, *callbacks: Any, resume: Path | None = None, accumulate: int = 1, broken: bool = False
) -> None:
    torch.manual_seed(1)
    inputs = torch.randn(80, 6)
    if broken:
        inputs[:] = float("inf")
    data = torch.utils.data.TensorDataset(inputs)
    saving = lightning.pytorch.callbacks.ModelCheckpoint(folder, every_n_train_steps=10, save_top_k=-1)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accumulate_grad_batches=accumulate,
        accelerator="cpu",
        callbacks=[*callbacks, saving],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(data, batch_size=8), ckpt_path=resume)


def test_a_training_keeps_its_average_and_goes_on_with_it(tmp_path):
    from weightsmith.callbacks import LightningRunningAverage

    def average(name: str) -> Any:
        return LightningRunningAverage(tmp_path / "state", every=EVERY, out=tmp_path / name)

    snapshots = Snapshots()
    train(tmp_path / "run", 2, average("first.safetensors"), snapshots)
    assert len(snapshots.found) == 4
    found = ws.open(tmp_path / "first.safetensors")
    assert set(found) == set(Module().state_dict())
    np.testing.assert_allclose(found["model.weight"].numpy(), np.mean(snapshots.found, axis=0), atol=1e-6)

    (newest,) = (tmp_path / "run").glob("*step=20.ckpt")
    train(tmp_path / "run", 3, average("second.safetensors"), snapshots, resume=newest)
    assert len(snapshots.found) == 6
    found = ws.open(tmp_path / "second.safetensors")
    np.testing.assert_allclose(found["model.weight"].numpy(), np.mean(snapshots.found, axis=0), atol=1e-6)


def test_its_checkpoints_are_a_run(tmp_path):
    snapshots = Snapshots()
    train(tmp_path, 2, snapshots)
    averaged = ws.average_run(tmp_path)
    # Of steps 10 and 20.
    np.testing.assert_allclose(averaged["model.weight"].numpy(), np.mean(snapshots.found[1::2], axis=0), atol=1e-6)


def test_batches_whose_gradients_are_only_accumulated_are_no_steps(tmp_path):
    from weightsmith.callbacks import LightningRunningAverage

    snapshots = Snapshots()
    average = LightningRunningAverage(tmp_path / "state", every=EVERY, out=tmp_path / "out.safetensors")
    train(tmp_path / "run", 2, average, snapshots, accumulate=2)
    # Ten steps; the batch after a step's shows the same weights once more.
    kept = [one for i, one in enumerate(snapshots.found) if not i or not np.array_equal(one, snapshots.found[i - 1])]
    assert len(kept) == 2
    found = ws.open(tmp_path / "out.safetensors")["model.weight"].numpy()
    np.testing.assert_allclose(found, np.mean(kept, axis=0), atol=1e-6)


def test_weights_that_are_not_finite_end_the_training_and_leave_no_thread(tmp_path):
    from weightsmith.callbacks import LightningRunningAverage

    average = LightningRunningAverage(tmp_path / "state", every=1)
    with pytest.raises(CheckpointError, match="NaN or infinite at step"):
        train(tmp_path / "run", 2, average, broken=True)
    assert not [one for one in threading.enumerate() if one.name.startswith("weightsmith-average")]
