"""The small vision transformer of the model zoo: its forward pass and its tasks, in NumPy alone.

The forward pass is that of ``ViTForImageClassification`` in transformers, without dropout. It agrees with
it to about 1e-5 in the logits. The tensor names are those that transformers writes to disk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Images = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Weights = Mapping[str, npt.NDArray[Any]]

# The largest value of a pixel; paper is 0.
INK = 16


def upright(images: Images) -> Images:
    """Return the digits as they are, [n, 8, 8] -> [n, 8, 8]."""
    return images


def shifted(images: Images) -> Images:
    """Move the digits two rows down, so that their feet are cut off, [n, 8, 8] -> [n, 8, 8]."""
    moved = np.zeros_like(images)
    moved[:, 2:] = images[:, :-2]
    return moved


def covered(images: Images) -> Images:
    """Blank the left half, [n, 8, 8] -> [n, 8, 8]."""
    blanked = images.copy()
    blanked[:, :, : images.shape[2] // 2] = 0
    return blanked


def thick(images: Images) -> Images:
    """Replace each pixel by the darkest of its 3 x 3 neighbourhood, [n, 8, 8] -> [n, 8, 8]."""
    _, height, width = images.shape
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    windows = [padded[:, y : y + height, x : x + width] for y in range(3) for x in range(3)]
    return np.asarray(np.max(windows, axis=0), dtype=np.uint8)


# Name of a task -> what it does to the plain images. The base of the zoo is trained on the first alone.
TASKS: dict[str, Callable[[Images], Images]] = {
    "upright": upright,
    "shifted": shifted,
    "covered": covered,
    "thick": thick,
}


def pixels(images: Images) -> Floats:
    """Scale images of 0..16 to the model's input of -1..1, [n, h, w] -> [n, 1, h, w]."""
    return images[:, np.newaxis].astype(np.float32) / np.float32(INK / 2) - np.float32(1)


def logits(weights: Weights, config: Mapping[str, Any], images: Images) -> Floats:
    """Classify images.

    Args:
        weights: tensors by name, of any floating-point dtype; computed with in float32.
        config: the contents of ``config.json``.
        images: [n, h, w], values 0..16, already transformed for the task.

    Returns:
        The logits, [n, classes].
    """
    if config["hidden_act"] != "gelu" or config["num_channels"] != 1:
        raise ValueError("this forward pass knows hidden_act 'gelu' and one channel only")
    model = {name: np.asarray(tensor).astype(np.float32) for name, tensor in weights.items()}
    eps = float(config["layer_norm_eps"])
    hidden = _embed(model, int(config["patch_size"]), pixels(images))
    for index in range(int(config["num_hidden_layers"])):
        layer = f"vit.encoder.layer.{index}."
        normed = _layer_norm(model, layer + "layernorm_before", hidden, eps)
        hidden = hidden + _attend(model, layer + "attention.", normed, int(config["num_attention_heads"]))
        normed = _layer_norm(model, layer + "layernorm_after", hidden, eps)
        inner = _gelu(_linear(model, layer + "intermediate.dense", normed))
        hidden = hidden + _linear(model, layer + "output.dense", inner)
    # Only the class token is classified; the norm acts on each token by itself.
    return _linear(model, "classifier", _layer_norm(model, "vit.layernorm", hidden[:, 0], eps))


def accuracy(weights: Weights, config: Mapping[str, Any], images: Images, labels: npt.NDArray[Any]) -> float:
    """Return the share of images classified rightly, 0..1.

    Args:
        weights: tensors by name.
        config: the contents of ``config.json``.
        images: [n, h, w], values 0..16, already transformed for the task.
        labels: [n], integers.
    """
    return float(np.mean(logits(weights, config, images).argmax(axis=-1) == labels))


def _embed(model: Mapping[str, Floats], size: int, inputs: Floats) -> Floats:
    """Cut into patches, project, prepend the class token, add positions: [n, 1, h, w] -> [n, 1 + p, d]."""
    n, channels, height, width = inputs.shape
    rows, columns = height // size, width // size
    patches = inputs.reshape(n, channels, rows, size, columns, size).transpose(0, 2, 4, 1, 3, 5)
    flat = patches.reshape(n, rows * columns, channels * size * size)
    kernel = model["vit.embeddings.patch_embeddings.projection.weight"]
    projected = flat @ kernel.reshape(len(kernel), -1).T
    projected = projected + model["vit.embeddings.patch_embeddings.projection.bias"]
    first = np.broadcast_to(model["vit.embeddings.cls_token"], (n, 1, len(kernel)))
    tokens: Floats = np.concatenate([first, projected], axis=1)
    return tokens + model["vit.embeddings.position_embeddings"]


def _attend(model: Mapping[str, Floats], prefix: str, hidden: Floats, heads: int) -> Floats:
    """Multi-head self-attention with its output projection, [n, t, d] -> [n, t, d]."""
    n, tokens, width = hidden.shape

    def split(name: str) -> Floats:
        projected = _linear(model, f"{prefix}attention.{name}", hidden)
        return projected.reshape(n, tokens, heads, -1).transpose(0, 2, 1, 3)

    query, key, value = split("query"), split("key"), split("value")
    scores = query @ key.transpose(0, 1, 3, 2) * np.float32(query.shape[-1] ** -0.5)
    scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
    shares = scores / scores.sum(axis=-1, keepdims=True)
    mixed = (shares @ value).transpose(0, 2, 1, 3).reshape(n, tokens, width)
    return _linear(model, prefix + "output.dense", mixed)


def _linear(model: Mapping[str, Floats], name: str, inputs: Floats) -> Floats:
    """Apply a linear layer to the last axis, [..., i] -> [..., o]."""
    product: Floats = inputs @ model[name + ".weight"].T
    return product + model[name + ".bias"]


def _layer_norm(model: Mapping[str, Floats], name: str, inputs: Floats, eps: float) -> Floats:
    """Normalise the last axis to mean 0 and variance 1, then scale and shift it; the shape stays."""
    centred: Floats = inputs - inputs.mean(axis=-1, keepdims=True)
    variance = np.mean(np.square(centred), axis=-1, keepdims=True)
    normed: Floats = centred / np.sqrt(variance + np.float32(eps))
    return normed * model[name + ".weight"] + model[name + ".bias"]


def _gelu(inputs: Floats) -> Floats:
    """Return x times the normal distribution function of x, element by element.

    NumPy has no error function; formula 7.1.26 of Abramowitz and Stegun is within 1.5e-7 of it.
    """
    scaled = np.abs(inputs) * np.float32(0.5**0.5)
    t: Floats = np.reciprocal(1 + np.float32(0.3275911) * scaled)
    coefficients = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)
    series: Floats = np.zeros_like(t)
    for coefficient in coefficients:
        series = (series + np.float32(coefficient)) * t
    erf = np.copysign(1 - series * np.exp(-np.square(scaled)), inputs)
    gated: Floats = np.float32(0.5) * inputs * (1 + erf)
    return gated
