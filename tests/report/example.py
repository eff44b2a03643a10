"""A report made up from random numbers, of any size: for tests of what shows reports."""

from __future__ import annotations

import itertools
import random

from weightsmith.architecture.components import component
from weightsmith.report.findings import (
    ENERGIES,
    TOPS,
    Agreement,
    Change,
    Composition,
    Conflict,
    Difference,
    DtypeShare,
    Health,
    Histogram,
    InputFile,
    Kind,
    Layer,
    Merged,
    Model,
    Nonfinite,
    Overlap,
    RecipeFacts,
    RecipeInput,
    Report,
    Rows,
    Sampling,
    Scope,
    Scoped,
    Spectrum,
    Subspace,
    TensorFacts,
    Timing,
    TokenDifference,
    Vocabulary,
)

_LAYER = {
    "input_layernorm.weight": (64,),
    "self_attn.q_proj.weight": (64, 64),
    "self_attn.k_proj.weight": (16, 64),
    "self_attn.v_proj.weight": (16, 64),
    "self_attn.o_proj.weight": (64, 64),
    "post_attention_layernorm.weight": (64,),
    "mlp.gate_proj.weight": (176, 64),
    "mlp.up_proj.weight": (176, 64),
    "mlp.down_proj.weight": (64, 176),
}
_LABELS = ("math", "code", "chat", "law", "medicine", "poetry", "vision", "games")


def example_report(layers: int = 4, models: int = 3, kind: Kind = "models", seed: int = 0) -> Report:
    """Return a report on made-up models of Llama's form; the same for the same arguments.

    Args:
        layers: how many layers they have.
        models: how many there are beside the base, 0 to 8.
        kind: what it is about; a merged one has a result and its composition.
        seed: of its random numbers.
    """
    draw = random.Random(seed)
    labels = _LABELS[:models]
    rows = [
        Layer("before", "before", "", None),
        *(Layer(f"model.layers.{i}", "layer", "model.layers", i) for i in range(layers)),
        Layer("after", "after", "", None),
    ]
    named = [("before", "model.embed_tokens.weight", (512, 64))]
    for i in range(layers):
        named += [(f"model.layers.{i}", f"model.layers.{i}.{name}", shape) for name, shape in _LAYER.items()]
    named += [("after", "model.norm.weight", (64,)), ("after", "lm_head.weight", (512, 64))]
    sides = ("base", *labels, *(("merged",) if kind == "merged" else ()))
    tensors = tuple(
        TensorFacts(name, layer, component(name), shape, dict.fromkeys(sides, "bfloat16"))
        for layer, name, shape in named
    )
    components = tuple(dict.fromkeys(one.component for one in tensors))
    scopes = _scopes(tensors, components)
    pairs = list(itertools.combinations(labels, 2))
    changed = (*labels, *(("merged",) if kind == "merged" else ()))

    def scoped(make):
        return Scoped(**{name: tuple(row for one in found for row in make(one)) for name, found in scopes.items()})

    matrices = [one for one in tensors if one.layer.endswith((".0", f".{layers - 1}")) and len(one.shape) == 2]
    return Report(
        kind=kind,
        version="0.1.0",
        exact=False,
        base=_model("base", tensors, layers),
        base_named=True,
        models=tuple(_model(label, tensors, layers) for label in labels),
        result=_model("merged", tensors, layers) if kind == "merged" else None,
        layers=tuple(rows),
        components=components,
        tensors=tensors,
        changes=scoped(lambda scope: [_change(draw, scope, label, label != "merged") for label in changed]),
        agreements=scoped(lambda scope: [_agreement(draw, scope, *pair) for pair in pairs]),
        conflicts=scoped(
            lambda scope: (
                [Conflict(scope, labels, 10_000, draw.uniform(0, 0.5), draw.uniform(0, 1))] if models > 1 else []
            )
        ),
        overlaps=scoped(
            lambda scope: [
                Overlap(scope, *pair, top, min(1.0, top + draw.uniform(0, 0.3)), top, (top, top))
                for pair in pairs
                for top in TOPS
            ]
        ),
        subspaces=tuple(
            Subspace(one.name, *pair, 16, draw.random(), draw.random(), 16 / one.shape[0], 16 / one.shape[1])
            for one in matrices
            for pair in pairs
        ),
        spectra=tuple(_spectrum(draw, one, label) for one in matrices for label in labels),
        histograms=Scoped(
            total=tuple(_histogram(draw, Scope(), label) for label in labels),
            components=tuple(_histogram(draw, Scope(component=part), label) for part in components for label in labels),
        ),
        health=_health(labels) if labels else Health(),
        composition=scoped(lambda scope: [_composition(draw, scope, labels)]) if kind == "merged" else Scoped(),
        recipe=None if kind == "models" else _recipe(labels),
        merged=_merged() if kind == "merged" else None,
        sampling=(
            Sampling("overlap", "one entry in each of 262,144 stretches of a tensor", 1_000_000, 8_000_000, "entries"),
            Sampling("spectra", "q, v, o and down of the first, middle and last layer", 12, 9 * layers, "matrices"),
        ),
        timings=(Timing("element-wise", 1.5, 123_456_789), Timing("matrices", 0.7, 1_234_567)),
        notes=("model.layers.0.extra.weight is only in chat, and in no figure",),
    )


def _scopes(tensors, components):
    return {
        "total": [Scope()],
        "components": [Scope(component=one) for one in components],
        "layers": [Scope(layer) for layer in dict.fromkeys(one.layer for one in tensors)],
        "cells": [Scope(*cell) for cell in dict.fromkeys((one.layer, one.component) for one in tensors)],
        "tensors": [Scope(one.layer, one.component, one.name) for one in tensors],
    }


def _model(label, tensors, layers):
    return Model(
        label=label,
        reference=f"models/{label}-7b",
        tensors=len(tensors),
        parameters=6_738_415_616,
        nbytes=13_476_831_232,
        dtypes=(DtypeShare("bfloat16", len(tensors), 6_738_415_616, 13_476_831_232),),
        model_type="llama",
        architectures=("LlamaForCausalLM",),
        layers=layers,
        tied=False,
        embedding_rows=512,
        vocabulary=Vocabulary(512, "00112233445566" + ("77" if label != "chat" else "88")),
        computed=False,
    )


def _change(draw, scope, label, votes):
    base, share = draw.uniform(10, 90), draw.uniform(0.001, 0.1)
    return Change(
        scope=scope,
        model=label,
        entries=10_000,
        base_norm=base,
        norm=base * 1.01,
        delta_norm=base * share,
        relative=share,
        changed=draw.uniform(0.5, 1),
        largest=draw.uniform(0.01, 0.2),
        mass=draw.uniform(10, 100),
        against=draw.uniform(0, 0.5) if votes else None,
        cosine_base=1 - share * share / 2,
        delta_cosine_base=draw.uniform(-0.1, 0.1),
    )


def _agreement(draw, scope, first, second):
    # A cosine that is not there must be shown as such.
    cosine = None if scope.component == "norm" and scope.layer is not None else draw.uniform(-0.2, 0.9)
    return Agreement(
        scope=scope,
        first=first,
        second=second,
        entries=10_000,
        cosine=cosine,
        distance=draw.uniform(0.1, 5),
        equal=draw.uniform(0, 0.4),
        both_moved=draw.uniform(0.3, 1),
        same_sign=draw.uniform(0.4, 0.9),
        conflict=draw.uniform(0, 0.5),
    )


def _spectrum(draw, tensor, label):
    rows, columns = tensor.shape
    count = min(rows, columns)
    indices = tuple(sorted({round(count ** (i / 23)) for i in range(24)}))
    decay = draw.uniform(0.3, 1.2)
    return Spectrum(
        tensor=tensor.name,
        layer=tensor.layer,
        component=tensor.component,
        model=label,
        shape=(rows, columns),
        norm=1.0,
        indices=indices,
        values=tuple(i**-decay for i in indices),
        effective_rank=count * draw.uniform(0.2, 0.9),
        stable_rank=draw.uniform(1, 5),
        ranks=(count // 4, count // 2, None),
        energies=ENERGIES,
        computed=count,
        exact=True,
    )


def _histogram(draw, scope, label):
    edges = tuple(2.0 ** (exponent / 2) for exponent in range(-40, -3))
    heights = [draw.uniform(0.5, 1) * 2.0 ** (-abs(i - 24) / 2) for i in range(len(edges) - 1)]
    total = 2 * sum(heights) / 0.9
    shares = tuple(height / total for height in heights)
    return Histogram(
        scope=scope,
        model=label,
        entries=100_000,
        weight=64.0,
        zero=0.1,
        edges=edges,
        positive=shares,
        negative=shares,
        mean=0.0,
        deviation=0.002,
        kurtosis=draw.uniform(-1, 9),
        quantiles=(0.01, 0.005, 0.002),
        tops=TOPS,
    )


def _health(labels):
    first, last = labels[0], labels[-1]
    return Health(
        nonfinite=(Nonfinite(last, "lm_head.weight", 32_768, 3, 1),),
        rows=(
            Rows("base", "model.embed_tokens.weight", 512, 2, (500, 501), 1, ((499, 498),), 0),
            Rows(first, "model.embed_tokens.weight", 512, 4, (500, 501, 502, 503), 0, (), 2),
        ),
        differences=(
            Difference(last, "model.layers.0.extra.weight", "extra", "", "[64]"),
            Difference(first, "lm_head.weight", "dtype", "bfloat16", "float16"),
        ),
        tokens=(TokenDifference(last, 2, 0, 1, ("<|im_start|>", "<|im_end|>", "<pad>")),),
    )


def _composition(draw, scope, labels):
    coefficients = tuple(draw.uniform(0, 0.8) for _ in labels)
    return Composition(
        scope=scope,
        models=labels,
        coefficients=coefficients,
        cosines=tuple(draw.uniform(0.2, 0.9) for _ in labels),
        contributions=tuple(0.9 / len(labels) for _ in labels),
        r_squared=0.9,
        delta_norm=2.0,
        residual_norm=2.0 * 0.1**0.5,
    )


def _recipe(labels):
    return RecipeFacts(
        text="merge_method: ties\nmodels:\n" + "".join(f"- model: models/{label}-7b\n" for label in labels),
        method="ties",
        inputs=tuple(RecipeInput(label, {"weight": "0.5", "density": "0.3"}) for label in labels),
        parameters={"normalize": "true"},
        steps=(),
        dtype="bfloat16",
    )


def _merged():
    return Merged(
        path="merged",
        version="0.1.0",
        arithmetic="numpy",
        written="2026-01-02T03:04:05+00:00",
        files={"model-00001-of-00002.safetensors": 9_000_000_000, "model-00002-of-00002.safetensors": 4_476_831_232},
        inputs=(
            InputFile("models/base-7b/model.safetensors", 13_476_831_232, "same"),
            InputFile("models/math-7b/model.safetensors", 13_476_831_232, "missing"),
        ),
    )
