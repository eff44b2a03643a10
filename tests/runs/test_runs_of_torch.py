"""Runs that training programs really write: transformers' Trainer, Lightning's format, torch.distributed.checkpoint."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import weightsmith as ws
from weightsmith.runs import choose, find_run

torch = pytest.importorskip("torch")


def means(states: list[dict[str, Any]]) -> dict[str, Any]:
    """Average whole tensors in float64; integers are the last's."""
    return {
        name: torch.stack([state[name].double() for state in states]).mean(0) if tensor.is_floating_point() else tensor
        for name, tensor in states[-1].items()
    }


def assert_is(found: ws.Checkpoint, expected: dict[str, Any]) -> None:
    """Compare names and numbers."""
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        np.testing.assert_allclose(found[name].numpy(), tensor.numpy(), rtol=0, atol=1e-6, err_msg=name)


def small_model(seed: int) -> Any:
    """Return a network with a batch norm, moved a little by training."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
    model(torch.randn(8, 4))
    return model


def lightning_file(path: Path, model: Any, epoch: int, step: int) -> dict[str, Any]:
    """Write what Lightning's Trainer.save_checkpoint writes of a LightningModule that holds a model."""
    state = {f"model.{name}": tensor.clone() for name, tensor in model.state_dict().items()}
    optimiser = torch.optim.AdamW(model.parameters())
    model(torch.randn(8, 4)).sum().backward()
    optimiser.step()
    torch.save(
        {
            "epoch": epoch,
            "global_step": step,
            "pytorch-lightning_version": "2.5.0",
            "state_dict": state,
            "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": epoch}}}},
            "callbacks": {"ModelCheckpoint{'monitor': 'val_loss'}": {"best_model_score": torch.tensor(0.5)}},
            "optimizer_states": [optimiser.state_dict()],
            "lr_schedulers": [{"last_epoch": epoch, "_last_lr": [0.1]}],
            "hparams_name": "kwargs",
            "hyper_parameters": {"lr": 0.1},
        },
        path,
    )
    return state


def test_lightning_files_with_their_metrics(tmp_path):
    folder = tmp_path / "version_0/checkpoints"
    folder.mkdir(parents=True)
    states = []
    for epoch, step in [(0, 90), (1, 180), (9, 900), (10, 1000)]:
        states.append(lightning_file(folder / f"epoch={epoch}-step={step}.ckpt", small_model(step), epoch, step))
    lightning_file(folder / "last.ckpt", small_model(1000), 10, 1000)
    rows = ["epoch,step,train_loss,val_loss"]
    rows += [f"{s // 90},{s},{1 / s}," for s in range(50, 1001, 50)] + ["0,89,,4.0", "9,899,,3.0", "10,999,,2.0"]
    (tmp_path / "version_0/metrics.csv").write_text("\n".join(rows))

    chosen = choose(tmp_path / "version_0", weights="by-metric:val_loss:1")
    assert [one.saved.step for one in chosen.checkpoints] == [90, 180, 900, 1000]
    assert chosen.run.left_out == ("last.ckpt",)
    assert [one.saved.metrics["val_loss"] for one in chosen.checkpoints] == [4, 4, 3, 2]
    assert chosen.checkpoints[1].saved.metrics["train_loss"] == 1 / 150

    averaged = ws.average_run(folder)
    # The prefix of the LightningModule is kept as it is.
    assert_is(averaged, means(states))
    assert averaged["model.1.num_batches_tracked"].numpy() == 1
    assert any("2 tensors of batch-norm" in warning for warning in averaged.warnings)
    averaged.save(tmp_path / "out")
    assert ws.reproduce(tmp_path / "out").ok


def test_metrics_in_the_names_of_lightning_files(tmp_path):
    for epoch in (1, 2):
        lightning_file(tmp_path / f"epoch={epoch}-val_loss=0.{epoch}5.ckpt", small_model(epoch), epoch, epoch * 10)
    run = find_run(str(tmp_path))
    assert [(one.step, one.metrics) for one in run.checkpoints] == [(1, {"val_loss": 0.15}), (2, {"val_loss": 0.25})]


def test_folders_of_torch_distributed_checkpoint(tmp_path):
    import torch.distributed.checkpoint as dcp

    states = []
    for step in (8, 16, 120):
        model = small_model(step)
        optimiser = torch.optim.AdamW(model.parameters())
        model(torch.randn(8, 4)).sum().backward()
        optimiser.step()
        states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = {"model": model.state_dict(), "optimizer": optimiser.state_dict(), "step": step}
            dcp.save(state, checkpoint_id=str(tmp_path / f"run/step-{step}"), no_dist=True)
    run = find_run(str(tmp_path / "run"))
    assert run.kind == "torch.distributed.checkpoint folders"
    assert [one.step for one in run.checkpoints] == [8, 16, 120]
    assert_is(ws.average_run(tmp_path / "run"), means(states))
    summary = ws.average_run(tmp_path / "run", last=2).save(tmp_path / "out")
    assert_is(ws.open(tmp_path / "out"), means(states[1:]))
    assert summary.tensors == 9
    assert ws.verify(tmp_path / "out").ok


def test_a_real_run_of_transformers_trainer(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    data = [{"input_ids": row, "labels": row} for row in torch.randint(0, 32, (24, 6))]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=12,
        per_device_train_batch_size=2,
        save_steps=4,
        logging_steps=1,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    states = []

    class Keep(transformers.TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})

    transformers.Trainer(model=model, args=arguments, train_dataset=data, callbacks=[Keep()]).train()

    run = find_run(str(tmp_path / "run"))
    assert run.kind == "checkpoint-N folders of transformers' Trainer"
    assert [one.step for one in run.checkpoints] == [4, 8, 12]
    history = json.loads((tmp_path / "run/checkpoint-12/trainer_state.json").read_text())["log_history"]
    logged = {entry["step"]: entry["loss"] for entry in history if "loss" in entry}
    assert [one.metrics["loss"] for one in run.checkpoints] == [logged[4], logged[8], logged[12]]

    chosen = choose(tmp_path / "run", weights="by-metric:loss:2")
    expected = np.array([logged[4], logged[8], logged[12]]) ** -2.0
    np.testing.assert_allclose([one.weight for one in chosen.checkpoints], expected / expected.sum())
    assert math.isclose(sum(one.weight for one in chosen.checkpoints), 1)

    ws.average_run(tmp_path / "run").save(tmp_path / "out")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, tensor in means(states).items():
        torch.testing.assert_close(loaded.state_dict()[name].double(), tensor, rtol=0, atol=1e-6)
