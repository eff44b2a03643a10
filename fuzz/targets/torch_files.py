"""PyTorch files: the zip archive, and the pickle in it."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Sequence
from random import Random

from fuzz.mutate import pickle_mutator
from fuzz.target import Defect, MemorySource, Target, check_tensor
from weightsmith.checkpoint.torch_pickle import read_state_dict
from weightsmith.errors import CheckpointError

_STORAGE = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpuK\x10tQ"
_EMPTY = b"ccollections\nOrderedDict\n)R"
_VIEW = b"ctorch._utils\n_rebuild_tensor_v2\n(" + _STORAGE + b"K\0K\4K\4\x86K\4K\1\x86\x89" + _EMPTY + b"tR"
_GLOBALS = b"torch float32,torch Size,torch FloatStorage,torch.storage UntypedStorage,posix system,builtins getattr"
_GLOBALS += b",torch._utils _rebuild_parameter,torch._utils _rebuild_tensor_v3,collections OrderedDict"
# Whole objects, calls of the table's functions and of others, and instructions with awkward arguments.
_WORDS = (
    *(_STORAGE, _EMPTY, _VIEW),
    *(b"c" + name.replace(b" ", b"\n") + b"\n" for name in _GLOBALS.split(b",")),
    *(bytes([instruction]) for instruction in b"()tRbsu}]20Nea\x81\x85\x86\x88\x93\x94"),
    *(b"K\0", b"K\4", b"J\xff\xff\xff\xff", b"\x8a\x08" + b"\xff" * 7 + b"\x7f", b"G\x7f\xf0\0\0\0\0\0\0"),
    *(b"q\0", b"h\0", b"r\xff\xff\xff\xff", b"j\xff\xff\xff\xff"),
    *(b"\x8c\5model", b"X\1\0\0\0a", b"X\3\0\0\0\xed\xa0\x80"),
)
_pickle_mutator = pickle_mutator(_WORDS)


def run(content: bytes) -> None:
    """Read a file: a whole archive (first byte 0), or a pickle in a good archive with 64 bytes of data."""
    if not content:
        return
    kind, content = content[0], content[1:]
    try:
        tensors, _ = read_state_dict(MemorySource(content if kind == 0 else _archive(content)))
    except CheckpointError as error:
        if len(str(error)) > 5000:
            raise Defect("an error of five thousand characters") from error
        return
    for name, tensor in tensors.items():
        name.encode()
        check_tensor(tensor)


def _archive(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/data/0", bytes(64))
    return file.getvalue()


def mutate(content: bytes, random: Random) -> bytes:
    """Change a pickle by instructions; of an archive, change the few numbers that its directory consists of."""
    if content[:1] != b"\0":
        return _pickle_mutator(content, random)
    changed = bytearray(content)
    for _ in range(random.randint(1, 3)):
        start = random.choice([changed.find(b"PK"), changed.rfind(b"PK"), changed.find(b"PK\1\2")])
        place = min(max(start, 0) + random.randrange(64), len(changed) - 4)
        value = random.choice([0, 1, 255, 2**16 - 1, 2**31, 2**32 - 1, random.randrange(2**32)])
        width = random.choice([1, 2, 4])
        changed[place : place + width] = (value % 256**width).to_bytes(width, "little")
    return bytes(changed)


def seeds() -> Sequence[bytes]:
    """Pickles of state dicts, archives of them, and the oldest attacks."""

    class Attack:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, ("true",)

    one = b"\x80\2}q\0X\1\0\0\0aq\1" + _VIEW + b"s."
    nested = b"\x80\2}X\5\0\0\0model}X\1\0\0\0a" + _VIEW + b"ssX\4\0\0\0step" + b"K\1" + b"s."
    untyped = b"(X\7\0\0\0storagectorch.storage\nUntypedStorage\nX\1\0\0\x000X\3\0\0\0cpuK\x40tQ"
    third = b"\x80\2}X\1\0\0\0actorch._utils\n_rebuild_tensor_v3\n(" + untyped
    third += b"K\0K\2\x85K\1\x85\x89" + _EMPTY + b"ctorch\nbfloat16\ntRs."
    turned = one.replace(b"K\4K\1\x86\x89", b"K\1K\4\x86\x89")
    repeated = one.replace(b"K\4K\1\x86\x89", b"K\0K\1\x86\x89")
    attacks = [pickle.dumps(Attack(), protocol) for protocol in (0, 2, 4)]
    pickles = [one, nested, third, turned, repeated, *attacks, b"\x80\2" + b"]" * 500 + b"."]
    return [*(b"\1" + content for content in pickles), *(b"\0" + _archive(content) for content in (one, nested, third))]


TARGET = Target("torch", run, seeds, mutate)
