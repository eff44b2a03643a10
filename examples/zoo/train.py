"""Train the model zoo from scratch: one base on upright digits, and three fine-tunes of it.

Run by hand, from the root of the repository, with torch, transformers and scikit-learn installed:

    PYTHONPATH=src python examples/zoo/train.py | tee examples/zoo/train.log

On one machine and with the same versions the files come out the same to the byte. Elsewhere rounding
may differ, and the numbers with it.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy
import sklearn
import torch
import transformers
from sklearn.datasets import load_digits
from torch.nn import functional
from transformers import ViTConfig, ViTForImageClassification

from weightsmith.quickstart import vit

TEST, VALIDATION = 540, 300
BATCH = 64
FINE_TUNES = ("shifted", "covered", "thick")


@dataclass(frozen=True)
class Part:
    """Plain images [n, 8, 8] of 0..16, and their labels [n]."""

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Schedule:
    """How one model is trained.

    Attributes:
        epochs: passes over the training part.
        rate: the highest learning rate of the one-cycle schedule.
        decay: weight decay of AdamW.
        replay: the share of each batch that stays upright.
        frozen: parameters whose names start so are left as they are.
    """

    epochs: int
    rate: float
    decay: float = 0.0
    replay: float = 0.0
    frozen: str | None = None


def split() -> tuple[Part, Part, Part]:
    """Return the training, validation and test parts, drawn once with a fixed seed."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images, labels = digits.images.astype(np.uint8)[order], digits.target.astype(np.uint8)[order]
    cuts = [slice(TEST + VALIDATION, None), slice(TEST, TEST + VALIDATION), slice(0, TEST)]
    training, validation, test = (Part(images[cut], labels[cut]) for cut in cuts)
    return training, validation, test


def new_model(seed: int) -> ViTForImageClassification:
    """Return an untrained classifier."""
    torch.manual_seed(seed)
    names = {digit: str(digit) for digit in range(10)}
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=256,
        layer_norm_eps=1e-6,
        initializer_range=0.1,
        id2label=names,
        label2id={name: digit for digit, name in names.items()},
    )
    return ViTForImageClassification(config)


def jitter(images: npt.NDArray[np.uint8], rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Move a batch by up to one pixel each way, the same for all its images, [n, 8, 8] -> [n, 8, 8]."""
    down, right = rng.integers(0, 3, size=2)
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    return padded[:, down : down + 8, right : right + 8]


def train(model: ViTForImageClassification, part: Part, task: str, schedule: Schedule, seed: int) -> float:
    """Train the model in place on one task and return the mean loss of the last epoch."""
    rng = np.random.default_rng(seed)
    for name, tensor in model.named_parameters():
        tensor.requires_grad_(schedule.frozen is None or not name.startswith(schedule.frozen))
    trained = [tensor for tensor in model.parameters() if tensor.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=schedule.rate, weight_decay=schedule.decay)
    batches = len(part.labels) // BATCH
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, schedule.rate, total_steps=schedule.epochs * batches, pct_start=0.2
    )
    labels = torch.from_numpy(part.labels.astype(np.int64))
    kept = round(BATCH * schedule.replay)
    losses: list[float] = []
    model.train()
    for _ in range(schedule.epochs):
        order = rng.permutation(len(part.labels))
        losses = []
        for rows in order[: batches * BATCH].reshape(batches, BATCH):
            images = jitter(part.images[rows], rng)
            images = np.concatenate([images[:kept], vit.TASKS[task](images[kept:])])
            logits = model(pixel_values=torch.from_numpy(vit.pixels(images))).logits
            loss = functional.cross_entropy(logits, labels[rows], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            cycle.step()
            losses.append(loss.item())
    model.eval()
    return float(np.mean(losses))


def save(model: ViTForImageClassification, folder: Path) -> None:
    """Write config.json, model.safetensors in float16 and preprocessor_config.json."""
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    half = ViTForImageClassification(model.config).half()
    half.load_state_dict({name: tensor.half() for name, tensor in state.items()})
    half.save_pretrained(folder)
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": False,
        "do_rescale": True,
        "rescale_factor": 1 / vit.INK,
        "do_normalize": True,
        "image_mean": [0.5],
        "image_std": [0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")


def check(folder: Path, part: Part) -> tuple[dict[str, float], float]:
    """Read a folder back.

    Returns:
        The accuracy of the NumPy forward pass on each task, and the largest difference of its logits
        from those of transformers.
    """
    weights = safetensors.numpy.load_file(folder / "model.safetensors")
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    model = ViTForImageClassification.from_pretrained(folder, dtype=torch.float32).eval()
    accuracies, difference = {}, 0.0
    for name, transform in vit.TASKS.items():
        images = transform(part.images)
        accuracies[name] = vit.accuracy(weights, config, images, part.labels)
        with torch.no_grad():
            expected = model(pixel_values=torch.from_numpy(vit.pixels(images))).logits.numpy()
        difference = max(difference, float(np.abs(vit.logits(weights, config, images) - expected).max()))
    return accuracies, difference


def table(rows: dict[str, dict[str, float]]) -> str:
    """Lay out accuracies, models down and tasks across, as a Markdown table in per cent."""
    lines = ["| model | " + " | ".join(vit.TASKS) + " |", "|---" * (len(vit.TASKS) + 1) + "|"]
    for name, row in rows.items():
        lines.append(f"| {name} | " + " | ".join(f"{100 * row[task]:.1f}" for task in vit.TASKS) + " |")
    return "\n".join(lines)


def main() -> None:
    """Train, save, read back and report."""
    parser = argparse.ArgumentParser(description="Train the model zoo.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=60, help="of each fine-tune")
    parser.add_argument("--no-test", action="store_true", help="leave the test part alone")
    options = parser.parse_args()

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.utils.logging.disable_progress_bar()
    versions = [("Python", platform.python_version()), ("torch", torch.__version__)]
    versions += [(module.__name__, module.__version__) for module in (transformers, sklearn, np)]
    print(", ".join(f"{name} {version}" for name, version in versions))
    training, validation, test = split()
    print(f"{len(training.labels)} training, {len(validation.labels)} validation, {len(test.labels)} test")
    options.out.mkdir(parents=True, exist_ok=True)
    for name, part in (("validation", validation), ("test", test)):
        arrays = {"images": np.ascontiguousarray(part.images), "labels": part.labels}
        safetensors.numpy.save_file(arrays, options.out / f"digits-{name}.safetensors")

    base = Schedule(epochs=100, rate=3e-3, decay=0.05)
    fine = Schedule(epochs=options.epochs, rate=1e-3, replay=0.25, frozen="classifier")
    print(f"base: {base}\nfine-tunes: {fine}\n")
    model = new_model(options.seed)
    began = time.perf_counter()
    loss = train(model, training, "upright", base, options.seed)
    print(f"base: loss {loss:.4f} after {time.perf_counter() - began:.0f} s", flush=True)
    save(model, options.out / "base")
    shared = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for number, task in enumerate(FINE_TUNES):
        model.load_state_dict(shared)
        loss = train(model, training, task, fine, options.seed + 100 + number)
        print(f"{task}: loss {loss:.4f} after {time.perf_counter() - began:.0f} s", flush=True)
        save(model, options.out / task)

    parts = {"validation": validation} if options.no_test else {"validation": validation, "test": test}
    for part_name, part in parts.items():
        checked = {name: check(options.out / name, part) for name in ("base", *FINE_TUNES)}
        print(f"\n{part_name} part, per cent right:\n")
        print(table({name: accuracies for name, (accuracies, _) in checked.items()}))
        worst = max(difference for _, difference in checked.values())
        print(f"\nlargest difference of the NumPy logits from transformers': {worst:.1e}")


if __name__ == "__main__":
    main()
