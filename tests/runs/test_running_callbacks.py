"""Averages beside a training: a tiny model is really trained."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import threading
import time
import types

import ml_dtypes
import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)
from transformers.modeling_outputs import SequenceClassifierOutput

import weightsmith as ws
from tests.conftest import read_safetensors
from weightsmith.callbacks import RunningAverage
from weightsmith.callbacks.accumulators import Accumulators
from weightsmith.callbacks.snapshots import Snapshots, weights_of
from weightsmith.errors import CheckpointError, MethodError, OutputError, PlanError
from weightsmith.runs.accumulation import Averaging
from weightsmith.runs.record import read_record
from weightsmith.runs.running import running_average, update_average

INPUTS, CLASSES = 12, 4


class TinyConfig(PretrainedConfig):
    model_type = "weightsmith_tiny"


class Tiny(PreTrainedModel):
    """Two layers, with a batch norm between for buffers of both kinds."""

    config_class = TinyConfig

    def __init__(self, config):
        super().__init__(config)
        self.first = torch.nn.Linear(INPUTS, 24)
        self.norm = torch.nn.BatchNorm1d(24)
        self.last = torch.nn.Linear(24, CLASSES)
        self.post_init()

    def forward(self, inputs, labels=None):
        logits = self.last(torch.tanh(self.norm(self.first(inputs))))
        loss = None if labels is None else torch.nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def data(count, seed):
    """Labels by a fixed plane each, of which a third is wrong: gradients stay noisy."""
    drawn = torch.Generator().manual_seed(seed)
    planes = torch.randn(CLASSES, INPUTS, generator=torch.Generator().manual_seed(99))
    inputs = torch.randn(count, INPUTS, generator=drawn)
    labels = (inputs @ planes.T).argmax(1)
    wrong = torch.rand(count, generator=drawn) < 0.33
    labels[wrong] = torch.randint(0, CLASSES, (int(wrong.sum()),), generator=drawn)
    return [{"inputs": one, "labels": label} for one, label in zip(inputs, labels, strict=True)]


def trainer(folder, callback, *, steps=400, model=None, rate=0.05, save=None, seed=0, **options):
    torch.manual_seed(seed)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=rate,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0,
        save_strategy="no" if save is None else "steps",
        save_steps=save or 500,
        logging_strategy="no",
        disable_tqdm=True,
        report_to=[],
        use_cpu=True,
        seed=seed,
        **options,
    )
    model = Tiny(TinyConfig()) if model is None else model
    return Trainer(model, arguments, train_dataset=data(4000, 1), callbacks=[callback])


def held_out_loss(model):
    rows = data(4000, 2)
    inputs, labels = (torch.stack([row[key] for row in rows]) for key in ("inputs", "labels"))
    with torch.no_grad():
        return float(model.eval()(inputs, labels=labels).loss)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_average_of_a_constant_rate_run_is_better_than_its_last_checkpoint(tmp_path, seed):
    callback = RunningAverage(tmp_path / "state", every=5, start=300, out=tmp_path / "averaged")
    trained = trainer(tmp_path / "run", callback, steps=900, rate=2.0, seed=seed)
    trained.train()
    trained.save_model(str(tmp_path / "last"))
    last = held_out_loss(Tiny.from_pretrained(tmp_path / "last"))
    averaged = held_out_loss(Tiny.from_pretrained(tmp_path / "averaged"))
    assert averaged < last - 0.05
    assert read_record(tmp_path / "state").count == 121
    assert ws.verify(tmp_path / "averaged").ok


@pytest.mark.parametrize("weights", ["uniform", "ema:0.9", "swag"])
def test_the_callback_does_what_updates_with_the_checkpoints_do(tmp_path, weights):
    callback = RunningAverage(tmp_path / "state", every=10, weights=weights)
    trainer(tmp_path / "run", callback, steps=40, save=10).train()
    for step in (10, 20, 30, 40):
        update_average(tmp_path / "apart", tmp_path / f"run/checkpoint-{step}", weights=weights)
    one, other = (read_safetensors(tmp_path / name) for name in ("state", "apart"))
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].tobytes() == other[name].tobytes(), name
    record, apart = (read_record(tmp_path / name) for name in ("state", "apart"))
    assert (record.count, record.step, record.dtypes) == (apart.count, apart.step, apart.dtypes)
    with pytest.raises(PlanError, match="of step 40 is in the average already"):
        update_average(tmp_path / "state", tmp_path / "run/checkpoint-40")
    update_average(tmp_path / "state", tmp_path / "run/checkpoint-40", again=True)
    with pytest.raises(PlanError, match="is in the average already"):
        update_average(tmp_path / "state", tmp_path / "run/checkpoint-40")


def test_a_resumed_training_goes_on_with_its_average(tmp_path):
    whole = RunningAverage(tmp_path / "whole", every=10, weights="swag", out=tmp_path / "model")
    trainer(tmp_path / "run", whole, steps=60, save=20).train()
    parts = tmp_path / "parts"
    trainer(tmp_path / "again", RunningAverage(parts, every=10, weights="swag"), steps=40, save=20).train()
    later = trainer(tmp_path / "again", RunningAverage(parts, every=10, weights="swag"), steps=60, save=20)
    later.train(resume_from_checkpoint=str(tmp_path / "again/checkpoint-40"))
    one, other = (read_safetensors(tmp_path / name) for name in ("whole", "parts"))
    for name in one:
        assert one[name].tobytes() == other[name].tobytes(), name
    # From an older checkpoint: what is in the average already is not taken again.
    older = trainer(tmp_path / "again", RunningAverage(parts, every=10, weights="swag"), steps=80, save=20)
    with pytest.warns(UserWarning, match="up to step 60, and the training goes on from step 20"):
        older.train(resume_from_checkpoint=str(tmp_path / "again/checkpoint-20"))
    assert (read_record(parts).count, read_record(parts).step) == (8, 80)
    with pytest.raises(PlanError, match="of the kind swag, not uniform"):
        trainer(tmp_path / "again", RunningAverage(parts), steps=80).train(
            resume_from_checkpoint=str(tmp_path / "again/checkpoint-20")
        )
    with pytest.raises(OutputError, match="this training begins at step 0"):
        trainer(tmp_path / "new", RunningAverage(parts), steps=10).train()
    with pytest.raises(OutputError, match="exists already"):
        trainer(tmp_path / "new", RunningAverage(tmp_path / "fresh", out=tmp_path / "model"), steps=10).train()


def test_a_diverged_training_is_stopped(tmp_path):
    callback = RunningAverage(tmp_path / "state", every=2, save_every=4)
    trained = trainer(tmp_path / "run", callback, steps=40)

    class Spoil(type(callback).__mro__[2]):
        def on_step_begin(self, args, state, control, model=None, **given):
            if state.global_step == 9:
                with torch.no_grad():
                    model.last.weight[1, 2] = float("nan")

    trained.add_callback(Spoil)
    with pytest.raises(CheckpointError, match="NaN or infinite at step 10: training has diverged"):
        trained.train()
    assert trained.state.global_step <= 13
    assert (read_record(tmp_path / "state").step, read_record(tmp_path / "state").count) == (8, 4)


def test_an_error_in_the_thread_is_raised_in_the_trainer(tmp_path):
    (tmp_path / "file").write_text("in the way")
    callback = RunningAverage(tmp_path / "file/state", every=2, save_every=2)
    trained = trainer(tmp_path / "run", callback, steps=40)
    with pytest.raises(OutputError):
        trained.train()
    assert trained.state.global_step < 10


def test_a_thread_that_lags_makes_the_trainer_wait_and_loses_nothing(tmp_path, monkeypatch):
    busy, most = 0, 0
    whole = Accumulators.add
    lock = threading.Lock()

    def slow(self, values, step):
        nonlocal busy, most
        with lock:
            busy += 1
            most = max(most, busy)
        assert threading.current_thread().name.startswith("weightsmith-average")
        time.sleep(0.01)
        whole(self, values, step)
        with lock:
            busy -= 1

    monkeypatch.setattr(Accumulators, "add", slow)
    callback = RunningAverage(tmp_path / "state", every=1)
    trainer(tmp_path / "run", callback, steps=12, save=1).train()
    monkeypatch.undo()
    for step in range(1, 13):
        update_average(tmp_path / "apart", tmp_path / f"run/checkpoint-{step}")
    assert most == 1
    for name, array in read_safetensors(tmp_path / "apart/mean").items():
        np.testing.assert_array_equal(read_safetensors(tmp_path / "state/mean")[name], array)


def test_the_average_can_be_put_into_the_model_and_taken_out(tmp_path):
    callback = RunningAverage(tmp_path / "state", every=1)
    with pytest.raises(PlanError, match="no snapshot yet"):
        callback.average()
    trained = trainer(tmp_path / "run", callback, steps=10)
    trained.train()
    own = copy.deepcopy(trained.model.state_dict())
    callback.copy_to(trained.model)
    for name, array in callback.average().items():
        np.testing.assert_array_equal(trained.model.state_dict()[name].numpy(), array)
    assert not torch.equal(own["last.weight"], trained.model.last.weight)
    with pytest.raises(PlanError, match="no tensor"):
        callback.copy_to(torch.nn.Linear(2, 2))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=17, n_embd=8, n_layer=2, n_head=2, n_positions=9, architectures=None))


def bert():
    return BertForSequenceClassification(
        BertConfig(vocab_size=17, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    )


def mixtral():
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=17, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, num_local_experts=3, max_position_embeddings=16,
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("make", "loader"),
    [
        (gpt2, AutoModelForCausalLM),
        (bert, AutoModelForSequenceClassification),
        (mixtral, AutoModelForCausalLM),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_is_what_transformers_saves(tmp_path, make, loader, dtype):
    """Tied weights once, experts apart, config and generation config; with one snapshot, the same weights."""
    torch.manual_seed(0)
    model = make().to(dtype)
    model.save_pretrained(tmp_path / "own")
    callback = RunningAverage(tmp_path / "state", out=tmp_path / "out")
    step = types.SimpleNamespace(global_step=0, is_world_process_zero=True)
    callback.on_train_begin(None, step, None, model=model)
    step.global_step = 1
    callback.on_step_end(None, step, None, model=model)
    callback.on_train_end(None, step, None, model=model, processing_class=None)
    one, other = (read_safetensors(tmp_path / name) for name in ("own", "out"))
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype
        assert one[name].tobytes() == other[name].tobytes()
    assert json.loads((tmp_path / "own/config.json").read_text()) == json.loads(
        (tmp_path / "out/config.json").read_text()
    )
    generation = [(tmp_path / name / "generation_config.json").exists() for name in ("own", "out")]
    assert generation[0] == generation[1]
    loaded = loader.from_pretrained(tmp_path / "out")
    assert type(loaded) is type(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


def test_an_adapter_is_averaged_as_an_adapter(tmp_path):
    import peft

    torch.manual_seed(0)
    model = peft.get_peft_model(gpt2(), peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    callback = RunningAverage(tmp_path / "state", out=tmp_path / "out")
    step = types.SimpleNamespace(global_step=0, is_world_process_zero=True)
    callback.on_train_begin(None, step, None, model=model)
    kept = []
    for number in (1, 2, 3):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora" in name:
                    parameter.normal_()
        kept.append({n: t.clone() for n, t in peft.get_peft_model_state_dict(model).items()})
        step.global_step = number
        callback.on_step_end(None, step, None, model=model)
    callback.on_train_end(None, step, None, model=model, processing_class=None)
    assert running_average(tmp_path / "state").is_adapter
    torch.manual_seed(0)
    loaded = peft.PeftModel.from_pretrained(gpt2(), tmp_path / "out")
    found = peft.get_peft_model_state_dict(loaded)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, torch.stack([one[name] for one in kept]).mean(0))
    assert ws.open(tmp_path / "out").is_adapter
    model.save_pretrained(tmp_path / "checkpoint-4")
    assert update_average(tmp_path / "state", tmp_path / "checkpoint-4", again=True).record.count == 4


def test_snapshots_are_copies_of_every_dtype():
    tensors = {
        "f": torch.randn(3, 4).T,
        "b": torch.randn(5).bfloat16(),
        "s": torch.tensor(3.0, dtype=torch.bfloat16),
        "e": torch.randn(5).to(torch.float8_e4m3fn),
        "i": torch.arange(4),
        "t": torch.tensor([True, False]),
    }
    snapshots = Snapshots()
    taken = snapshots.take(tensors)
    for name, tensor in tensors.items():
        assert taken[name].shape == tensor.shape
        np.testing.assert_array_equal(taken[name].astype(np.float64), tensor.double().numpy())
    assert taken["b"].dtype == ml_dtypes.bfloat16
    before = {name: array.copy() for name, array in taken.items()}
    for tensor in tensors.values():
        tensor.zero_()
    for name, array in taken.items():
        np.testing.assert_array_equal(array, before[name])
    assert snapshots.take(tensors)["f"].ctypes.data == taken["f"].ctypes.data


def test_weights_that_are_not_whole_are_refused():
    class Sharded(torch.nn.Linear):
        def state_dict(self, *arguments, **options):
            part = torch.zeros(2)
            part.full_tensor = lambda: None
            return {"weight": part}

    with pytest.raises(PlanError, match="shared out among processes"):
        weights_of(Sharded(2, 2))
    sharded = type("FullyShardedDataParallel", (torch.nn.Linear,), {})
    with pytest.raises(PlanError, match="shared out among processes"):
        weights_of(torch.nn.Sequential(sharded(2, 2)))
    with pytest.raises(PlanError, match="offloaded"):
        weights_of(torch.nn.Linear(2, 2, device="meta"))
    assert list(weights_of(torch.nn.DataParallel(torch.nn.Linear(2, 2)))) == ["weight", "bias"]


def test_settings_are_checked(tmp_path):
    for options in ({"every": 0}, {"every": 1.5}, {"save_every": 0}, {"start": -1}, {"weights": "ema"}):
        with pytest.raises(MethodError):
            RunningAverage(tmp_path / "state", **options)
    with pytest.raises(MethodError, match="float32 or float64"):
        RunningAverage(tmp_path / "state", accumulator="bfloat16")


def test_a_model_that_changes_its_tensors_is_refused():
    average = Accumulators(Averaging("swag"))
    average.add({"w": np.ones(3, np.float32)}, 1)
    for values in ({"w": np.ones(4, np.float32)}, {}, {"w": np.ones(3, np.float32), "v": np.ones(1, np.float32)}):
        with pytest.raises(PlanError, match="an average is of the weights of one model"):
            average.add(values, 2)
    with pytest.raises(PlanError, match="int64 in the model"):
        average.add({"w": np.ones(3, np.int64)}, 2)


def test_the_room_imports_nothing_until_a_callback_is_named():
    script = (
        "import sys, weightsmith.callbacks as c; dir(c); print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
