"""Headers of safetensors files."""

from __future__ import annotations

import json
from collections.abc import Sequence

from fuzz.mutate import text_mutator
from fuzz.target import Defect, MemorySource, Target, check_tensor
from weightsmith.checkpoint.safetensors import read_header
from weightsmith.errors import CheckpointError

_WORDS = b'"dtype" "shape" "data_offsets" "__metadata__" "F32" "BF16" "F4" "BOOL" [2,2] [0,16] [16,32] [0,0] 8 16 "a"'


def run(content: bytes) -> None:
    """Read a header: of a whole file (first byte 0), or of one whose length fits and whose data are zeros."""
    if not content:
        return
    kind, content = content[0], content[1:]
    if kind % 4 == 0:
        source = MemorySource(content)
    else:
        source = MemorySource(len(content).to_bytes(8, "little") + content, (0, 8, 16, 32)[kind % 4])
    try:
        tensors, _ = read_header(source)
    except CheckpointError:
        return
    begin = 8 + int.from_bytes(source.read(0, 8), "little")
    if begin + sum(tensor.nbytes for tensor in tensors.values()) != source.size:
        raise Defect("the tensors do not fill the file")
    for name, tensor in tensors.items():
        if name != tensor.name or not begin <= tensor.offset <= source.size - tensor.nbytes:
            raise Defect(f"{name!r} lies outside the file")
        name.encode()
        check_tensor(tensor)


def seeds() -> Sequence[bytes]:
    """Headers of good files, and some that lie."""
    one = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    two = {
        "__metadata__": {"format": "pt", "x": "{}"},
        "model.layers.10.w": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]},
        "model.layers.9.w": {"dtype": "U8", "shape": [8, 1], "data_offsets": [8, 16]},
        "empty": {"dtype": "F64", "shape": [0, 3], "data_offsets": [16, 16]},
    }
    scalar = {"s": {"dtype": "I64", "shape": [], "data_offsets": [0, 8]}}
    headers: list[dict[str, object]] = [{**one}, {**two}, {**scalar}, {}, {"__metadata__": {}}]
    texts = [json.dumps(header).encode() for header in headers]
    wrapped = [bytes([kind]) + text for kind, text in zip((1, 2, 1, 4, 1), texts, strict=True)]
    whole = [b"\0" + len(text).to_bytes(8, "little") + text + bytes(8) for text in texts[:1]]
    claims = [b"\0" + length.to_bytes(8, "little") + b"{}" for length in (2**62, 99_000_000, 2, 0)]
    return [*wrapped, *whole, *claims, b"\1" + b'{"a":' * 2000, b"\1" + texts[0] + b" " * 8]


TARGET = Target("safetensors", run, seeds, text_mutator(_WORDS.split()))
