"""PEFT's config of an adapter: what is read from it, and what it says of a :class:`Network`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from weightsmith.adapters.layouts import parts as p
from weightsmith.adapters.layouts.network import ALPHA_KEYS, LARGEST, Entry, Network
from weightsmith.adapters.layouts.tensors import Renamed
from weightsmith.adapters.patterns import Patterns
from weightsmith.adapters.peft_config import PREFIX
from weightsmith.checkpoint.checkpoint import Checkpoint, Companions
from weightsmith.checkpoint.tensor import Tensor
from weightsmith.errors import CheckpointError, shown


def patterns_of(values: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """Return a default and, for the modules that it is not right for, patterns, as PEFT's configs give them.

    A pattern is also taken for every module whose last parts it names, so modules that it would wrongly be taken for
    are named too, and longer names stand before shorter ones.

    Args:
        values: module -> number; one at least.
    """
    default = Counter(values.values()).most_common(1)[0][0]
    others = {module for module, value in values.items() if value != default}
    ends = {module: {module[i + 1 :] for i, letter in enumerate(module) if letter == "."} for module in values}
    others |= {module for module in values if ends[module] & others}
    ordered = sorted(others, key=lambda module: (-len(module), module))
    return default, {module: values[module] for module in ordered}


def to_config(
    network: Network, entries: Sequence[Entry], names: Mapping[int, str], known: Iterable[str]
) -> dict[str, Any]:
    """Return PEFT's config for some modules of one adapter.

    Args:
        network: the adapter.
        entries: the modules.
        names: id of an entry -> the name of its module in the model.
        known: all modules of the model, as far as they are known.
    """
    kind = network.kind
    targets = [names[id(entry)] for entry in entries if entry.kind is not None]
    config: dict[str, Any] = {"peft_type": kind, "task_type": None, "base_model_name_or_path": None}
    config |= {"inference_mode": True, "target_modules": _targets(targets, known)}
    if "class" in network.hints:
        config["auto_mapping"] = {
            "base_model_class": network.hints["class"],
            "parent_library": network.hints["library"],
        }
    if kind in ALPHA_KEYS and targets:
        scaled = [entry for entry in entries if entry.kind is not None]
        ranks = {names[id(entry)]: float(entry.rank or _whole_rank(entry)) for entry in scaled}
        alphas = {
            name: ranks[name] if entry.alpha is None or entry.rank is None else entry.alpha
            for entry, name in ((entry, names[id(entry)]) for entry in scaled)
        }
        rank, rank_pattern = patterns_of(ranks)
        alpha, alpha_pattern = patterns_of(alphas)
        config |= {"r": int(rank), ALPHA_KEYS[kind]: _plain(alpha)}
        config["rank_pattern"] = {name: int(value) for name, value in rank_pattern.items()}
        config["alpha_pattern"] = {name: _plain(value) for name, value in alpha_pattern.items()}
    held = {part for entry in entries for part in entry.parts}
    if kind == "LORA":
        config |= {"bias": "none", "fan_in_fan_out": False, "use_rslora": False}
        config |= {"use_dora": p.MAGNITUDE in held, "lora_bias": "lora_B.bias" in held}
    if kind == "LOHA":
        config["use_effective_conv2d"] = "hada_t1" in held
    if kind == "LOKR":
        config["use_effective_conv2d"] = "lokr_t2" in held
        config["decompose_both"] = "lokr_w1_a" in held
        config["decompose_factor"] = _factor(entries)
    if kind == "IA3":
        on_input = [names[id(entry)] for entry in entries if entry.parts["ia3_l"].shape[0] == 1]
        config["feedforward_modules"] = on_input
    return config


def _targets(targets: Sequence[str], known: Iterable[str]) -> list[str] | str:
    """Return modules as PEFT's config names them: PEFT also takes a name for all modules that end in it."""
    chosen = set(targets)
    wrong = any(
        module not in chosen and any(module[i + 1 :] in chosen for i, letter in enumerate(module) if letter == ".")
        for module in known
    )
    if not wrong:
        return sorted(chosen)
    return "(" + "|".join(target.replace(".", r"\.") for target in sorted(chosen)) + ")"


def _plain(value: float) -> float:
    return int(value) if float(value).is_integer() and abs(value) < 2**53 else value


def _whole_rank(entry: Entry) -> int:
    """Return a rank for which PEFT makes whole factors, as these are."""
    return max(max(tensor.shape, default=1) for tensor in entry.parts.values())


def _factor(entries: Sequence[Entry]) -> int:
    """Return the factor by which PEFT divides all layers as LoKr's factors divide these; -1 if there is none."""
    pairs = [sides for entry in entries for sides in _sides(entry)]
    for factor in [-1, *sorted({left for left, _ in pairs})]:
        if all(divide(left * right, factor) == (left, right) for left, right in pairs):
            return factor
    return -1


def _sides(entry: Entry) -> list[tuple[int, int]]:
    """Return what the out and the in side of a layer are divided into."""
    parts = entry.parts
    if "lokr_t2" in parts:
        second = (parts["lokr_w2_a"].shape[1], parts["lokr_w2_b"].shape[1])
    elif "lokr_w2" in parts:
        second = (parts["lokr_w2"].shape[0], parts["lokr_w2"].shape[1])
    elif "lokr_w2_a" in parts:
        second = (parts["lokr_w2_a"].shape[0], parts["lokr_w2_b"].shape[1])
    else:
        return []
    if "lokr_w1" in parts:
        first = (parts["lokr_w1"].shape[0], parts["lokr_w1"].shape[1])
    elif "lokr_w1_a" in parts:
        first = (parts["lokr_w1_a"].shape[0], parts["lokr_w1_b"].shape[1])
    else:
        return []
    return [(first[0], second[0]), (first[1], second[1])]


def divide(length: int, factor: int) -> tuple[int, int]:
    """Return the two factors into which LyCORIS and PEFT divide the side of a layer, the smaller first.

    Args:
        length: the side.
        factor: the smaller one, where it divides the side; -1 for factors as near to each other as can be.
    """
    if factor > 0 and length % factor == 0:
        return min(factor, length // factor), max(factor, length // factor)
    most = length if factor == -1 else factor
    small = next(one for one in range(min(most, math.isqrt(length)), 0, -1) if length % one == 0)
    return small, length // small


def to_checkpoint(
    network: Network, place: Mapping[int, str], config: Mapping[str, Any], source: Checkpoint
) -> Checkpoint:
    """Return an adapter in the normal form: PEFT's names and config.

    Args:
        network: the adapter.
        place: id of an entry -> the name of its module in the base.
        config: its config.
        source: what it was read from.
    """
    tensors: dict[str, Tensor] = {}
    for entry in network.entries:
        for part, tensor in entry.parts.items():
            name = f"{PREFIX}{place[id(entry)]}.{part}"
            tensors[name] = Renamed(tensor, name)
    for (_, inner), tensor in network.plain.items():
        tensors[PREFIX + inner] = Renamed(tensor, PREFIX + inner)
    return Checkpoint(
        source.name, tensors, Companions(config, source.companions.files), source.identities, (), is_adapter=True
    )


# What a config may say that bears on what the adapter does, and that no other layout can say.
_ONLY_PEFT = {
    "alora_invocation_tokens": "acts on some tokens alone",
    "layer_replication": "replicates layers",
    "trainable_token_indices": "trains single tokens",
    "use_qalora": "groups the inputs (QA-LoRA)",
    "use_bdlora": "has factors of blocks (BD-LoRA)",
    "target_parameters": "changes bare parameters",
    "fan_in_fan_out": "changes layers that are stored as [in, out]",
}


def from_config(checkpoint: Checkpoint, entries: Iterator[Entry], config: Mapping[str, Any], kind: str) -> None:
    """Give every module the alpha that a PEFT config has for it.

    Raises:
        CheckpointError: if the config says what cannot be, or what does not fit the tensors.
    """
    owner = checkpoint.name
    rank, alpha = _number(owner, config, "r", 8), _number(owner, config, ALPHA_KEYS[kind], 8)
    ranks, alphas = _patterns(owner, config, "rank_pattern"), _patterns(owner, config, "alpha_pattern")
    for entry in entries:
        held = entry.rank
        stated = ranks.value(entry.module, rank)
        if held is not None and stated != held:
            raise CheckpointError(
                f"{owner}: the config gives {entry.module} rank {stated}, and its factors have {held}"
            )
        value = alphas.value(entry.module, alpha)
        if config.get("use_rslora") and held:
            # alpha / sqrt(rank), said with another alpha.
            value = value / math.sqrt(held) * held
        if held is None and value != stated:
            raise CheckpointError(
                f"{owner}: {entry.module} has whole factors, scaled by {value / stated if stated else value}; other "
                "layouts have no scale for such"
            )
        entry.alpha = value


def refuse_only_peft(owner: str, config: Mapping[str, Any]) -> None:
    """Refuse a config that says what no other layout can say.

    Raises:
        CheckpointError: with the reason.
    """
    for key, what in _ONLY_PEFT.items():
        if config.get(key):
            raise CheckpointError(f"{owner} {what} ({key} in its config), which PEFT's layout alone can say")


def _number(owner: str, config: Mapping[str, Any], key: str, default: float) -> float:
    value = config.get(key, default)
    # Written so, NaN and whole numbers beyond a float's range are refused as well.
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < LARGEST:
        raise CheckpointError(f"{owner}: its config gives {key} as {shown(value)}, which is no number")
    return value


def _patterns(owner: str, config: Mapping[str, Any], key: str) -> Patterns:
    patterns = config.get(key) or {}
    if not isinstance(patterns, Mapping):
        raise CheckpointError(f"{owner}: its config gives {key} as {shown(patterns)}, which is no map")
    values = {str(pattern): _number(owner, patterns, pattern, 0) for pattern in patterns}
    try:
        return Patterns(values)
    except CheckpointError as error:
        raise CheckpointError(f"{owner}: {key} in its config: {error}") from error
