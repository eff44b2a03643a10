"""Where an adapter's tensors go so that PEFT finds them: keys, and the settings of ``adapter_config.json``."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weightsmith.adapters.peft_config import PREFIX
from weightsmith.architecture.config import is_head, tied_embeddings, tied_source
from weightsmith.checkpoint.reference import parse_reference
from weightsmith.errors import RecipeError
from weightsmith.extraction.modules import Modules

# What the name of an architecture says of the task that PEFT is told of.
_TASKS = (
    ("ForSequenceClassification", "SEQ_CLS"),
    ("ForTokenClassification", "TOKEN_CLS"),
    ("ForQuestionAnswering", "QUESTION_ANS"),
    ("ForCausalLM", "CAUSAL_LM"),
    ("LMHeadModel", "CAUSAL_LM"),
)
# Encoders and decoders whose inputs are no tokens: of that task, PEFT hands a model tokens, which they do not take.
_NO_TOKENS = re.compile(r"Whisper|Speech|Moonshine|Pop2Piano|Pix2Struct")
# Architectures that give every token a chance.
_WITH_HEAD = re.compile(r"(LMHeadModel|For(CausalLM|MaskedLM|ConditionalGeneration|PreTraining|Generation))")
# The modules that PEFT adds to modules_to_save for a task, by the ends of their names; it then needs their tensors.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def task_type(config: Mapping[str, Any]) -> str | None:
    """Return PEFT's name of a model's task, or None where the architecture tells of none that PEFT knows."""
    name = _architecture(config)
    if name.endswith("ForConditionalGeneration") and config.get("is_encoder_decoder"):
        return None if _NO_TOKENS.match(name) else "SEQ_2_SEQ_LM"
    return next((task for ending, task in _TASKS if name.endswith(ending)), None)


def _architecture(config: Mapping[str, Any]) -> str:
    architectures = config.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else ""
    return first if isinstance(first, str) else ""


def in_head(name: str, task: str | None) -> bool:
    """Whether a tensor belongs to a module that PEFT keeps whole for a task, whatever the config says."""
    endings = _HEADS.get(task or "", ())
    words = name.split(".")[:-1]
    return any(word.endswith(endings) for word in words) if endings else False


@dataclass(frozen=True)
class Placement:
    """Where the tensors go that are kept whole.

    Attributes:
        keys: tensor name -> key in the adapter.
        modules: the modules that the config lists as ``modules_to_save``.
        biases: whether biases of adapted layers are among the tensors.
    """

    keys: Mapping[str, str]
    modules: tuple[str, ...]
    biases: bool


def place(
    whole: Sequence[str],
    targets: Collection[str],
    modules: Modules,
    sizes: Mapping[str, int],
    task: str | None,
    apart: Collection[str] = (),
) -> Placement:
    """Decide how tensors are kept that are stored as they are.

    A module that is trained otherwise is kept with all its tensors and listed in ``modules_to_save``, as PEFT does.
    PEFT looks for such modules by the ends of names and takes over every one that fits, and it knows no single tensors
    of modules that hold others: where either stands in the way, or most of the module is as it was, the key is that of
    the tensor in the model, which PEFT loads into the base's own place, as it does with trained biases.

    Args:
        whole: the tensors.
        targets: the modules that have low-rank or sparse parts.
        modules: the model's modules.
        sizes: all tensors of the model, and the bytes of each.
        task: PEFT's name of the model's task: its head is kept anyway, and need not be listed.
        apart: tensors whose modules must not be listed: those that are left out, say.

    Returns:
        Keys for the tensors, and for the others of modules that are kept.
    """
    own: dict[str, list[str]] = {}
    for name in sizes:
        own.setdefault(name.rpartition(".")[0], []).append(name)
    changed, barred = set(whole), {name.rpartition(".")[0] for name in apart}
    keys: dict[str, str] = {}
    kept: dict[str, None] = {}
    biases = False
    for name in whole:
        module, _, leaf = name.rpartition(".")
        if module in targets:
            keys[name] = f"{PREFIX}{module}.base_layer.{leaf}"
            biases = biases or leaf == "bias"
        elif in_head(name, task):
            keys[name] = PREFIX + name
        elif (
            module not in barred
            and sum(sizes[other] if other in changed else -sizes[other] for other in own[module]) >= 0
            and _stands_alone(module, targets, modules.paths)
        ):
            kept[module] = None
            keys |= {other: PREFIX + other for other in own[module]}
        else:
            keys[name] = PREFIX + name
    return Placement(keys, tuple(kept), biases)


def _stands_alone(module: str, targets: Collection[str], paths: Collection[str]) -> bool:
    """Whether ``modules_to_save`` can list a module: no other's name ends like its own, and it holds no others."""
    if not module:
        return False
    if any(f".{module}." in f".{target}." for target in targets):
        return False
    return not any((path.endswith(module) and path != module) or path.startswith(f"{module}.") for path in paths)


def target_names(targets: Collection[str], paths: Collection[str]) -> list[str] | str:
    """Return ``target_modules``: the last parts of names where these fit no other module, else whole names.

    Args:
        targets: the modules.
        paths: all modules.
    """
    by_last: dict[str, list[str]] = {}
    for path in paths:
        by_last.setdefault(path.rpartition(".")[2], []).append(path)
    found: dict[str, None] = {}
    for target in targets:
        last = target.rpartition(".")[2]
        short = not last.isdigit() and all(path in targets for path in by_last.get(last, ()))
        found[last if short else target] = None
    if any(path not in targets and _reaches(found, path) for path in paths):
        # A whole name that another ends with: only a pattern tells the two apart.
        return "|".join(re.escape(target) for target in targets)
    return list(found)


def _reaches(listed: Collection[str], path: str) -> bool:
    words = path.split(".")
    return any(".".join(words[place:]) in listed for place in range(len(words)))


@dataclass(frozen=True)
class Tie:
    """An embedding that the head of a model is tied to, and which its file holds under one name alone.

    Attributes:
        embedding: the tensor.
        head: the head's module, where PEFT ties low-rank factors of both; None where it does not.
    """

    embedding: str
    head: str | None


def find_tie(names: Collection[str], config: Mapping[str, Any]) -> Tie | None:
    """Return the tie between embeddings and head, or None where there is none or the file holds both.

    Args:
        names: the tensors of the model.
        config: its config.
    """
    architecture = _architecture(config)
    if not tied_embeddings(config) or any(map(is_head, names)) or not _WITH_HEAD.search(architecture):
        return None
    source = tied_source("lm_head.weight", names)
    if source is None:
        return None
    ties = architecture.endswith(("ForCausalLM", "LMHeadModel")) and not config.get("is_encoder_decoder")
    return Tie(source, "lm_head" if ties else None)


def base_of(reference: str) -> dict[str, str | None]:
    """Return how the config names the base."""
    try:
        parsed = parse_reference(reference)
    except RecipeError:
        return {"base_model_name_or_path": reference, "revision": None}
    if parsed.adapters or parsed.task is not None:
        return {"base_model_name_or_path": reference, "revision": None}
    return {"base_model_name_or_path": parsed.path, "revision": parsed.revision}
