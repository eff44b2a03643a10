"""Bundles from strangers: whatever their description or parts hold, there is one clear error, and nothing is opened
outside their folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import weightsmith as ws
from conftest import llama_tensors, read_safetensors, write_safetensors
from weightsmith.checkpoint.folder import BUNDLE_FILE
from weightsmith.errors import CheckpointError, UnsafeFileError

NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def make(write_model, tmp_path) -> Callable[..., Path]:
    def make(kind: str = "emr", **options: Any) -> Path:
        base = llama_tensors(0)
        folders = {}
        for seed, task in enumerate(("one", "two"), 1):
            change = llama_tensors(seed, scale=0.1)
            folders[task] = write_model(task, {k: v + change[k] for k, v in base.items()})
        ws.bundle.create(tmp_path / "out", folders, base=write_model("base", base), kind=kind, **options)
        return tmp_path / "out"

    return make


def change(bundle: Path, how: Callable[[Any], Any]) -> None:
    content = json.loads((bundle / BUNDLE_FILE).read_text())
    (bundle / BUNDLE_FILE).write_text(json.dumps(how(content) or content))


def change_part(bundle: Path, part: str, how: Callable[[dict[str, Any]], Any]) -> None:
    file = bundle / part / "model.safetensors"
    tensors = dict(read_safetensors(file))
    how(tensors)
    write_safetensors(file, tensors)


def use(bundle: Path, task: str = "one") -> None:
    """Do with a bundle all that one does."""
    ws.bundle.open(bundle).to_json()
    for tensor in ws.open(bundle, task=task).values():
        tensor.numpy()


def put(*path: Any) -> Callable[[Any], None]:
    """Return what sets a value: keys, and the value last."""

    def how(content: Any) -> None:
        *before, last, value = path
        for key in before:
            content = content[key]
        content[last] = value

    return how


def drop(*path: str) -> Callable[[Any], None]:
    def how(content: Any) -> None:
        *before, last = path
        for key in before:
            content = content[key]
        del content[last]

    return how


TENSOR = ("tasks", "one", "tensors", NAME)

DESCRIPTIONS = {
    "a list": (lambda c: [c], "does not hold a JSON object"),
    "another format": (put("format", 2), "it is of format 2, and this version reads 1"),
    "no format": (drop("format"), "it is of format None"),
    "no kind": (drop("kind"), "kind as None, which is no text"),
    "an unknown kind": (put("kind", "emt"), r"no kind of bundle 'emt' \(did you mean 'emr'\?\)"),
    "a kind as a list": (put("kind", [1]), r"kind as \[1\], which is no text"),
    "unknown parameters": (put("parameters", {"x": 1}), "has no parameter 'x'"),
    "a parameter of another type": (put("parameters", {"rescaler": {"a": []}}), "one of model, tensors is needed"),
    "parameters as a text": (put("parameters", "x"), "parameters as 'x', which is no object"),
    "no tasks": (put("tasks", {}), "it names 0 tasks"),
    "tasks as a list": (put("tasks", []), r"tasks as \[\], which is no object"),
    "a task that leads out": (put("tasks", "../x", {"reference": "", "tensors": {}, "files": {}}), "'../x' cannot be"),
    "a task that is a number": (put("tasks", "one", 3), "the task 'one' is 3"),
    "a task without tensors": (drop("tasks", "one", "tensors"), "tensors as None, which is no object"),
    "a reference of numbers": (put("tasks", "one", "reference", 1), "reference as 1, which is no text"),
    "a base that may be stored": (put("base", "stored", "yes"), "the base is stored: 'yes'; true or false"),
    "no base": (drop("base"), "base as None, which is no object"),
    "a base by reference without hashes": (put("base", {"reference": "b", "stored": False}), "tensors as None"),
    "a hash of other letters": (
        put("base", {"reference": "b", "stored": False, "tensors": {"w": {"dtype": "F32", "shape": [1], "xxh3": "g"}}}),
        "has the hash 'g'",
    ),
    "a dtype that is none": (put(*TENSOR, "dtype", "F33"), "unknown dtype 'F33'"),
    "a dtype that is a map": (put(*TENSOR, "dtype", {}), "unknown dtype"),
    "a negative length": (put(*TENSOR, "shape", [-1, 8]), "lengths are whole numbers from 0"),
    "a shape beyond any file": (put(*TENSOR, "shape", [2**40, 2**40]), "larger than any file"),
    "a shape that is a text": (put(*TENSOR, "shape", "8"), "its shape is '8'"),
    "another shape": (put(*TENSOR, "shape", [8, 16]), r"it is \[8, 16\], and the base's, on which it rests, \[16, 8\]"),
    "another form": (put(*TENSOR, "form", "delta"), "has the form 'delta'; one of base, whole, change"),
    "a form that is not there": (put(*TENSOR, "form", "whole"), "task's part lacks 'whole/model.layers.0"),
    "changes of whole numbers": (put(*TENSOR, "dtype", "I32"), "it is int32, and changes are those of floats"),
    "the base's, in another dtype": (
        lambda c: put(*TENSOR, "form", "base")(c) or put(*TENSOR, "dtype", "F16")(c),
        "to be the base's and float16, and the base's is float32",
    ),
    "a tensor that is nowhere": (
        put("tasks", "one", "tensors", "ghost", {"dtype": "F32", "shape": [2], "form": "change"}),
        "'ghost': it rests on the base's, and the base has none",
    ),
    "a tensor described by a number": (put(*TENSOR, 7), "it is described by 7"),
    "a name of a thousand letters": (put("tasks", "one", "tensors", "x" * 2000, {}), "2,000 characters"),
    "half a character": (put("tasks", "one", "tensors", "\ud800", {}), "not JSON in UTF-8|half a character"),
    "an error that is a text": (put("tasks", "one", "error", "relative", "0"), "relative of an error as '0'"),
    "an error without end": (put("tasks", "one", "error", "largest", float("inf")), "largest of an error as inf"),
    "files as a list": (put("tasks", "one", "files", []), "files as"),
    "a config that is gone": (put("tasks", "one", "files", "config.json", "files/gone"), "cannot open .*gone"),
}
UNSAFE = {
    "a file above": (
        put("tasks", "one", "files", "config.json", "../../secret.json"),
        "'../../secret.json', which is not in",
    ),
    "a file at the root": (
        put("tasks", "one", "files", "tokenizer.json", "/etc/hostname"),
        "'/etc/hostname', which is not",
    ),
    "a file that is a number": (put("tasks", "one", "files", "tokenizer.json", 3), "names the file 3"),
    "a zero byte": (put("tasks", "one", "files", "tokenizer.json", "files/\0"), "which is not in the bundle"),
    "a name above": (put("tasks", "one", "files", "../tokenizer.json", "base/config.json"), "no file that travels"),
    "a name with a way round": (
        put("tasks", "one", "files", "LICENSE/../../x", "base/config.json"),
        "no file that travels",
    ),
    "weights as a file beside": (put("tasks", "one", "files", "model.safetensors", "base/config.json"), "no file that"),
    "a manifest as a file beside": (
        put("tasks", "one", "files", "weightsmith.json", "base/config.json"),
        "no file that",
    ),
    "code": (put("tasks", "one", "files", "run.py", "base/config.json"), "no file that travels"),
}


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_a_description_that_is_not_as_it_must_be_is_refused(make, name):
    how, message = DESCRIPTIONS[name]
    bundle = make()
    change(bundle, how)
    with pytest.raises(CheckpointError, match=message):
        use(bundle)


@pytest.mark.parametrize("name", UNSAFE)
def test_names_never_lead_out_of_the_bundle(make, name):
    how, message = UNSAFE[name]
    bundle = make()
    change(bundle, how)
    with pytest.raises(UnsafeFileError, match=message):
        use(bundle)


@pytest.mark.parametrize("place", ["tasks/one", "shared", "base", "files/own.json", BUNDLE_FILE])
def test_links_out_of_the_bundle_are_refused(make, tmp_path, place):
    bundle = make()
    (bundle / "files").mkdir(exist_ok=True)
    (bundle / "files" / "own.json").write_text("{}")
    change(bundle, put("tasks", "one", "files", "tokenizer.json", "files/own.json"))
    outside = tmp_path / "outside"
    (bundle / place).rename(outside)
    (bundle / place).symlink_to(outside)
    with pytest.raises(UnsafeFileError, match="link out of its folder"):
        ws.bundle.open(bundle).to_json()
    with pytest.raises(UnsafeFileError, match="link out of its folder"):
        ws.open(bundle, task="one")


def test_a_bundle_opens_nothing_of_the_base_that_it_names(make, monkeypatch):
    """Where its base is by reference, the person who opens it says where that is."""
    bundle = make(base_by_reference=True)
    opened: list[str] = []
    monkeypatch.setattr("weightsmith.checkpoint.folder.open_source", lambda path: opened.append(path) or 1 / 0)
    with pytest.raises(CheckpointError, match="name the base as well"):
        ws.bundle.open(bundle)._base("here")
    assert opened == []


def wrong(field: str, values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: tensors.update({field: values})


PARTS = {
    "emr": {
        "a mask too short": (
            "tasks/one",
            wrong(f"mask/{NAME}", np.zeros(15, np.uint8)),
            r"\[15\], and \[16\] is needed",
        ),
        "a mask too long": (
            "tasks/one",
            wrong(f"mask/{NAME}", np.zeros(17, np.uint8)),
            r"\[17\], and \[16\] is needed",
        ),
        "a mask of floats": ("tasks/one", wrong(f"mask/{NAME}", np.zeros(16, np.float32)), "as float32, and uint8"),
        "no mask": ("tasks/one", lambda t: t.pop(f"mask/{NAME}"), "lacks 'mask/model.layers.0.mlp.up_proj.weight'"),
        "no rescaler": ("tasks/one", lambda t: t.pop("rescaler"), "the task's part lacks 'rescaler'"),
        "two rescalers": ("tasks/one", wrong("rescaler", np.ones(2, np.float32)), r"\[2\], and \[\] is needed"),
        "a rescaler that is none": ("tasks/one", wrong("rescaler", np.float32("nan")), "the task's rescaler is nan"),
        "a vector of another shape": ("shared", wrong(f"vector/{NAME}", np.zeros((8, 16), np.float32)), r"\[16, 8\]"),
        "a vector of bytes": ("shared", wrong(f"vector/{NAME}", np.zeros((16, 8), np.uint8)), "as uint8, and floats"),
        "no vector": ("shared", lambda t: t.pop(f"vector/{NAME}"), "the shared part lacks"),
        "a base without it": ("base", lambda t: t.pop(NAME), "the base has none"),
    },
    "bitdelta": {
        "a scale without end": ("tasks/one", wrong(f"scale/{NAME}", np.float32("inf")), "the scale is inf"),
        "a scale per row": ("tasks/one", wrong(f"scale/{NAME}", np.ones(16, np.float32)), r"\[16\], and \[\]"),
        "signs too few": ("tasks/one", wrong(f"sign/{NAME}", np.zeros(1, np.uint8)), r"\[1\], and \[16\]"),
    },
    "tsv": {
        "factors that do not meet": (
            "tasks/one",
            wrong(f"v/{NAME}", np.zeros((3, 8), np.float32)),
            r"\[4, 8\] is needed",
        ),
        "no triples": ("tasks/one", wrong(f"s/{NAME}", np.zeros(0, np.float32)), r"\[0\], and \[any\] is needed"),
        "values as a matrix": ("tasks/one", wrong(f"s/{NAME}", np.zeros((4, 1), np.float32)), r"\[4, 1\], and \[any\]"),
    },
    "rmm": {
        "a basis of another shape": (
            "shared",
            wrong(f"basis/{NAME}", np.zeros((2, 8, 16), np.float32)),
            r"\[any, 16, 8\]",
        ),
        "too many coefficients": ("tasks/one", wrong(f"coefficients/{NAME}", np.zeros(3)), r"\[3\], and \[2\]"),
        "a coefficient that is none": (
            "tasks/one",
            wrong(f"coefficients/{NAME}", np.array([0, np.nan])),
            "NaN or infinite",
        ),
        "coefficients of 32 bits": ("tasks/one", wrong(f"coefficients/{NAME}", np.zeros(2, np.float32)), "and float64"),
    },
    "lossless": {
        "widths beyond a number's": ("tasks/one", wrong("widths/w", np.full(4, 200, np.uint8)), "do not fit its codes"),
        "widths for more bits": ("tasks/one", wrong("widths/w", np.full(4, 16, np.uint8)), "its codes|not fit"),
        "widths too few": ("tasks/one", wrong("widths/w", np.zeros(3, np.uint8)), r"\[3\], and \[4\]"),
        "codes of noughts": (
            "tasks/one",
            lambda t: t.update({"packed/w": t["packed/w"] * 0}),
            "not those of 1,000 numbers",
        ),
        "codes of ones": (
            "tasks/one",
            lambda t: t.update({"packed/w": t["packed/w"] | 255}),
            "not those of 1,000 numbers",
        ),
        "codes cut short": ("tasks/one", lambda t: t.update({"packed/w": t["packed/w"][:-1]}), "are said to lie at"),
        "an end before the beginning": ("tasks/one", wrong("ends/w", np.array([-5])), "are said to lie at 0 to -5"),
        "an end beyond the end": ("tasks/one", wrong("ends/w", np.array([2**62])), "are said to lie at"),
        "two ends": ("tasks/one", wrong("ends/w", np.array([1, 2])), r"\[2\], and \[1\]"),
    },
}


@pytest.fixture
def make_codes(write_model, tmp_path) -> Callable[[], Path]:
    """Return what makes a lossless bundle of one tensor, ``w``, whose changes are small."""

    def make_codes() -> Path:
        base = np.random.default_rng(0).standard_normal(1000).astype(np.float16)
        one = (base + np.float16(0.001)).astype(np.float16)
        folders = {"one": write_model("one", {"w": one})}
        ws.bundle.create(tmp_path / "out", folders, base=write_model("base", {"w": base}), kind="lossless")
        return tmp_path / "out"

    return make_codes


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, cases in PARTS.items() for name in cases])
def test_parts_that_do_not_fit_are_refused_by_name(make, make_codes, kind, name):
    part, how, message = PARTS[kind][name]
    bundle = make_codes() if kind == "lossless" else make(kind)
    change_part(bundle, part, how)
    with pytest.raises(CheckpointError, match=message):
        use(bundle)


def test_a_part_that_is_gone_is_told(make):
    bundle = make()
    (bundle / "tasks" / "one" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="the task's part lacks"):
        use(bundle)
    use(bundle, "two")
