"""Adapters of every kind: their configs, the shapes of their tensors, and the patterns in configs."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fuzz.mutate import text_mutator
from fuzz.target import Defect, Target, check_tensor
from weightsmith.adapters.fold import fold
from weightsmith.adapters.patterns import Patterns
from weightsmith.adapters.registry import Parameterization, all_parameterizations
from weightsmith.checkpoint.checkpoint import Checkpoint, Companions
from weightsmith.checkpoint.json_text import parse_object
from weightsmith.checkpoint.tensor import ArrayTensor
from weightsmith.errors import CheckpointError, PlanError

_WORDS = b'"peft_type" "r" "lora_alpha" "rank_pattern" "alpha_pattern" "q" "0.q" "use_rslora" 2 4 8 12 { } [ ] : , true'
_WORDS += (
    b' "use_dora" "init_lora_weights" "pissa" "olora" "kasa_config" "use_bdlora" "target_parameters" "m.0.q.weight"'
)
_WORDS += (
    b' "init_weights" "bat" "mini" "feedforward_modules" "block_share" "coft" "peft_version" "0.17" "fan_in_fan_out"'
)
_WORDS += b' "trainable_token_indices" "parts" "shared" "weight" "lora_A" "lora_B" "lora_E" "lora_magnitude_vector"'
_WORDS += b' "layer_replication"'
_WORDS += b" ( ) (?: | * + ? {2} {,3} {1,2} \\. \\d \\w [a-c] [^.] ^ $ a b . .*"
# Elements of all tensors of an input together: files hold what they say, and take no time to read.
_MOST = 100_000
# Lengths by the names that forms have for them, which fit one another for most kinds.
_LENGTHS = {"out": 8, "in": 12, "v": 12, "d": 4, "k": 3, "h": 3, "w": 3, "r": 2, "e": 3, "er": 6, "m": 8, "rows": 4}
_LENGTHS |= {"a": 2, "b": 4, "c": 3, "dk": 4, "n": 8, "min": 8, "blocks": 6, "size": 2, "entries": 1, "factors": 2}
_LENGTHS |= {"columns": 12, "part": 12, "block": 2, "least": 12, "most": 12, "bases": 8}
_SHARED = {"vera_A": [2, 12], "vera_B": [8, 2], "randlora_A": [2, 1, 12], "randlora_B": [12, 8, 2]}


def run(content: bytes) -> None:
    """Fold what an input describes, or, where the first byte is odd, match a pattern beside Python's engine."""
    if content and content[0] % 2:
        _compare(content[1:13].decode("latin-1"), content[13:40].decode("latin-1"))
        return
    try:
        given = parse_object(content[1:], "adapter_config.json")
        base, tensors = _tensors(given)
        if base is None:
            return
        adapter = Checkpoint("adapter", tensors, Companions(given), is_adapter=True)
        with np.errstate(all="ignore"):
            folded = fold(base, adapter)
            for tensor in folded.values():
                check_tensor(tensor)
    except (CheckpointError, PlanError):
        return


def _tensors(given: Mapping[str, Any]) -> tuple[Checkpoint | None, dict[str, ArrayTensor]]:
    """Return a base and an adapter's tensors by the shapes that an input gives; None if it gives none, or too many."""
    shapes: dict[str, list[int]] = {}
    for key, prefix in (("parts", "base_model.model.m.0.q."), ("shared", "base_model.")):
        entries = given.get(key)
        shapes |= {prefix + name: shape for name, shape in entries.items()} if isinstance(entries, dict) else {}
    weight = given.get("weight")
    total = 0
    for shape in (weight, *shapes.values()):
        if not isinstance(shape, list) or not all(type(n) is int and 0 <= n <= _MOST for n in shape):
            return None, {}
        total += math.prod(shape)
    if total > _MOST or not isinstance(weight, list) or not weight:
        return None, {}
    dtypes = {True: np.float32, False: np.int64}
    whole = given.get("integers") is True
    base = {"m.0.q.weight": _array(weight, np.float32), "m.0.q.bias": _array(weight[:1], np.float32)}
    tensors = {name: _array(shape, dtypes[not whole]) for name, shape in shapes.items()}
    return (
        Checkpoint("base", {name: ArrayTensor(name, array) for name, array in base.items()}),
        {name: ArrayTensor(name, array) for name, array in tensors.items()},
    )


def _array(shape: Sequence[int], dtype: Any) -> np.ndarray[Any, Any]:
    return (np.arange(math.prod(shape)) % 7).astype(dtype).reshape(shape)


def _compare(module: str, pattern: str) -> None:
    try:
        found = Patterns({pattern: 1}).value(module, 0)
    except CheckpointError:
        return
    if "\n" in module or len(re.findall(r"[*+?{]", pattern)) > 3:
        # A line break, which PEFT's first .* does not pass, or more than the engine does in a short time.
        return
    if found != (re.match(rf"(.*\.)?({pattern})$", module) is not None):
        raise Defect(f"{pattern!r} on {module!r}: found {found}")


def seeds() -> Sequence[bytes]:
    """An adapter of every form of every kind, configs as PEFT writes them, and pairs of a name and a pattern.

    A module's name has twelve letters.
    """
    lora = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_rslora": False, "fan_in_fan_out": False}
    lora |= {"weight": [8, 12], "parts": {"lora_A": [2, 12], "lora_B": [8, 2]}}
    configs = [{**lora, "rank_pattern": {"q": 2, r".*\.q": 3}, "alpha_pattern": {"0.q": 8.5}}]
    configs += [{**lora, "use_dora": True}, {**lora, "rank_pattern": {"(a+)+b": 2}}]
    configs += [{**lora, "init_lora_weights": start} for start in ("pissa", "olora", "pissa_niter_4")]
    configs += [given for kind in all_parameterizations().values() for given in _of_kind(kind)]
    pairs = ["m.layers.0.q" + p for p in ("q", r".*\.q", "(a|q)+", r"layers\.\d+\.q", "[a-q]{1,3}$", "^m.*?q", "(.?)*")]
    return [*(b"\0" + json.dumps(c).encode() for c in configs), *(b"\1" + pair.encode() for pair in pairs)]


def _of_kind(kind: Parameterization) -> Iterator[dict[str, Any]]:
    """Yield an adapter for every form of a kind, with all of its parts and with those alone that it must have."""
    config: dict[str, Any] = {setting.name: setting.default for setting in kind.settings}
    config |= {"peft_type": kind.peft_type, "r": 2, "init_r": 2, "oft_block_size": 2}
    for form in kind.forms:
        words = {word for shape in form.parts.values() for word in shape.split()}
        # Blocks turn inputs of a kernel that is one element; what stands for all other axes is one.
        lengths = _LENGTHS | {"...": 12} | ({"h": 1, "w": 1} if "blocks" in words else {})
        given = {**config, "weight": _shape(form.weight, lengths)}
        given |= {} if form.when is None else {form.when: ["m.0.q.weight"]}
        given |= {"init_weights": "bat"} if "rows" in words else {}
        for parts in (form.parts, {**form.parts, **form.optional}):
            shapes = {part: _shape(shape, lengths) for part, shape in parts.items()}
            shared = {part: _SHARED.get(part, [2, 12]) for part in kind.shared}
            yield {**given, "use_dora": "lora_magnitude_vector" in parts, "parts": shapes, "shared": shared}


def _shape(words: str, lengths: Mapping[str, int]) -> list[int]:
    return [int(word) if word.isdigit() else lengths.get(word, 2) for word in words.split()]


TARGET = Target("adapter", run, seeds, text_mutator(_WORDS.split()))
