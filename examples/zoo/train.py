"""Train the model zoo from scratch: one base on upright digits, and six fine-tunes of it.

Run by hand, from the root of the repository, with torch, transformers and scikit-learn installed, and npm at hand for
the images of two tasks:

    PYTHONPATH=src python -m examples.zoo.train --data CACHE | tee examples/zoo/train.log

On one machine and with the same versions the files come out the same to the byte. Elsewhere rounding
may differ, and the numbers with it.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy
import torch
import transformers
from torch.nn import functional
from transformers import ViTConfig, ViTForImageClassification

from examples.zoo.tasks import BASE_TASK, EXPERTS, SOURCES, TASKS, Part, Source
from weightsmith.quickstart import vit

BATCH = 64
Sources = Mapping[str, Source]
Batch = tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]


@dataclass(frozen=True)
class Schedule:
    """How one model is trained.

    Attributes:
        steps: batches of 64 images.
        rate: the highest learning rate of the one-cycle schedule.
        decay: weight decay of AdamW.
        replay: the share of each batch that is the base's task.
        frozen: parameters whose names start so are left as they are.
    """

    steps: int
    rate: float
    decay: float = 0.0
    replay: float = 0.0
    frozen: str | None = None


BASE = Schedule(steps=1400, rate=3e-3, decay=0.05)
FINE = Schedule(steps=840, rate=1e-3, replay=0.25, frozen="classifier")


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


def batches(sources: Sources, task: str, replay: float, seed: int) -> Iterator[Batch]:
    """Yield batches of one task without end, the first images of each being of the base's task."""
    rng = np.random.default_rng(seed)
    part, upright = (sources[TASKS[name].source].training for name in (task, BASE_TASK))
    kept = round(BATCH * replay)
    while True:
        order = rng.permutation(len(part.labels))
        for rows in order[: len(order) // BATCH * BATCH].reshape(-1, BATCH):
            images, labels = part.images[rows], part.labels[rows]
            if part is not upright:
                drawn = rng.integers(len(upright.labels), size=kept)
                images = np.concatenate([upright.images[drawn], images[kept:]])
                labels = np.concatenate([upright.labels[drawn], labels[kept:]])
            images = jitter(images, rng)
            yield np.concatenate([images[:kept], TASKS[task].change(images[kept:])]), labels


def joint_batches(sources: Sources, replay: float, seed: int) -> Iterator[Batch]:
    """Yield batches of all experts' tasks in equal shares without end, beside that of the base's task."""
    rng = np.random.default_rng(seed)
    kept = round(BATCH * replay)
    shares = {BASE_TASK: kept} | dict.fromkeys(EXPERTS, (BATCH - kept) // len(EXPERTS))
    while True:
        images, labels = [], []
        for name, count in shares.items():
            part = sources[TASKS[name].source].training
            rows = rng.integers(len(part.labels), size=count)
            images.append(TASKS[name].change(jitter(part.images[rows], rng)))
            labels.append(part.labels[rows])
        yield np.concatenate(images), np.concatenate(labels)


def fit(model: ViTForImageClassification, found: Iterator[Batch], schedule: Schedule) -> float:
    """Train the model in place and return the mean loss of the last 14 steps, an epoch of the digits."""
    for name, tensor in model.named_parameters():
        tensor.requires_grad_(schedule.frozen is None or not name.startswith(schedule.frozen))
    trained = [tensor for tensor in model.parameters() if tensor.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=schedule.rate, weight_decay=schedule.decay)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, schedule.rate, total_steps=schedule.steps, pct_start=0.2)
    losses: list[float] = []
    model.train()
    for _ in range(schedule.steps):
        images, labels = next(found)
        logits = model(pixel_values=torch.from_numpy(vit.pixels(images))).logits
        loss = functional.cross_entropy(logits, torch.from_numpy(labels.astype(np.int64)), label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cycle.step()
        losses.append(loss.item())
    model.eval()
    return float(np.mean(losses[-14:]))


def fit_base(model: ViTForImageClassification, sources: Sources, seed: int) -> float:
    """Train an untrained model to be the base of this seed; see :func:`fit`."""
    return fit(model, batches(sources, BASE_TASK, BASE.replay, seed), BASE)


def fit_expert(model: ViTForImageClassification, sources: Sources, task: str, seed: int) -> float:
    """Train the base of this seed to be the expert of one task; see :func:`fit`."""
    return fit(model, batches(sources, task, FINE.replay, seed + 100 + EXPERTS.index(task)), FINE)


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


def check(folder: Path, parts: Mapping[str, Part]) -> tuple[dict[str, float], float]:
    """Read a folder back.

    Args:
        folder: the model.
        parts: source -> the part to measure on.

    Returns:
        The accuracy of the NumPy forward pass on each task, and the largest difference of its logits
        from those of transformers.
    """
    weights = safetensors.numpy.load_file(folder / "model.safetensors")
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    model = ViTForImageClassification.from_pretrained(folder, dtype=torch.float32).eval()
    accuracies, difference = {}, 0.0
    for name, task in TASKS.items():
        part = parts[task.source]
        images = task.change(part.images)
        accuracies[name] = vit.accuracy(weights, config, images, part.labels)
        with torch.no_grad():
            expected = model(pixel_values=torch.from_numpy(vit.pixels(images))).logits.numpy()
        difference = max(difference, float(np.abs(vit.logits(weights, config, images) - expected).max()))
    return accuracies, difference


def table(rows: dict[str, dict[str, float]]) -> str:
    """Lay out accuracies, models down and tasks across, as a Markdown table in per cent."""
    lines = ["| model | " + " | ".join(TASKS) + " |", "|---" * (len(TASKS) + 1) + "|"]
    for name, row in rows.items():
        lines.append(f"| {name} | " + " | ".join(f"{100 * row[task]:.1f}" for task in TASKS) + " |")
    return "\n".join(lines)


def main() -> None:
    """Train, save, read back and report."""
    parser = argparse.ArgumentParser(description="Train the model zoo.")
    parser.add_argument("--data", type=Path, required=True, help="folder that keeps the data of packages")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-test", action="store_true", help="leave the test part alone")
    options = parser.parse_args()

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.utils.logging.disable_progress_bar()
    import sklearn

    versions = [("Python", platform.python_version()), ("torch", torch.__version__)]
    versions += [(module.__name__, module.__version__) for module in (transformers, sklearn, np)]
    print(", ".join(f"{name} {version}" for name, version in versions))
    sources = {name: read(options.data) for name, read in SOURCES.items()}
    for name, source in sources.items():
        counts = {"training": source.training, "validation": source.validation, "test": source.test}
        print(f"{name}: " + ", ".join(f"{len(part.labels)} {what}" for what, part in counts.items()))
    options.out.mkdir(parents=True, exist_ok=True)
    for name, part in (("validation", sources["digits"].validation), ("test", sources["digits"].test)):
        arrays = {"images": np.ascontiguousarray(part.images), "labels": part.labels}
        safetensors.numpy.save_file(arrays, options.out / f"digits-{name}.safetensors")

    print(f"base: {BASE}\nfine-tunes: {FINE}\n")
    model = new_model(options.seed)
    began = time.perf_counter()
    loss = fit_base(model, sources, options.seed)
    print(f"base: loss {loss:.4f} after {time.perf_counter() - began:.0f} s", flush=True)
    save(model, options.out / "base")
    shared = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for task in EXPERTS:
        model.load_state_dict(shared)
        loss = fit_expert(model, sources, task, options.seed)
        print(f"{task}: loss {loss:.4f} after {time.perf_counter() - began:.0f} s", flush=True)
        save(model, options.out / task)

    for part_name in ("validation",) if options.no_test else ("validation", "test"):
        parts = {name: getattr(source, part_name) for name, source in sources.items()}
        checked = {name: check(options.out / name, parts) for name in ("base", *EXPERTS)}
        print(f"\n{part_name} part, per cent right:\n")
        print(table({name: accuracies for name, (accuracies, _) in checked.items()}))
        worst = max(difference for _, difference in checked.values())
        print(f"\nlargest difference of the NumPy logits from transformers': {worst:.1e}")


if __name__ == "__main__":
    main()
