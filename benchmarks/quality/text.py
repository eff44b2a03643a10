"""The text zoo: a small decoder language model in the layout of Llama, on bytes, with an expert for each domain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.quality.domains import DOMAINS, Bytes, Text, read
from benchmarks.quality.zoo import BASE, JOINT, Evaluator, Floats, Measure, PartName, Zoo, digest_of

# Bytes that a model sees at once, in training and evaluation.
LENGTH = 128
BATCH = 16
# Windows that the loss is measured on, spread evenly over a domain's part.
WINDOWS: dict[PartName, int] = {"validation": 64, "test": 128}

Windows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Schedule:
    """How one model is trained.

    Attributes:
        steps: batches of 16 windows.
        rate: the highest learning rate of the one-cycle schedule.
    """

    steps: int
    rate: float


BASE_SCHEDULE = Schedule(steps=700, rate=4e-3)
FINE_SCHEDULE = Schedule(steps=110, rate=1e-3)


class Language(Zoo):
    """Experts for domains of text."""

    name = "text"
    base_task = next(iter(DOMAINS))
    tasks = tuple(DOMAINS)[1:]
    measure = Measure("loss, nats a byte", digits=3)

    def make(self, name: str, seed: int, folder: Path, data: Path) -> Any:
        """Train one model."""
        texts = _texts(data)
        if name == BASE:
            model = new_model(seed)
            fit(model, [texts[self.base_task].training], BASE_SCHEDULE, seed)
            return model
        model = LlamaForCausalLM.from_pretrained(folder / BASE)
        if name == JOINT:
            every = [texts[domain].training for domain in self.tasks]
            schedule = Schedule(FINE_SCHEDULE.steps * len(self.tasks), FINE_SCHEDULE.rate)
            fit(model, every, schedule, seed + 200)
        else:
            fit(model, [texts[name].training], FINE_SCHEDULE, seed + 100 + self.tasks.index(name))
        return model

    def evaluator(self, part: PartName, data: Path) -> Evaluator:
        """Return the losses on windows of one part of all domains."""
        texts = {name: getattr(text, part) for name, text in _texts(data).items()}
        return Losses({name: spread(text, WINDOWS[part]) for name, text in texts.items()})


def new_model(seed: int) -> LlamaForCausalLM:
    """Return an untrained model of 468 thousand parameters, input and output embeddings tied."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=256,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def fit(model: LlamaForCausalLM, texts: Sequence[Bytes], schedule: Schedule, seed: int) -> None:
    """Train a model in place.

    Args:
        model: the model.
        texts: the windows of a batch are drawn from these in turn.
        schedule: how long and how fast.
        seed: of the windows.
    """
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=schedule.rate, betas=(0.9, 0.95), weight_decay=0.1)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, schedule.rate, total_steps=schedule.steps, pct_start=0.1)
    model.train()
    for step in range(schedule.steps):
        chosen = [texts[(step * BATCH + place) % len(texts)] for place in range(BATCH)]
        starts = [int(rng.integers(len(text) - LENGTH)) for text in chosen]
        windows = [text[start : start + LENGTH + 1] for text, start in zip(chosen, starts, strict=True)]
        loss = losses(model, np.stack(windows).astype(np.int64)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        cycle.step()
    model.eval()


def losses(model: LlamaForCausalLM, windows: Windows) -> torch.Tensor:
    """Return the loss of every byte of some windows but the first, [n, length + 1] -> [n, length], in nats."""
    tokens = torch.from_numpy(windows)
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")


def spread(text: Bytes, count: int) -> Windows:
    """Return windows at even distances over a text, [n] -> [count, length + 1]."""
    starts = np.linspace(0, len(text) - LENGTH - 1, count).astype(int)
    return np.stack([text[start : start + LENGTH + 1] for start in starts]).astype(np.int64)


class Losses(Evaluator):
    """Measures the mean loss of a byte, in nats, given those before it in its window."""

    def __init__(self, windows: Mapping[str, Windows]) -> None:
        """Keep the windows.

        Args:
            windows: domain -> [n, length + 1].
        """
        self._windows = dict(windows)
        self._models: dict[str, LlamaForCausalLM] = {}

    @property
    def digest(self) -> str:
        """A hash of all windows."""
        return digest_of(*(windows.tobytes() for windows in self._windows.values()))

    def __call__(self, weights: Mapping[str, Floats], config: Mapping[str, Any], tasks: Sequence[str]) -> list[float]:
        """Measure a model on each of some domains."""
        torch.set_num_threads(1)
        model = self._loaded(weights, config)
        found = []
        with torch.inference_mode():
            for task in tasks:
                windows = self._windows[task]
                sums = [losses(model, windows[i : i + BATCH]).double().sum() for i in range(0, len(windows), BATCH)]
                found.append(float(sum(sums)) / (windows.shape[0] * (windows.shape[1] - 1)))
        return found

    def _loaded(self, weights: Mapping[str, Floats], config: Mapping[str, Any]) -> LlamaForCausalLM:
        """Return a model with these weights; its modules are made once for a config."""
        key = repr(sorted(config.items()))
        if key not in self._models:
            self._models[key] = LlamaForCausalLM(LlamaConfig(**config)).eval()
        model = self._models[key]
        # The output embedding is the input embedding, and is not on disk.
        result = model.load_state_dict({name: torch.from_numpy(w) for name, w in weights.items()}, strict=False)
        if result.unexpected_keys or set(result.missing_keys) - {"lm_head.weight"}:
            raise ValueError(f"these are not the weights of this model: {result}")
        return model


@cache
def _texts(data: Path) -> dict[str, Text]:
    return {name: read(name, data) for name in DOMAINS}
