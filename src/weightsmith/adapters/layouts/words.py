"""Names of modules whose dots were written as underscores, taken apart again.

kohya's layout joins ``down_blocks.0.attn1.to_q`` to ``down_blocks_0_attn1_to_q``. The words below are the names that
diffusers, transformers and the models' first publishers give to the parts of their models; a number follows those that
are lists, and those alone. So nearly every name can be read in one way only; where there are several, or none, the
names of the model itself must decide.
"""

from __future__ import annotations

from functools import lru_cache

# What holds parts that go by numbers.
_LIST_NAMES = (
    # UNets: diffusers, and their first publishers (LDM)
    "down_blocks up_blocks attentions resnets transformer_blocks downsamplers upsamplers net to_out motion_modules "
    "input_blocks middle_block output_blocks in_layers out_layers emb_layers time_embed label_emb out "
    # transformers that denoise: diffusers, Flux, Stable Diffusion 3
    "single_transformer_blocks double_blocks single_blocks joint_blocks img_mlp txt_mlp mlp adaLN_modulation "
    # text encoders: CLIP, OpenCLIP, T5
    "layers block layer resblocks"
)
_PART_NAMES = (
    "mid_block attn attn1 attn2 ff ff_context proj proj_in proj_out proj_mlp to_q to_k to_v to_add_out to_qkv "
    "add_q_proj add_k_proj add_v_proj conv conv1 conv2 conv_in conv_out conv_shortcut conv_norm_out time_emb_proj "
    "time_embedding add_embedding linear_1 linear_2 linear linear1 linear2 norm norm1 norm2 norm3 norm_out "
    "norm1_context norm2_context norm_q norm_k norm_added_q norm_added_k group_norm cond_proj op skip_connection "
    "qkv img_attn txt_attn img_mod txt_mod lin modulation img_in txt_in time_in vector_in guidance_in in_layer "
    "out_layer final_layer x_block context_block x_embedder context_embedder t_embedder y_embedder pos_embed "
    "fc1 fc2 mlp time_text_embed timestep_embedder guidance_embedder text_embedder query_norm key_norm "
    "text_model encoder decoder embeddings token_embedding position_embedding patch_embedding self_attn q_proj "
    "k_proj v_proj out_proj layer_norm1 layer_norm2 layer_norm final_layer_norm text_projection visual_projection "
    "SelfAttention.q SelfAttention.k SelfAttention.v SelfAttention.o DenseReluDense.wi DenseReluDense.wi_0 "
    "DenseReluDense.wi_1 DenseReluDense.wo shared model transformer c_fc c_proj ln_1 ln_2 gate_proj up_proj "
    "down_proj o_proj"
)
_LISTS, _PARTS = frozenset(_LIST_NAMES.split()), frozenset(_PART_NAMES.split())
# Word as it is written with underscores -> as it is.
_WORDS = {word.replace(".", "_"): word for word in _LISTS | _PARTS}
_LONGEST_WORD = max(word.count("_") + 1 for word in _WORDS)
_MOST_TOKENS = 64


@lru_cache(maxsize=65_536)
def readings(name: str) -> tuple[str, ...]:
    """Return the ways in which a name with underscores can be read as one with dots: none, one or two of them.

    Args:
        name: such as ``down_blocks_0_attentions_0_proj_in``.
    """
    tokens = name.split("_")
    if len(tokens) > _MOST_TOKENS:
        return ()
    # For every place: the last word before it -> what all that lies before it can be, two ways at most.
    found: list[dict[str, list[str]]] = [{"": [""]}] + [{} for _ in tokens]
    for place in range(len(tokens)):
        for last, texts in found[place].items():
            for length in range(1, min(_LONGEST_WORD, len(tokens) - place) + 1):
                word = "_".join(tokens[place : place + length])
                if _may_follow(last, word):
                    dotted = _WORDS.get(word, word)
                    known = found[place + length].setdefault(word, [])
                    known += [f"{text}.{dotted}" if text else dotted for text in texts][: 2 - len(known)]
    return tuple(text for last, texts in found[-1].items() if not _needs_number(last) for text in texts)[:2]


def _may_follow(last: str, word: str) -> bool:
    if _is_number(word):
        return last in _LISTS or _is_number(last)
    return word in _WORDS and not _needs_number(last) and f"{last}_{word}" not in _WORDS


def _needs_number(word: str) -> bool:
    return word in _LISTS and word not in _PARTS


def _is_number(word: str) -> bool:
    return word.isascii() and word.isdecimal()
