"""Recipes, with the files that they include."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from fuzz.mutate import text_mutator
from fuzz.target import Defect, Target, scratch_folder
from weightsmith.errors import RecipeError
from weightsmith.recipe.dump import to_yaml
from weightsmith.recipe.load import load_recipe

_CUT = b"\n#8<\n"
_WORDS = b"""merge_method models model parameters weight value filter scope base_model slices sources layer_range steps
name include variables ${v} &a *a <<: - --- { } [ ] : , | > !!int !!float !!set !!omap !!binary !!timestamp ? 2001-01-01
1:30 0x1f ~ one.yaml ../x.yaml dtype float16 modules tokenizer tokens source kind zero
rules names regex layers passthrough fisher base_fisher"""


def run(content: bytes) -> None:
    """Load a recipe: a text, or, where the first byte is odd, a file and what it includes, cut at a line."""
    if not content:
        return
    try:
        if content[0] % 2:
            first, *included = content[1:].split(_CUT)
            recipe = load_recipe(_write(first, included[:2]))
        else:
            recipe = load_recipe(content[1:].decode("utf-8", "replace") + "\n")
    except RecipeError as error:
        if len(str(error)) > 5000:
            raise Defect("an error of five thousand characters") from error
        return
    text = to_yaml(recipe)
    if to_yaml(load_recipe(text)) != text:
        raise Defect("what was written out is read as something else")


@cache
def _folder() -> Path:
    above = scratch_folder()
    (above / "x.yaml").write_text("dtype: float32\n")
    (above / "recipes").mkdir()
    os.mkfifo(above / "recipes" / "pipe")
    return above / "recipes"


def _write(first: bytes, included: Sequence[bytes]) -> Path:
    for name, content in zip(("one.yaml", "two.yaml"), [*included, b"", b""], strict=False):
        (_folder() / name).write_bytes(content)
    (_folder() / "recipe.yaml").write_bytes(first)
    return _folder() / "recipe.yaml"


def seeds() -> Sequence[bytes]:
    """Recipes of every form, and some that would grow."""
    linear = b"merge_method: linear\nmodels:\n- {model: a, parameters: {weight: 0.3}}\n- {model: b@c+d}\n"
    slices = b"slices:\n- sources: [{model: o, layer_range: [0, 4]}, {model: t, layer_range: [0, 4]}]\n"
    slices += (
        b"  parameters: {t: [{filter: mlp, value: [0, 1]}, {scope: {layers: [0, 2], names: '*q*'}, value: 0.5}]}\n"
    )
    slices += b"merge_method: slerp\nbase_model: {model: {path: o, revision: main}, lora: l}\ndtype: bfloat16\n"
    modules = b"merge_method: linear\nmodules: {text: {models: [{model: a, prefix: m.}]}}\ntokenizer: {source: base,"
    modules += b" tokens: {<x>: {source: {kind: zero}, force: true}}}\nchat_template: auto\nseed: 3\n"
    steps = b"steps: {s: {merge_method: m, models: [{model: x}]}}\nvariables: {v: [1, 2]}\n"
    steps += (
        b"merge_method: ties\nbase_model: s\nmodels: [{model: s, parameters: {w: '${v}'}}]\n---\nname: n\n" + linear
    )
    rules = linear + b"rules:\n- {filter: norm, merge_method: m, parameters: {w: [0, 1]}}\n- {scope: {names: '*e*', "
    rules += b"layers: [0, 2]}, models: [{model: a, parameters: {w: 1}}]}\n- {filter: '*', parameters: {w: 2}}\n"
    laughs = b"a: &a [1, 1, 1]\nb: &b [*a, *a, *a]\nc: {<<: {x: *b}, y: 0x1f, z: 1:30:00.5, d: 2001-01-01}\n"
    odd = b"a: !!set {b, c}\nd: !!omap [e: 1]\nf: !!binary aGk=\ng: !!timestamp 2001-01-01\nh: !!float .inf\n"
    includes = (
        b"include: [one.yaml]\n" + linear + _CUT + b"include: two.yaml\nvariables: {v: 1}" + _CUT + b"dtype: float16"
    )
    return [*(b"\0" + t for t in (linear, slices, modules, steps, rules, laughs, odd)), b"\1" + includes]


TARGET = Target("recipe", run, seeds, text_mutator(_WORDS.split()))
