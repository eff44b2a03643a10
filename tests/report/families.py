"""Families of made-up models of Llama's form, with the structure that training gives them."""

from __future__ import annotations

import numpy as np

WIDTH, HIDDEN, TOKENS, LAYERS = 64, 96, 80, 4
_LAYER = {
    "input_layernorm.weight": (WIDTH,),
    "self_attn.q_proj.weight": (WIDTH, WIDTH),
    "self_attn.v_proj.weight": (32, WIDTH),
    "self_attn.o_proj.weight": (WIDTH, WIDTH),
    "mlp.up_proj.weight": (HIDDEN, WIDTH),
    "mlp.down_proj.weight": (WIDTH, HIDDEN),
}


def shapes():
    """Return name -> shape of every tensor of these models."""
    named = {"model.embed_tokens.weight": (TOKENS, WIDTH)}
    named |= {f"model.layers.{i}.{name}": shape for i in range(LAYERS) for name, shape in _LAYER.items()}
    return named | {"model.norm.weight": (WIDTH,), "lm_head.weight": (TOKENS, WIDTH)}


def trained(seed):
    """Return a model: random matrices with a few strong directions, and norms near 1."""
    draw = np.random.default_rng(seed)
    model = {}
    for name, shape in shapes().items():
        if len(shape) == 1:
            model[name] = (1.0 + 0.1 * draw.standard_normal(shape)).astype("f4")
            continue
        strong = draw.standard_normal((shape[0], 4)) @ draw.standard_normal((4, shape[1])) / 4
        model[name] = (0.05 * (draw.standard_normal(shape) + strong)).astype("f4")
    return model


def tuned(base, seed, size=0.05, rank=None, only=None, decay=0.0):
    """Return a fine-tune of a model.

    Args:
        base: what it is trained from.
        seed: of its own change.
        size: norm of each tensor's change over the tensor's norm.
        rank: rank of the change of matrices; None for full.
        only: part of the names of the tensors that change; None for all.
        decay: how much of the base training takes away, as weight decay does.
    """
    draw = np.random.default_rng(1000 + seed)
    model = {}
    for name, array in base.items():
        if rank is not None and array.ndim == 2:
            change = draw.standard_normal((array.shape[0], rank)) @ draw.standard_normal((rank, array.shape[1]))
        else:
            change = draw.standard_normal(array.shape)
        change *= size * np.linalg.norm(array) / np.linalg.norm(change)
        moves = only is None or only in name
        model[name] = (array * (1.0 - decay) + change).astype("f4") if moves else array.copy()
    return model


def mixed(base, parts):
    """Return a base plus a weighted sum of task vectors: ``[(model, weight), ...]``."""
    return {
        name: (array + sum(weight * (model[name] - array) for model, weight in parts)).astype("f4")
        for name, array in base.items()
    }


def permuted(model, seed):
    """Return the same network with the hidden units of its MLPs, and values within attention, in another order."""
    draw = np.random.default_rng(seed)
    other = dict(model)
    for i in range(LAYERS):
        for into, out in (("mlp.up_proj", "mlp.down_proj"), ("self_attn.v_proj", "self_attn.o_proj")):
            a, b = f"model.layers.{i}.{into}.weight", f"model.layers.{i}.{out}.weight"
            if out == "self_attn.o_proj":
                continue
            order = draw.permutation(model[a].shape[0])
            other[a], other[b] = model[a][order], model[b][:, order]
    return other
