"""Indexes of sharded models, in a real folder with files beside it that they must not reach."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

from fuzz.mutate import text_mutator
from fuzz.target import Defect, Target, only_files_in, scratch_folder
from weightsmith.checkpoint.folder import open_weights
from weightsmith.errors import CheckpointError

_SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
_WORDS = [b'"weight_map"', b'"metadata"', b'"a"', b'"b"', b'"../outside.safetensors"', b'"link.safetensors"', b'"pipe"']
_WORDS += [b'"' + name.encode() + b'"' for name in _SHARDS] + [b'"/etc/passwd"', b'"a\\u0000b"', b'"."', b'":"', b'","']


def run(content: bytes) -> None:
    """Open a folder whose index holds these bytes; only files in that folder may be opened."""
    folder = _folder()
    (folder / "model.safetensors.index.json").write_bytes(content[1:])
    with only_files_in(folder), suppress(CheckpointError):
        found = open_weights(str(folder), "fuzzed")
        if not set(found) <= {"a", "b"}:
            raise Defect(f"the model is said to hold {list(found)}")


@cache
def _folder() -> Path:
    above = Path(os.path.realpath(scratch_folder()))
    folder = above / "model"
    folder.mkdir()
    for name, file in zip("abc", (*_SHARDS, "../outside.safetensors"), strict=True):
        text = json.dumps({name: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
        (folder / file).write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    (folder / "link.safetensors").symlink_to(above / "outside.safetensors")
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")
    return folder


def seeds() -> Sequence[bytes]:
    """A good index, and some that lead elsewhere."""
    good = {"metadata": {"total_size": 16}, "weight_map": {"a": _SHARDS[0], "b": _SHARDS[1]}}
    others = ["../outside.safetensors", "link.safetensors", "pipe", "loop", "a\0b", "\ud800", "x" * 300, "."]
    texts = [json.dumps({"weight_map": {"a": file}}) for file in others]
    return [b"\0" + text.encode() for text in (json.dumps(good), *texts, "[]", "{}", '{"weight_map": []}')]


TARGET = Target("index", run, seeds, text_mutator(_WORDS))
