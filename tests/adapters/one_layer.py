"""One adapted layer, to hold a fold against the layer's own forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from weightsmith.adapters.adapter import Adapter
from weightsmith.adapters.fold import fold
from weightsmith.adapters.layer import Weight
from weightsmith.checkpoint.checkpoint import Checkpoint, Companions
from weightsmith.checkpoint.tensor import ArrayTensor
from weightsmith.errors import WeightsmithError

Arrays = Mapping[str, np.ndarray[Any, Any]]
Forward = Callable[[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any], Arrays], np.ndarray[Any, Any]]


@dataclass
class Case:
    """A kind of adapter on one layer.

    Attributes:
        config: its ``adapter_config.json``.
        parts: part -> array, of the layer.
        forward: what the adapted layer gives for ``(x, weight, bias, parts)``: ``[n, out]``.
        shape: the weight's.
        shared: part -> array, of what all layers share.
        bias: whether the layer has one.
        seed: of the weight.
    """

    config: dict[str, Any]
    parts: dict[str, np.ndarray[Any, Any]]
    forward: Forward
    shape: tuple[int, int] = (9, 14)
    shared: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    bias: bool = True
    seed: int = 3

    def base(self) -> dict[str, np.ndarray[Any, Any]]:
        """The layer's weight, and perhaps its bias."""
        rng = np.random.default_rng(self.seed)
        tensors = {"m.q.weight": rng.standard_normal(self.shape).astype(np.float32)}
        return tensors | ({"m.q.bias": rng.standard_normal(self.shape[0]).astype(np.float32)} if self.bias else {})


def checkpoint(name: str, tensors: Arrays, config: Mapping[str, Any] | None = None) -> Checkpoint:
    """A checkpoint in memory: an adapter, if it has a config; else a model whose layers are all stored one way."""
    held = {key: ArrayTensor(key, np.asarray(value)) for key, value in tensors.items()}
    companions = Companions({"model_type": "llama"} if config is None else config)
    return Checkpoint(name, held, companions, is_adapter=config is not None)


def adapter(case: Case) -> Checkpoint:
    """The case's adapter, in the layout of PEFT."""
    tensors = {
        f"base_model.model.m.{part}" if part.startswith("additional_") else f"base_model.model.m.q.{part}": array
        for part, array in case.parts.items()
    }
    tensors |= {f"base_model.{part}": array for part, array in case.shared.items()}
    return checkpoint("adapter", tensors, case.config)


def folded(case: Case, base: Arrays | None = None) -> Checkpoint:
    """The base with the adapter on it."""
    return fold(checkpoint("base", case.base() if base is None else base), adapter(case))


def check(case: Case) -> None:
    """The folded layer gives what the adapted one gives, however the weight is stored and in whatever blocks it is read.

    float32 parts are read exactly, so that all the difference is one rounding of the weight.
    """
    base = case.base()
    weight, bias = base["m.q.weight"].astype(np.float64), base.get("m.q.bias", np.zeros(case.shape[0])).astype(float)
    x = np.random.default_rng(0).standard_normal((5, case.shape[1]))
    parts = {name: np.asarray(value, float) for name, value in (case.parts | case.shared).items()}
    expected = case.forward(x, weight, bias, parts)
    result = folded(case)
    found = result["m.q.weight"].numpy()
    plain = x @ found.astype(float).T + (result["m.q.bias"].numpy() if case.bias else 0)
    # As large as the largest output: one rounding of every weight.
    np.testing.assert_allclose(plain, expected, rtol=0, atol=4e-6 * np.abs(expected).max())
    unmoved = x @ weight.T + bias
    assert not np.allclose(expected, unmoved, atol=1e-3), "an adapter that does nothing shows nothing"

    tensor = result["m.q.weight"]
    view = Weight(ArrayTensor("m.q.weight", base["m.q.weight"]))
    assert tensor.whole or not Adapter(adapter(case)).change("m.q", view).whole, "plans count on what is declared"
    for block in (1, 7, tensor.size - 1):
        stretches = [tensor.read(i, min(i + block, tensor.size)) for i in range(0, tensor.size, block)]
        assert np.concatenate(stretches).tobytes() == found.tobytes()

    turned = folded(Case(**{**vars(case), "config": {**case.config, "fan_in_fan_out": True}}), _turned(base))
    np.testing.assert_allclose(turned["m.q.weight"].numpy().T, found, rtol=0, atol=1e-6 * np.abs(found).max())


def _turned(base: Arrays) -> Arrays:
    return {**base, "m.q.weight": np.ascontiguousarray(base["m.q.weight"].T)}


def draw(seed: int, *shape: int) -> np.ndarray[Any, Any]:
    """Random float32 values."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def refused(case: Case) -> str:
    """What a fold of the case is refused with, whether it shows in headers or in values."""
    try:
        folded(case)["m.q.weight"].numpy()
    except WeightsmithError as error:
        return str(error)
    raise AssertionError("nothing was refused")
