"""The files of a tokenizer that was made: what loads it reads this tokenizer, and no older one beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from weightsmith.checkpoint.checkpoint import File
from weightsmith.checkpoint.companions import tokenizer_files
from weightsmith.tokenizer.tokenizer import Tokenizer

# The class that takes tokenizer.json as it is, in transformers 4 and 5. Others build their own normalizer and
# pre-tokenizer around the vocabulary that they find there.
_AS_IT_IS = "PreTrainedTokenizerFast"
# Classes that do what tokenizer.json cannot say: tokens of languages and tasks, boxes of a layout.
_OF_THEIR_OWN = re.compile(
    r"^(Nllb|MBart50|MBart|M2M100|Whisper|SeamlessM4T|PLBart|LayoutLM\w*|LayoutXLM|Udop|MarkupLM|Tapas|CodeLlama|Luke|MLuke"
    r"|Wav2Vec2\w*|Speech2Text|SpeechT5|Nougat|Marian|Qwen2VL)Tokenizer(Fast)?$"
)
# Classes of models that tell two texts apart by token_type_ids.
_TYPES = re.compile(
    r"^(Albert|Bert|BigBird|Canine|ConvBert|Deberta|DebertaV2|Electra|Ernie\w*|FNet|Funnel|Herbert|Lxmert|MegatronBert"
    r"|MobileBert|Nystromformer|RemBert|RoFormer|RoCBert|SqueezeBert|XLNet)Tokenizer(Fast)?$"
)
# Which transformers 5 always loads by a class of their own, whatever tokenizer_config.json says.
_FORCED = re.compile(r"^(qwen2|qwen3_5(_moe)?(_text)?|qwen4_exp|siglip2|hyperclovax_vision_v2)$")
_KEPT = re.compile(r"^(chat_template\..*|additional_chat_templates/.*|special_tokens_map\.json)$")
_STALE = ("added_tokens_decoder", "auto_map", "from_slow", "merges_file", "slow_tokenizer_class", "vocab_file")
_OF_ADDED = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")


def files_of(
    tokenizer: Tokenizer, files: Mapping[str, File], config: Mapping[str, Any], *, rebuilt: bool
) -> tuple[dict[str, File], list[str]]:
    """Return the files of a tokenizer that is not the one that a model came with, and what a person should know.

    ``tokenizer.json`` and ``tokenizer_config.json`` are made, chat templates and the map of special tokens kept.
    ``vocab.json``, ``merges.txt``, ``tokenizer.model`` and the like are left out: they describe the tokenizer that was
    there before. The same tokenizer always gives the same bytes.

    Args:
        tokenizer: the tokenizer; ``settings`` are those of the model that it was made from.
        files: the files beside that model's weights.
        config: the config of the model that it is for.
        rebuilt: whether normalizer and pre-tokenizer may be others than those of the config's kind of model.
    """
    settings = {key: value for key, value in tokenizer.settings.items() if key not in _STALE}
    added = {
        int(entry["id"]): {key: entry[key] for key in _OF_ADDED if key in entry} for entry in tokenizer.added.values()
    }
    settings["added_tokens_decoder"] = {str(number): added[number] for number in sorted(added)}
    notes = []
    own = settings.get("tokenizer_class")
    if isinstance(own, str) and _OF_THEIR_OWN.match(own):
        notes.append(
            f"the tokenizer keeps its class {own}, which does more than tokenizer.json says; transformers 5 builds its "
            "normalizer and pre-tokenizer anew, so compare what it encodes"
        )
    else:
        types = isinstance(own, str) and _TYPES.match(own)
        names = ["input_ids", *(["token_type_ids"] if types else []), "attention_mask"]
        settings.setdefault("model_input_names", names)
        settings["tokenizer_class"] = _AS_IT_IS
    kind = config.get("model_type")
    if rebuilt and isinstance(kind, str) and _FORCED.match(kind):
        notes.append(
            f"transformers 5 loads the tokenizer of every model of type {kind} by that type's own class, with its own "
            "pre-tokenizer, whatever tokenizer_config.json says: load it as PreTrainedTokenizerFast.from_pretrained"
        )
    made: dict[str, File] = {name: file for name, file in tokenizer_files(files).items() if _KEPT.match(name)}
    made["tokenizer.json"] = _text(tokenizer.content, None)
    made["tokenizer_config.json"] = _text(settings, 2)
    return made, notes


def _text(content: Mapping[str, Any], indent: int | None) -> bytes:
    # Half a character, which no UTF-8 can hold, is written as JSON escapes it.
    return json.dumps(content, ensure_ascii=False, indent=indent).encode("utf-8", "backslashreplace")
