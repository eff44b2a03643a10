"""Configs of adapters, and the patterns in them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

import numpy as np

from fuzz.mutate import text_mutator
from fuzz.target import Defect, Target, check_tensor
from weightsmith.adapters.fold import fold
from weightsmith.adapters.patterns import Patterns
from weightsmith.checkpoint.checkpoint import Checkpoint, Companions
from weightsmith.checkpoint.json_text import parse_object
from weightsmith.checkpoint.tensor import ArrayTensor
from weightsmith.errors import CheckpointError, PlanError

_WORDS = b'"peft_type" "LORA" "r" "lora_alpha" "rank_pattern" "alpha_pattern" "q" "layers.0.q" "use_rslora" 2 4 { } : ,'
_WORDS += b" ( ) (?: | * + ? {2} {,3} {1,2} \\. \\d \\w [a-c] [^.] ^ $ a b . .*"
_BASE = Checkpoint("base", {"m.0.q.weight": ArrayTensor("m.0.q.weight", np.ones((4, 3), np.float32))})
_FACTORS = {"m.0.q.lora_A.weight": np.ones((2, 3), np.float32), "m.0.q.lora_B.weight": np.ones((4, 2), np.float32)}


def run(content: bytes) -> None:
    """Fold an adapter with this config, or, where the first byte is odd, match a pattern beside Python's engine."""
    if content and content[0] % 2:
        _compare(content[1:13].decode("latin-1"), content[13:40].decode("latin-1"))
        return
    try:
        config = parse_object(content[1:], "adapter_config.json")
        tensors = {name: ArrayTensor(name, array) for name, array in _FACTORS.items()}
        folded = fold(_BASE, Checkpoint("adapter", tensors, Companions(config), is_adapter=True))
    except (CheckpointError, PlanError):
        return
    check_tensor(folded["m.0.q.weight"])


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
    """Configs as PEFT writes them, and pairs of a module's name, of twelve letters, and a pattern."""
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_rslora": False, "fan_in_fan_out": False}
    configs = [config, {**config, "rank_pattern": {"q": 2, r".*\.q": 3}, "alpha_pattern": {"0.q": 8.5}}]
    configs += [{**config, "use_dora": True}, {**config, "rank_pattern": {"(a+)+b": 2}}]
    pairs = ["m.layers.0.q" + p for p in ("q", r".*\.q", "(a|q)+", r"layers\.\d+\.q", "[a-q]{1,3}$", "^m.*?q", "(.?)*")]
    return [*(b"\0" + json.dumps(c).encode() for c in configs), *(b"\1" + pair.encode() for pair in pairs)]


TARGET = Target("adapter", run, seeds, text_mutator(_WORDS.split()))
