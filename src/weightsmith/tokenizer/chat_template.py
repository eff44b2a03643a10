"""Chat templates: the Jinja text by which a tokenizer turns messages into a prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from weightsmith.checkpoint.checkpoint import File
from weightsmith.checkpoint.companions import read_companion
from weightsmith.checkpoint.json_text import parse_object
from weightsmith.errors import CheckpointError, PlanError, did_you_mean

_LARGEST = 16_000_000

_ALPACA = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ '### Instruction:\n' + message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ '### Response:\n' + message['content'] + '\n\n' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)
_CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_MISTRAL = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system = messages[0]['content'] + '\n\n' %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}"
    "{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] | trim + eos_token }}"
    "{% else %}{{ raise_exception('after the system message, only user and assistant take turns') }}"
    "{% endif %}{% endfor %}"
)
_EXAONE = (
    "{% if messages[0]['role'] != 'system' %}{{ '[|system|][|endofturn|]\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '[|' + message['role'] + '|]' + message['content'] }}"
    "{{ '\n' if message['role'] == 'user' else '[|endofturn|]\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '[|assistant|]' }}{% endif %}"
)
BUILT_IN = {"alpaca": _ALPACA, "chatml": _CHATML, "llama3": _LLAMA3, "mistral": _MISTRAL, "exaone": _EXAONE}


def choose_template(asked: str | None, templates: Sequence[str | None]) -> str | None:
    """Return the chat template that an output takes, or None to leave its tokenizer's own.

    Args:
        asked: None; ``auto`` for the most common among the models (of equally common ones the first); the name
            of a known format; or the text of a template.
        templates: the models' own, the donor's first.

    Raises:
        PlanError: if what is asked for is a single word and no known format.
    """
    if asked is None:
        return None
    if asked == "auto":
        own = [template for template in templates if template]
        return Counter(own).most_common(1)[0][0] if own else None
    if asked in BUILT_IN:
        return BUILT_IN[asked]
    if "{" not in asked:
        known = ["auto", *BUILT_IN]
        raise PlanError(
            f"chat_template {asked!r} is neither a Jinja template nor a known format"
            f"{did_you_mean(asked, known)}; known are {', '.join(known)}"
        )
    return asked


def read_template(files: Mapping[str, File]) -> str | None:
    """Return a model's chat template, from whichever file holds it, or None.

    Args:
        files: a checkpoint's companion files by name.

    Raises:
        CheckpointError: if ``chat_template.jinja`` cannot be a template. Other files that cannot be read are
            taken to hold none.
    """
    jinja = files.get("chat_template.jinja")
    if jinja is not None:
        try:
            return read_companion(jinja, _LARGEST).decode("utf-8")
        except UnicodeDecodeError as error:
            where = jinja if isinstance(jinja, Path) else "chat_template.jinja"
            raise CheckpointError(f"{where} is no chat template: it is not a text in UTF-8") from error
    for name in ("chat_template.json", "tokenizer_config.json"):
        if name in files:
            template = _json(files[name], name).get("chat_template")
            if isinstance(template, list):
                # A tokenizer with several named templates: the default one.
                template = next((entry.get("template") for entry in template if _is_default(entry)), None)
            if isinstance(template, str):
                return template
    return None


def _is_default(entry: Any) -> bool:
    return isinstance(entry, dict) and entry.get("name") == "default"


def _json(file: File, name: str) -> dict[str, Any]:
    try:
        return parse_object(read_companion(file, _LARGEST), name)
    except CheckpointError:
        return {}
