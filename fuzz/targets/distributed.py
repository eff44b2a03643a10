"""The metadata of a folder of torch.distributed.checkpoint, beside files that it may fit or not."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

from fuzz.mutate import pickle_mutator
from fuzz.target import Defect, Target, check_tensor, only_files_in, scratch_folder
from weightsmith.checkpoint.folder import open_weights
from weightsmith.checkpoint.torch_distributed import METADATA_FILE
from weightsmith.errors import CheckpointError

_HOME = b"ctorch.distributed.checkpoint.metadata\n"
_EMPTY = b"ccollections\nOrderedDict\n)R"
_SIZE = b"ctorch\nSize\n"


def _text(text: str) -> bytes:
    return b"X" + len(text).to_bytes(4, "little") + text.encode()


def _number(number: int) -> bytes:
    return b"J" + number.to_bytes(4, "little", signed=True)


def _shape(*lengths: int) -> bytes:
    return _SIZE + b"(" + b"".join(map(_number, lengths)) + b"t\x85R"


def _record(name: bytes, state: bytes) -> bytes:
    return name + b")\x81" + state + b"b"


def _fields(**fields: bytes) -> bytes:
    return b"}(" + b"".join(_text(name) + value for name, value in fields.items()) + b"u"


_PROPERTIES = _record(_HOME + b"TensorProperties\n", b"(ctorch\nfloat32\nNNNNt")


def _chunk(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> bytes:
    state = _fields(offsets=_shape(*offsets), sizes=_shape(*sizes))
    return _record(_HOME + b"ChunkStorageMetadata\n", state)


def _tensor(shape: tuple[int, ...], *chunks: tuple[tuple[int, ...], tuple[int, ...]]) -> bytes:
    listed = b"](" + b"".join(_chunk(*one) for one in chunks) + b"e"
    state = _fields(properties=_PROPERTIES, size=_shape(*shape), chunks=listed)
    return _record(_HOME + b"TensorStorageMetadata\n", state)


def _place(name: str, offsets: tuple[int, ...], file: str, length: int = 0) -> bytes:
    index = _record(_HOME + b"MetadataIndex\n", _fields(fqn=_text(name), offset=_shape(*offsets)))
    info = _fields(relative_path=_text(file), offset=_number(0), length=_number(length or len(_part())))
    return index + _record(b"ctorch.distributed.checkpoint.filesystem\n_StorageInfo\n", info)


def _metadata(entries: dict[str, bytes], places: Sequence[bytes]) -> bytes:
    tensors = b"}(" + b"".join(_text(name) + entry for name, entry in entries.items()) + b"u"
    paths = b"}(" + b"".join(_text(n) + b"(" + b"".join(map(_text, n.split("."))) + b"t" for n in entries) + b"u"
    stored = b"}(" + b"".join(places) + b"u"
    state = _fields(state_dict_metadata=tensors, planner_data=paths, storage_data=stored)
    return b"\x80\2" + _record(_HOME + b"Metadata\n", state) + b"."


@cache
def _part() -> bytes:
    """Return what torch.save writes of a tensor of two rows of three."""
    content = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpuK\6tQ"
    content = b"\x80\2ctorch._utils\n_rebuild_tensor_v2\n(" + content + b"K\0K\2K\3\x86K\3K\1\x86\x89" + _EMPTY + b"tR."
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/data/0", bytes(range(24)))
    return file.getvalue()


@cache
def _folder() -> Path:
    above = Path(os.path.realpath(scratch_folder()))
    folder = above / "saved"
    folder.mkdir()
    for name in ("__0_0.distcp", "__1_0.distcp"):
        (folder / name).write_bytes(_part())
    (above / "outside.distcp").write_bytes(_part())
    (folder / "link.distcp").symlink_to(above / "outside.distcp")
    os.mkfifo(folder / "pipe.distcp")
    return folder


def run(content: bytes) -> None:
    """Open a folder whose metadata is this; only its own files may be opened, and what was let through is read."""
    folder = _folder()
    (folder / METADATA_FILE).write_bytes(content)
    with only_files_in(folder):
        try:
            found = open_weights(str(folder), "fuzzed")
            for name, tensor in found.items():
                name.encode()
                with suppress(CheckpointError):
                    check_tensor(tensor)
        except CheckpointError as error:
            if len(str(error)) > 5000:
                raise Defect("an error of five thousand characters") from error


def seeds() -> Sequence[bytes]:
    """Whole tensors, tensors in chunks along either axis, with an optimiser, and some that lead elsewhere."""

    class Attack:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, ("true",)

    whole, first, second = ((0, 0), (2, 3)), ((0, 0), (2, 3)), ((2, 0), (2, 3))
    beside = ((0, 3), (2, 3))
    names = ("__0_0.distcp", "__1_0.distcp")
    one = _metadata({"w": _tensor((2, 3), whole)}, [_place("w", (0, 0), names[0])])
    rows = _metadata(
        {"w": _tensor((4, 3), first, second)}, [_place("w", (0, 0), names[0]), _place("w", (2, 0), names[1])]
    )
    columns = _metadata(
        {"model.w": _tensor((2, 6), first, beside), "optim.w": _tensor((2, 3), whole)},
        [_place("model.w", (0, 0), names[0]), _place("model.w", (0, 3), names[1])],
    )
    elsewhere = [
        _metadata({"w": _tensor((2, 3), whole)}, [_place("w", (0, 0), name, 24)])
        for name in ("../outside.distcp", "link.distcp", "pipe.distcp", "none", "/etc/hostname", ".")
    ]
    attacks = [pickle.dumps(Attack(), protocol) for protocol in (0, 2, 4)]
    return [one, rows, columns, *elsewhere, *attacks, b"\x80\2N.", b"\x80\2}."]


_WORDS = (
    *(_PROPERTIES, _chunk((0, 0), (2, 3)), _chunk((0, 1), (2, 2)), _tensor((2, 3), ((0, 0), (2, 3)))),
    *(_HOME + name + b"\n" for name in (b"Metadata", b"MetadataIndex", b"StorageMeta", b"_MEM_FORMAT_ENCODING")),
    *(b"ctorch.serialization\n_get_layout\n", b"cpathlib\nPosixPath\n", b"cos\nsystem\n", b"cbuiltins\ngetattr\n"),
    *(_shape(2, 3), _shape(0), _shape(), _shape(-1, 3), _shape(2**31 - 1, 2**31 - 1), b"ctorch\nint64\n"),
    *(_text("__1_0.distcp"), _text("../outside.distcp"), _text("model"), _text("w"), _EMPTY),
    *(bytes([instruction]) for instruction in b"()tRbsueN]}2\x81\x85\x86\x88"),
    *(_number(0), _number(2), _number(3), _number(2**31 - 1), _number(-1), b"\x8a\x08" + b"\xff" * 7 + b"\x7f"),
)

TARGET = Target("distributed", run, seeds, pickle_mutator(_WORDS))
