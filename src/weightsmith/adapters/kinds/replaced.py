"""Kinds that hold trained rows, norms and biases themselves."""

from __future__ import annotations

import numpy as np

from weightsmith.adapters.change import Added, Rows
from weightsmith.adapters.forms import form
from weightsmith.adapters.layer import Layer
from weightsmith.adapters.registry import parameterization
from weightsmith.adapters.settings import Setting
from weightsmith.checkpoint.tensor import Array


@parameterization(
    "LN_TUNING",
    "LN tuning",
    forms=(form("out ...", tuned="out ...", optional={"tuned.bias": "out"}),),
    aliases={"ln_tuning_layers": "tuned", "ln_tuning_layers.bias": "tuned.bias"},
    changes_bias=lambda layer: "tuned.bias" in layer,
    bias=lambda layer, bias: layer.array("tuned.bias"),
    by_rows=True,
    source="Zhao et al., Tuning LayerNorm in Attention, ICLR 2024, arXiv:2312.11420",
)
def ln_tuning(layer: Layer) -> Rows:
    """LN tuning: trained weights and biases take the place of a norm's, or of any other layer's that PEFT copied."""
    tuned = layer.array("tuned")
    tuned = tuned.reshape(len(tuned), -1)
    return Rows(lambda base, start: tuned[start : start + len(base)], [tuned])


@parameterization(
    "BEFT",
    "BEFT",
    forms=(form("out in", beft_bias="1 out"),),
    changes_bias=lambda layer: True,
    bias=lambda layer, bias: bias + layer.array("beft_bias")[0],
    bias_alone=True,
    source="BEFT: Bias-Efficient Fine-Tuning of Language Models in Low-Data Regimes, 2025, arXiv:2509.15974",
)
def beft(layer: Layer) -> Added:
    """BEFT: ``b + beft_bias``; weights stay as they are. A layer without a bias cannot take it."""
    return Added(lambda start, stop: np.zeros((stop - start, layer.columns)), [])


def _check_tokens(layer: Layer) -> None:
    tokens, held = layer.wholes("token_indices"), layer.length("n")
    if len(tokens) != held:
        raise layer.error(f"the adapter's config names {len(tokens)} tokens (token_indices), and it has {held} rows")
    if len(set(tokens)) < len(tokens):
        raise layer.error("token_indices in adapter_config.json names a token twice")
    if min(tokens) < 0 or max(tokens) >= layer.rows:
        raise layer.error(
            f"token_indices in adapter_config.json names tokens from {min(tokens)} to {max(tokens)}, and 0 to "
            f"{layer.rows - 1} are there"
        )


@parameterization(
    "TRAINABLE_TOKENS",
    "Trainable tokens",
    forms=(form("v d", trainable_tokens_delta="n d"),),
    settings=(Setting("token_indices", "wholes", (), "the tokens whose embeddings were trained, in the rows' order"),),
    check=_check_tokens,
    with_head=True,
    by_rows=True,
    source="PEFT's TrainableTokensConfig",
)
def trainable_tokens(layer: Layer) -> Rows:
    """Trainable tokens: the rows of some tokens are the trained ones (which PEFT calls a delta), the others stay.

    A head that is tied to the embeddings follows them.
    """
    tokens, trained = np.array(layer.wholes("token_indices"), np.int64), layer.array("trainable_tokens_delta")

    def rows(base: Array, start: int) -> Array:
        inside = (tokens >= start) & (tokens < start + len(base))
        changed = base.copy()
        changed[tokens[inside] - start] = trained[inside]
        return changed

    return Rows(rows, [tokens, trained])
