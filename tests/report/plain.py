"""Reports on models in memory, measured by plain whole-tensor arithmetic in float64: for tests of what reads reports."""

from __future__ import annotations

import itertools
import math

import numpy as np

from weightsmith.architecture.components import component
from weightsmith.report.findings import (
    ENERGIES,
    TOPS,
    Agreement,
    Change,
    Composition,
    Conflict,
    DtypeShare,
    Health,
    Histogram,
    Layer,
    Model,
    Nonfinite,
    Overlap,
    RecipeFacts,
    RecipeInput,
    Report,
    Scope,
    Scoped,
    Spectrum,
    TensorFacts,
)


def measured(base, models, result=None, kind="models", recipe=None, health=None, base_named=True, spectra=()):
    """Return a report on models that all have the same tensors, with those tables that conclusions are drawn from.

    Args:
        base: name of tensor -> array.
        models: label -> such a model.
        result: the merged model, for a merged folder.
        kind: what the report is about.
        recipe: method and parameters of each model, for a report of a recipe.
        health: tables of its health beside counts of NaN.
        base_named: whether a person named the base.
        spectra: names of the matrices whose singular values are taken.
    """
    everything = {"base": base, **models, **({} if result is None else {"merged": result})}
    good = {name: np.all([np.isfinite(model[name]) for model in everything.values()], axis=0) for name in base}
    flat = {
        label: {name: np.asarray(model[name], "f8")[good[name]] for name in base} for label, model in everything.items()
    }
    facts = tuple(TensorFacts(name, _layer(name).key, component(name), base[name].shape, {}) for name in base)
    taus = {label: {name: flat[label][name] - flat["base"][name] for name in base} for label in everything}
    scopes = _scopes(facts)

    def joined(arrays, names):
        return np.concatenate([arrays[name] for name in names])

    def scoped(make, tables):
        return Scoped(**{table: tuple(r for s, names in scopes[table] for r in make(s, names)) for table in tables})

    pairs = list(itertools.combinations(models, 2))
    nonfinite = tuple(
        Nonfinite(label, name, array.size, int(np.isnan(array).sum()), int(np.isinf(array).sum()))
        for label, model in everything.items()
        for name, array in model.items()
        if not np.all(np.isfinite(array))
    )
    return Report(
        kind="merged" if result is not None else kind,
        version="0",
        exact=True,
        base=_model("base", base),
        base_named=base_named,
        models=tuple(_model(label, model) for label, model in models.items()),
        result=None if result is None else _model("merged", result),
        layers=tuple(dict.fromkeys(_layer(name) for name in base)),
        components=tuple(dict.fromkeys(one.component for one in facts)),
        tensors=facts,
        changes=scoped(
            lambda scope, names: [
                _change(scope, label, joined(flat["base"], names), joined(flat[label], names))
                for label in everything
                if label != "base"
            ],
            ("total", "components", "layers", "tensors"),
        ),
        agreements=scoped(
            lambda scope, names: [_agreement(scope, *p, *(joined(taus[one], names) for one in p)) for p in pairs],
            ("total", "layers", "tensors"),
        ),
        conflicts=scoped(
            lambda scope, names: (
                [_conflict(scope, tuple(models), np.stack([joined(taus[one], names) for one in models]))]
                if len(models) > 1
                else []
            ),
            ("total", "layers"),
        ),
        overlaps=scoped(
            lambda scope, names: [_overlap(scope, p, taus, names, top) for p in pairs for top in TOPS], ("total",)
        ),
        subspaces=(),
        spectra=tuple(
            _spectrum(one, label, (models[label][one.name] - base[one.name]).reshape(one.shape[0], -1))
            for one in facts
            if one.name in spectra
            for label in models
        ),
        histograms=scoped(
            lambda scope, names: [_histogram(scope, label, joined(taus[label], names)) for label in models], ("total",)
        ),
        health=health or Health(nonfinite=nonfinite),
        composition=(
            Scoped()
            if result is None
            else scoped(
                lambda scope, names: [
                    _composition(
                        scope,
                        tuple(models),
                        np.stack([joined(taus[one], names) for one in models]),
                        joined(taus["merged"], names),
                    )
                ],
                ("total", "layers"),
            )
        ),
        recipe=None if recipe is None else _recipe(*recipe),
    )


def _layer(name):
    parts = name.split(".")
    if "layers" in parts:
        place = parts.index("layers")
        stack = ".".join(parts[: place + 1])
        return Layer(f"{stack}.{parts[place + 1]}", "layer", stack, int(parts[place + 1]))
    where = "before" if "embed" in name else "after"
    return Layer(where, where, "", None)


def _scopes(facts):
    def grouped(key):
        found = {}
        for one in facts:
            found.setdefault(key(one), []).append(one.name)
        return list(found.items())

    return {
        "total": [(Scope(), [one.name for one in facts])],
        "components": grouped(lambda one: Scope(component=one.component)),
        "layers": grouped(lambda one: Scope(one.layer)),
        "cells": grouped(lambda one: Scope(one.layer, one.component)),
        "tensors": grouped(lambda one: Scope(one.layer, one.component, one.name)),
    }


def _model(label, tensors):
    size = sum(array.size for array in tensors.values())
    return Model(
        label,
        f"models/{label}",
        len(tensors),
        size,
        4 * size,
        (DtypeShare("float32", len(tensors), size, 4 * size),),
        "llama",
        ("LlamaForCausalLM",),
        4,
        False,
        None,
        None,
        False,
    )


def _cosine(a, b):
    size = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / size) if size else None


def _share(part, whole):
    return float(np.sum(part) / np.sum(whole)) if np.sum(whole) else None


def _change(scope, label, base, model):
    tau = model - base
    norm = float(np.linalg.norm(base))
    return Change(
        scope=scope,
        model=label,
        entries=tau.size,
        base_norm=norm,
        norm=float(np.linalg.norm(model)),
        delta_norm=float(np.linalg.norm(tau)),
        relative=float(np.linalg.norm(tau)) / norm if norm else None,
        changed=float(np.mean(tau != 0)),
        largest=float(np.max(np.abs(tau))),
        mass=float(np.sum(np.abs(tau))),
        against=None,
        cosine_base=_cosine(model, base),
        delta_cosine_base=_cosine(tau, base),
    )


def _agreement(scope, first, second, a, b):
    both = (a != 0) & (b != 0)
    return Agreement(
        scope=scope,
        first=first,
        second=second,
        entries=a.size,
        cosine=_cosine(a, b),
        distance=float(np.linalg.norm(a - b)),
        equal=float(np.mean(a == b)),
        both_moved=float(np.mean(both)),
        same_sign=_share((a * b > 0), both),
        conflict=_mass(np.stack([a, b])),
    )


def _mass(taus):
    positive, negative = np.maximum(taus, 0).sum(0), np.maximum(-taus, 0).sum(0)
    return _share(np.minimum(positive, negative), positive + negative)


def _conflict(scope, labels, taus):
    moved = (taus != 0).sum(0) >= 2
    return Conflict(
        scope, labels, taus.shape[1], _mass(taus), _share((taus > 0).any(0) & (taus < 0).any(0) & moved, moved)
    )


def _overlap(scope, pair, taus, names, top):
    both, least, sizes = 0, 0, [0, 0]
    for name in names:
        sets = []
        for label in pair:
            magnitudes = np.abs(taus[label][name])
            k = math.ceil(top * magnitudes.size)
            sets.append((magnitudes >= np.sort(magnitudes)[-k]) & (magnitudes > 0))
        both += int((sets[0] & sets[1]).sum())
        least += min(int(one.sum()) for one in sets)
        sizes = [size + int(one.sum()) for size, one in zip(sizes, sets, strict=True)]
    entries = sum(taus[pair[0]][name].size for name in names)
    shares = tuple(size / entries for size in sizes)
    return Overlap(scope, *pair, top, both / least if least else None, max(shares), shares)


def _spectrum(fact, label, tau):
    values = np.linalg.svd(tau, compute_uv=False)
    energy = np.cumsum(values**2) / np.sum(values**2) if np.any(values) else np.ones_like(values)
    return Spectrum(
        tensor=fact.name,
        layer=fact.layer,
        component=fact.component,
        model=label,
        shape=tau.shape,
        norm=float(np.linalg.norm(tau)),
        indices=tuple(range(1, len(values) + 1)),
        values=tuple(map(float, values)),
        effective_rank=1.0,
        stable_rank=1.0,
        ranks=tuple(int(np.searchsorted(energy, one - 1e-12) + 1) for one in ENERGIES),
        energies=ENERGIES,
        computed=len(values),
        exact=True,
    )


def _histogram(scope, label, tau):
    magnitudes = np.sort(np.abs(tau))[::-1]
    return Histogram(
        scope=scope,
        model=label,
        entries=tau.size,
        weight=1.0,
        zero=float(np.mean(tau == 0)),
        edges=(),
        positive=(),
        negative=(),
        mean=float(np.mean(tau)),
        deviation=float(np.std(tau)),
        kurtosis=0.0,
        quantiles=tuple(float(magnitudes[math.ceil(top * tau.size) - 1]) for top in TOPS),
        tops=TOPS,
    )


def _composition(scope, labels, taus, d):
    coefficients = np.linalg.lstsq(taus.T, d, rcond=None)[0]
    fitted, square = coefficients @ taus, float(d @ d)
    return Composition(
        scope=scope,
        models=labels,
        coefficients=tuple(map(float, coefficients)),
        cosines=tuple(_cosine(d, tau) for tau in taus),
        contributions=tuple(
            float(c * (d @ tau)) / square if square else None for c, tau in zip(coefficients, taus, strict=True)
        ),
        r_squared=float(d @ fitted) / square if square else None,
        delta_norm=math.sqrt(square),
        residual_norm=float(np.linalg.norm(d - fitted)),
    )


def _recipe(method, inputs, parameters):
    return RecipeFacts(
        text=f"merge_method: {method}\n",
        method=method,
        inputs=tuple(RecipeInput(label, given) for label, given in inputs.items()),
        parameters=parameters,
        steps=(),
        dtype="",
    )
