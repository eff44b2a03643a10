"""The description of a bundle, beside parts of every kind that it may fit or not."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from fuzz.mutate import text_mutator
from fuzz.target import Target, check_tensor, only_files_in, scratch_folder
from weightsmith.bundle import create
from weightsmith.bundle.bundle import Bundle
from weightsmith.bundle.kind import kinds
from weightsmith.checkpoint.checkpoint import Checkpoint
from weightsmith.checkpoint.folder import BUNDLE_FILE
from weightsmith.checkpoint.tensor import ArrayTensor
from weightsmith.errors import CheckpointError

_CASES: tuple[tuple[str, Mapping[str, Any]], ...] = (*((kind, {}) for kind in kinds()), ("rmm", {"rank": 2}))
_NAMES = ("model.layers.0.w.weight", "model.norm.weight")
_WORDS = [
    b'"form"',
    b'"base"',
    b'"whole"',
    b'"change"',
    b'"dtype"',
    b'"shape"',
    b'"F32"',
    b'"F16"',
    b'"I32"',
    b'"files"',
]
_WORDS += [
    b'"one"',
    b'"../outside"',
    b'"tasks"',
    b'"stored"',
    b'"error"',
    b'"largest"',
    b'"rank"',
    b'"centre"',
    b"[12,12]",
]
_WORDS += [
    b'"config.json"',
    b'"tokenizer.json"',
    b'"files/link.json"',
    b'"../outside.json"',
    b'"kind"',
    b'"parameters"',
]
_WORDS += [b'"' + name.encode() + b'"' for name in (*kinds(), *_NAMES)]


def run(content: bytes) -> None:
    """Open a bundle whose description is this, after a byte that says which; only its own files may be opened."""
    folder = _folder(content[0] % len(_CASES) if content else 0)
    (folder / BUNDLE_FILE).write_bytes(content[1:])
    with only_files_in(folder), suppress(CheckpointError):
        _use(Bundle(str(folder)))


def _use(bundle: Bundle) -> None:
    bundle.to_json()
    for task in bundle.tasks:
        try:
            model = bundle.task(task)
        except CheckpointError:
            continue
        for tensor in model.values():
            try:
                check_tensor(tensor)
            except CheckpointError:
                continue


@cache
def _folder(case: int) -> Path:
    kind, parameters = _CASES[case]
    above = Path(os.path.realpath(scratch_folder()))
    rng = np.random.default_rng(0)
    shapes = dict(zip(_NAMES, ((12, 12), (12,)), strict=True))
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}

    def model(name: str, by: float) -> Checkpoint:
        return Checkpoint(name, {key: ArrayTensor(key, value * np.float32(by)) for key, value in tensors.items()})

    tasks = {"one": model("one", 1.001), "two": model("two", 0.999), "three": model("three", 1.002)}
    create(above / "bundle", tasks, base=model("base", 1), kind=kind, threads=1, **parameters)
    (above / "outside.json").write_text("{}")
    shutil.copytree(above / "bundle" / "tasks" / "one", above / "outside")
    (above / "bundle" / "files").mkdir(exist_ok=True)
    (above / "bundle" / "files" / "link.json").symlink_to(above / "outside.json")
    (above / "bundle" / "tasks" / "link").symlink_to(above / "outside")
    return above / "bundle"


@cache
def _descriptions() -> tuple[bytes, ...]:
    return tuple((_folder(case) / BUNDLE_FILE).read_bytes() for case in range(len(_CASES)))


def seeds() -> Sequence[bytes]:
    """A good description of each kind, and some that lead elsewhere."""
    good = [bytes([case]) + content.strip() for case, content in enumerate(_descriptions())]
    text = good[0]
    others = [
        text.replace(b'"files":{}', b'"files":{"config.json":"files/link.json"}'),
        text.replace(b'"files":{}', b'"files":{"config.json":"../outside.json"}'),
        text.replace(b'"one":', b'"link":'),
        text.replace(b'"one":', b'"../outside":'),
        text.replace(b'"stored":true', b'"stored":false,"tensors":{}'),
    ]
    return [*good, *others, b"\0{}", b"\0[]"]


TARGET = Target("bundle", run, seeds, text_mutator(_WORDS))
