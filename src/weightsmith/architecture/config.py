"""What a model's config says of its layers, dtype and tied weights, and how it changes with them."""

from __future__ import annotations

import copy
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

from weightsmith.architecture.stacks import LAYER_COUNTS, Architecture, Stack
from weightsmith.errors import PlanError

# Part of a config -> how the names of its tensors begin. Parts that are not listed go by their own name.
_TOWERS = {
    "vision": "vision|visual|image|vit",
    "text": "text|language|llm",
    "llm": "text|language|llm",
    "language": "text|language|llm",
    "audio": "audio|speech",
}
# Parts that speak of the layers of a model that names no tower: the text model is the model itself there.
_DEFAULT = frozenset({"text", "llm", "language"})
_APART = re.compile(r"vision|visual|image|audio|speech")
# A count with such a word in its key is that of a stack with the word in its prefix.
_QUALIFIERS = ("encoder", "decoder", "single")
# Lists that may be as long as there are layers by chance alone.
_NOT_PER_LAYER = re.compile(
    r"^(architectures|\w*token_ids?|\w*_section|\w*_(mean|std)|\w*labels?|out_features|stage_names)$"
)
# Lists of numbers of layers.
_NUMBERS = re.compile(r"^(mlp_only_layers|moe_layers|cross_attention_layers|\w+_(idxs|indexes|indices|layer_ids))$")
# Of those, the ones whose length other weights depend on.
_TAPS = re.compile(r"^(deepstack|out_)\w+$")
# Numbers that make every n-th layer another kind.
_PERIODS = (
    "sliding_window_pattern",
    "full_attention_interval",
    "global_attn_every_n_layers",
    "attn_layer_period",
    "expert_layer_period",
    "decoder_sparse_step",
    "interleave_moe_layer_step",
    "moe_layer_freq",
)
# Those that have no effect where layer_types lists the kinds.
_OF_ATTENTION = _PERIODS[:3]
# Keys of the number of rows that embeddings and head have.
_ROWS = ("vocab_size", "padded_vocab_size", "n_vocab")
# Layers that predict further tokens: they lie behind the others, and are counted by themselves.
_EXTRA = "num_nextn_predict_layers"
# The output head, under no number.
_HEAD = re.compile(
    r"^(?P<outer>([a-z_]+\.)*?)(lm_head|lm_head\.decoder|embed_out|output|output_layer|cls\.predictions\.decoder"
    r"|proj_out|vocab_projector)\.weight$"
)
# One table under several names, as T5, BART and their kin keep it.
_SHARED = ("shared.weight", "decoder.embed_tokens.weight", "encoder.embed_tokens.weight")
# Embeddings a head may be tied to, the likeliest first.
_EMBEDDINGS = (
    "shared",
    "decoder.embed_tokens",
    "embed_tokens",
    "wte",
    "word_embeddings",
    "tok_embeddings",
    "embed_in",
    "backbone.embeddings",
)
# Whose configs may leave the tie out, because it is their default: transformers 4 did not write it then.
_TIED_BY_DEFAULT = re.compile(
    r"albert|bart|bert|big_bird|bigbird_pegasus|biogpt|blenderbot(-small)?|bloom|camembert|cohere2?|convbert|ctrl"
    r"|deberta(-v2)?|distilbert|electra|ernie|falcon(_mamba)?|gemma[23]?|gemma3_text|gemma3n(_text)?|gpt-sw3|gpt2"
    r"|gpt_bigcode|gpt_neo|gpt_neox_japanese|led|lfm2|longformer|longt5|m2m_100|mamba|marian|mbart|mobilebert|modernbert"
    r"|moonshine|mpnet|mpt|mt5|mvp|openai-gpt|opt|paligemma|pegasus(_x)?|plbart|pop2piano|prophetnet|recurrent_gemma"
    r"|roberta|roformer|smollm3|speech_to_text|squeezebert|starcoder2|switch_transformers|t5|umt5|whisper|xglm|xlm"
    r"|xlm-roberta(-xl)?|xlnet|zamba2?"
)


def with_layers(
    config: Mapping[str, Any], stack: Stack, picked: Sequence[int], architecture: Architecture
) -> tuple[dict[str, Any], list[str]]:
    """Return the config of a model whose layers were put together anew, and what a person should know.

    Args:
        config: the donor's config.
        stack: the donor's stack that was changed.
        picked: for every new layer, the number of the donor's layer whose settings it takes, counted from 0
            among the layers that are there.
        architecture: the donor's layers.
    """
    changed = copy.deepcopy(dict(config))
    count, span, new = len(stack.indices), stack.indices[-1] + 1, len(picked)
    if count == span and tuple(picked) == tuple(range(count)):
        return changed, []
    _tell_apart(changed, architecture)
    keys = list(_count_keys(changed, stack, architecture))
    notes = []
    if not keys and new != count:
        notes.append(f"the config has no key with the old number of layers, {count}, so it still says what it said")
    restacked: set[int] = set()
    for holder, key in keys:
        old = holder[key]
        apart = old not in (count, span)
        if id(holder) not in restacked:
            # Numbers as the config counts: it may still count layers that were pruned away.
            sources = [stack.indices[rank] if old == span and rank < count else rank for rank in picked]
            notes += _restack(holder, old, sources)
            notes += _restack_ends(holder, old, sources, _ENDS if apart else _ENDS[:1])
            restacked.add(id(holder))
        holder[key] = new - holder[_EXTRA] if apart else new
    return changed, list(dict.fromkeys(notes))


def _tell_apart(config: dict[str, Any], architecture: Architecture) -> None:
    """Write out the decoder's count where the encoder's stands for both, as in T5's first configs."""
    both = all(any(word in one.prefix for one in architecture.stacks) for word in ("encoder", "decoder"))
    if both and isinstance(config.get("num_layers"), int) and "decoder_layers" not in config:
        config.setdefault("num_decoder_layers", config["num_layers"])


def _count_keys(
    config: dict[str, Any], stack: Stack, architecture: Architecture
) -> Iterator[tuple[dict[str, Any], str]]:
    """Find the keys that count a stack's layers: by their value, in the part of the config that is nearest."""
    sizes = {len(stack.indices), stack.indices[-1] + 1}
    several = len(architecture.stacks) > 1
    found = []
    for fitness, holder in _holders(config, stack.prefix):
        extra = holder.get(_EXTRA)
        keys = [key for key in LAYER_COUNTS if _is_count(holder.get(key), sizes, extra)]
        if several:
            keys = _qualified(keys, stack.prefix)
        if keys:
            found.append((fitness, holder, keys))
    best = max((fitness for fitness, _, _ in found), default=None)
    for fitness, holder, keys in found:
        if fitness == best:
            yield from ((holder, key) for key in keys)


def _is_count(value: object, sizes: set[int], extra: object) -> bool:
    if type(value) is not int:
        return False
    return value in sizes or (type(extra) is int and value + extra in sizes)


def _qualified(keys: Sequence[str], prefix: str) -> list[str]:
    """Keep the keys whose words are the stack's, or else those that have none."""

    def words(text: str) -> set[str]:
        return {word for word in _QUALIFIERS if word in text}

    own = [key for key in keys if words(key) & words(prefix)]
    return own or [key for key in keys if not words(key)]


def _holders(config: dict[str, Any], prefix: str) -> list[tuple[tuple[int, int], dict[str, Any]]]:
    """Return the parts of a config that may be about a stack or tensor, with how well they fit; the whole fits least.

    Args:
        config: the whole config.
        prefix: the stack's prefix, or the tensor's name.
    """

    def visit(holder: dict[str, Any], depth: int, earliest: int) -> Iterator[tuple[tuple[int, int], dict[str, Any]]]:
        yield (depth, -earliest), holder
        for part, value in holder.items():
            if not isinstance(value, dict):
                continue
            stem = part.removesuffix("_config")
            match = re.search(_TOWERS.get(stem, re.escape(stem)), prefix)
            if match:
                yield from visit(value, depth + 1, match.start())
            elif stem in _DEFAULT:
                yield from visit(value, depth, earliest)

    holders = list(visit(config, 0, 0))
    if _APART.search(prefix) and any(depth for (depth, _), _ in holders):
        # A number of another tower may have the same value.
        return [(fitness, holder) for fitness, holder in holders if fitness[0]]
    return holders


def _restack(holder: dict[str, Any], count: int, sources: Sequence[int]) -> list[str]:
    """Put the settings that a config keeps per layer into the new order, and say which it cannot express."""
    notes = []
    for name, value in holder.items():
        if isinstance(value, list) and _NUMBERS.match(name) and _are_numbers(value):
            if _TAPS.match(name):
                notes.append(f"{name} names layers by their number, and was left as it is")
            else:
                holder[name] = [number for number, source in enumerate(sources) if source in value]
        elif isinstance(value, list) and len(value) == count > 0 and not _NOT_PER_LAYER.match(name):
            holder[name] = [value[min(source, count - 1)] for source in sources]
    if isinstance(holder.get("max_window_layers"), int):
        holder["max_window_layers"] = min(holder["max_window_layers"], len(sources))
    for name in _PERIODS:
        period = holder.get(name)
        moot = name in _OF_ATTENTION and "layer_types" in holder
        if isinstance(period, int) and period > 1 and not moot and any((s - i) % period for i, s in enumerate(sources)):
            notes.append(f"{name}: {period} makes layers differ by their number, and some have another number now")
    return notes


def _are_numbers(value: list[Any]) -> bool:
    return all(type(entry) is int for entry in value) and value == sorted(set(value))


# Counts of layers at an end that are of another kind than the rest -> whether they come first.
_ENDS = (("first_k_dense_replace", True), (_EXTRA, False))


def _restack_ends(
    holder: dict[str, Any], count: int, sources: Sequence[int], ends: Sequence[tuple[str, bool]]
) -> list[str]:
    """Count anew the layers of another kind at either end, and say so if they do not lie at the end any more."""
    notes = []
    for name, first in ends:
        special = holder.get(name)
        if not isinstance(special, int) or special < 1:
            continue
        kinds = [source < special if first else count <= source < count + special for source in sources]
        if kinds != sorted(kinds, reverse=first):
            end = "first" if first else "last"
            notes.append(f"{name}: {special} counts {end} layers of another kind, and they are not the {end} any more")
        holder[name] = sum(kinds)
    return notes


def with_rows(config: Mapping[str, Any], tables: Mapping[str, tuple[int, int]]) -> tuple[dict[str, Any], list[str]]:
    """Return the config of a model whose tables of tokens have another number of rows, and what a person should know.

    Args:
        config: the donor's config.
        tables: embedding or head -> the rows it has in the donor, and now.

    Raises:
        PlanError: if tables that a config gives one length have several now: no model could load them.
    """
    changed = copy.deepcopy(dict(config))
    found: dict[tuple[int, str], tuple[dict[str, Any], str, int]] = {}
    notes = []
    for name, (before, now) in tables.items():
        places = [
            (holder, key) for _, holder in _holders(changed, name) for key in _ROWS if _same(holder.get(key), before)
        ]
        for holder, key in places:
            _, first, rows = found.setdefault((id(holder), key), (holder, name, now))
            if rows != now:
                raise PlanError(
                    f"{first} has {rows} rows in the result and {name} has {now}, and a model has one {key}: take both "
                    "from the same models, or bring them to one length with on_shape_mismatch: pad or crop"
                )
        if not places and before != now:
            notes.append(f"{name} has {now} rows instead of {before}, and the config has no vocab_size of {before}")
    for (_, key), (holder, _, now) in found.items():
        holder[key] = now
    return changed, notes


def row_counts(config: Mapping[str, Any]) -> Iterator[int]:
    """Yield the numbers of rows that a config, or a part of it, gives to embeddings and head."""
    for key, value in config.items():
        if key in _ROWS and type(value) is int:
            yield value
        elif isinstance(value, Mapping):
            yield from row_counts(value)


def _same(value: object, number: int) -> bool:
    return type(value) is int and value == number


def with_dtype(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the config with the dtype of its weights, under whichever of the two keys it uses.

    transformers wrote ``torch_dtype`` until its version 5, and reads both. Parts of the config say it only
    where they did. diffusers writes neither, and takes an unknown key for a mistake.
    """
    changed = _dtype_in(config, name)
    if not {"dtype", "torch_dtype", "_class_name"} & set(config):
        changed["torch_dtype"] = name
    return changed


def _dtype_in(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    parts = {
        part: _dtype_in(value, name)
        for part, value in config.items()
        if isinstance(value, dict) and part != "quantization_config"
    }
    return {**config, **parts, **{key: name for key in ("dtype", "torch_dtype") if key in config}}


def tied_embeddings(config: Mapping[str, Any]) -> bool:
    """Whether the config ties the output head to the embeddings."""
    own = config.get("tie_word_embeddings")
    text = config.get("text_config")
    if own is None and isinstance(text, Mapping):
        own = text.get("tie_word_embeddings")
    if own is None:
        own = _TIED_BY_DEFAULT.fullmatch(str(config.get("model_type")))
    return bool(own)


def untie(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of a model whose output head is its own."""
    changed = {**config, "tie_word_embeddings": False}
    text = changed.get("text_config")
    if isinstance(text, dict) and "tie_word_embeddings" in text:
        changed["text_config"] = {**text, "tie_word_embeddings": False}
    return changed


def alias_source(name: str, names: Container[str]) -> str | None:
    """Return the tensor that a missing one is another name of, or None.

    Encoder and decoder of T5, BART and their kin look tokens up in one table, which files hold under any of its
    names. That is so whatever the config ties: it speaks of the head alone.

    Args:
        name: the name of the missing tensor, such as ``encoder.embed_tokens.weight``.
        names: the names that the model has.
    """
    for outer in ("", "model."):
        aliases = [outer + alias for alias in _SHARED]
        if name in aliases:
            return next((alias for alias in aliases if alias in names and alias != name), None)
    return None


def is_head(name: str) -> bool:
    """Whether a tensor is the weight by which a model gives each token its chance."""
    return _HEAD.match(name) is not None


def tied_source(name: str, names: Iterable[str]) -> str | None:
    """Return the embeddings that a missing head is tied to, or None.

    Args:
        name: the name of the missing tensor, such as ``lm_head.weight``.
        names: the names that the model has.
    """
    match = _HEAD.match(name)
    if match is None:
        return None
    outer = match["outer"]
    inside = [one for one in names if one.startswith(outer) and one.endswith(".weight") and one != name]
    for embedding in _EMBEDDINGS:
        ending = f"{embedding}.weight"
        for one in inside:
            if one == ending or one.endswith(f".{ending}"):
                return one
    return None
