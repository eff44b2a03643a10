"""What a tensor is for, as finely as reports show it: the gate of an MLP is another thing than its way down."""

from __future__ import annotations

import re

from weightsmith.architecture.stacks import role

# All components, in the order in which a token meets them.
COMPONENTS = (
    "embedding",
    "norm",
    "attention_q",
    "attention_k",
    "attention_v",
    "attention_qkv",
    "attention_o",
    "attention",
    "router",
    "mlp_gate",
    "mlp_up",
    "mlp_down",
    "mlp",
    "expert_gate",
    "expert_up",
    "expert_down",
    "expert",
    "conv",
    "other",
    "head",
)
# Tables of tokens and their heads: their rows are those of a vocabulary, not of the model's own width.
TOKEN_TABLES = frozenset({"embedding", "head"})
_FUSED = re.compile(r"(^|[._])(qkv|in_proj|c_attn|query_key_value|Wqkv|qkv_proj)(_weight|_bias)?([._]|$)")
_OUT = re.compile(r"(^|[._])(attn|attention)\.proj(\.|$)")
# PyTorch's own transformer names its MLP by number alone.
_PLAIN = re.compile(r"(^|\.)linear[12](\.|$)")
# Where the names of architectures differ: w1, w3 and w2 are gate, up and down in Llama's own files and in Mixtral;
# fc1 and fc2, c_fc and c_proj, wi and wo, and BERT's intermediate and output are the ways up and down.
_PARTS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (part, re.compile(pattern))
    for part, pattern in (
        ("up", r"(^|[._])(gate_up_proj|gate_and_up_proj)([._]|$)"),
        ("gate", r"(^|[._])(gate_proj|gate_projs|w1|wi_0|linear_v|gate)([._]|$)"),
        ("down", r"(^|[._])(down_proj|w2|wo|fc2|lin2|linear2|linear_2|c_proj|dense_4h_to_h|fc_out|output)([._]|$)"),
        (
            "up",
            r"(^|[._])(up_proj|w3|wi|wi_1|fc1|lin1|linear1|linear_1|c_fc|dense_h_to_4h|fc_in|intermediate)([._]|$)",
        ),
        # Feed-forward blocks of diffusers: net.0.proj goes up, net.2 down.
        ("up", r"\.net\.0\.proj(\.|$)"),
        ("down", r"\.net\.2(\.|$)"),
    )
)


def component(name: str) -> str:
    """Return what a tensor is for, as far as its name tells: one of :data:`COMPONENTS`.

    It is finer than :func:`weightsmith.architecture.stacks.role`: fused projections of queries, keys and values are
    ``attention_qkv``, and the matrices of an MLP or an expert are its gate, its way up and its way down. A matrix
    that holds gate and way up together counts as the way up.

    Args:
        name: the tensor's name.
    """
    known = role(name)
    if known == "attention" and _FUSED.search(name):
        return "attention_qkv"
    if known == "attention" and _OUT.search(name):
        return "attention_o"
    if known == "other" and _PLAIN.search(name):
        known = "mlp"
    if known in ("mlp", "expert"):
        part = next((part for part, pattern in _PARTS if pattern.search(name)), None)
        return known if part is None else f"{known}_{part}"
    return known
