"""What a folder of weights is: which files hold tensors, and which travel beside them."""

from __future__ import annotations

import atexit
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from weightsmith.checkpoint import torch_distributed, torch_pickle
from weightsmith.checkpoint.checkpoint import Checkpoint, Companions, Identity
from weightsmith.checkpoint.json_text import parse_object
from weightsmith.checkpoint.manifest import MANIFEST_FILE
from weightsmith.checkpoint.safetensors import natural_order, read_header
from weightsmith.checkpoint.storage import (
    PICKLES,
    WEIGHT_FILES,
    check_inside,
    is_file_name,
    is_url,
    join,
    list_folder,
    open_source,
    read_whole,
)
from weightsmith.checkpoint.tensor import Tensor
from weightsmith.errors import CheckpointError, UnsafeFileError, shown

# By this file a folder is a bundle of several models; see weightsmith.bundle.
BUNDLE_FILE = "weightsmith-bundle.json"
# What a transplant of a tokenizer did: not true of what is made of its result.
REPORT_FILE = "transplant-report.json"
# What an extraction lost, likewise.
EXTRACTION_FILE = "weightsmith_extract.json"
# And by this one a diffusers pipeline.
PIPELINE_FILE = "model_index.json"
# Files of a training run that hold no model.
_NOT_WEIGHTS = re.compile(
    r"^(optimizer|scheduler|scaler|rng_state.*|training_args|trainer_state|random_states.*)\.[a-z]+$"
)
# The same weights in their makers' own layout, beside the one that transformers reads.
_SECOND_COPIES = ("consolidated", "original")
_VARIANT = re.compile(r"\.(fp16|fp32|bf16|non_ema)(-\d+-of-\d+)?\.[a-z]+$")
_COMPANION = re.compile(
    r"^(?!README)(?:[\w.-]+\.(?:json|jinja|model|tiktoken|txt|spm|vocab)|vocab\.bpe|bpe\.codes|LICENSE.*|NOTICE.*)$"
)
_WEIGHT_INDEX = re.compile(r"\.(safetensors|bin)\.index(\.[\w-]+)?\.json$")
# An adapter's config beside a whole model would make loaders look for the adapter.
_NOT_COMPANIONS = {
    "config.json",
    REPORT_FILE,
    EXTRACTION_FILE,
    "adapter_config.json",
    "trainer_state.json",
    "training_args.json",
    "all_results.json",
    MANIFEST_FILE,
    BUNDLE_FILE,
}
# One file of weights, of a model or of an adapter (PEFT's, diffusers', MLX-LM's).
_SINGLE = r"(?:(?:pytorch_|diffusion_pytorch_|adapter_)?model|pytorch_lora_weights|adapters)"
# Where the config of an adapter of several models has that of each.
COMPONENTS = "components"
# The models of a diffusers pipeline for which there are adapters.
_COMPONENT = re.compile(r"unet|transformer(_2)?|text_encoder(_[23])?|prior|controlnet")
# Where accelerate puts the model of a sharded run, beside the tokenizer's files.
_SHARDED = "pytorch_model_fsdp_0"
_TEMPLATES = "additional_chat_templates"
_LARGEST_INDEX = 64_000_000
_LARGEST_CONFIG = 16_000_000
_LARGEST_COMPANION = 512_000_000

Found = tuple[dict[str, Tensor], list[Identity]]


def open_weights(path: str, name: str) -> Checkpoint:
    """Open a file or folder of weights, here or behind a URL.

    Args:
        path: the file or folder.
        name: how a person named it.

    Raises:
        CheckpointError: if it does not exist, holds no weights, or cannot be read.
    """
    entries = list_folder(path)
    if not entries:
        return _open_file(path, name)
    if BUNDLE_FILE in entries:
        raise CheckpointError(
            f"{path} is a bundle of several models: name one of them, as {path}#TASK; 'weightsmith bundle inspect "
            f"{path}' lists them"
        )
    if PIPELINE_FILE in entries:
        return _open_pipeline(path, name, entries)
    adapted = _adapted(path, entries)
    if adapted:
        return _open_adapters(path, name, adapted)
    tensors, identities = read_folder(path, entries)
    adapter = not _has_model(entries) and ("adapter_config.json" in entries or _is_adapter(tensors))
    return Checkpoint(
        name, tensors, read_companions(path, entries, adapter=adapter), tuple(identities), is_adapter=adapter
    )


def _is_adapter(tensors: Mapping[str, Tensor]) -> bool:
    # What the names of adapters' tensors are is known where adapters are.
    from weightsmith.adapters.layouts.parts import is_adapter

    return is_adapter(tensors)


def _adapted(path: str, entries: list[str]) -> list[str]:
    """Return the folders of an adapter of several models of a pipeline: one in PEFT's layout for each model."""
    if any(is_weights(entry) for entry in entries):
        return []
    known = [entry for entry in entries if _COMPONENT.fullmatch(entry)]
    return [entry for entry in known if "adapter_config.json" in list_folder(join(path, entry))]


def _open_adapters(path: str, name: str, components: list[str]) -> Checkpoint:
    """Open an adapter of several models: the folder of each prefixes its tensors' names, and holds its config."""
    tensors: dict[str, Tensor] = {}
    identities: list[Identity] = []
    configs = {}
    for entry in components:
        check_inside(path, entry)
        folder = join(path, entry)
        found, facts = read_folder(folder, list_folder(folder))
        tensors |= {f"{entry}/{key}": tensor for key, tensor in found.items()}
        identities += facts
        configs[entry] = _read_json(folder, "adapter_config.json", _LARGEST_CONFIG)
    companions = Companions({COMPONENTS: configs})
    return Checkpoint(name, tensors, companions, tuple(identities), tuple(components), is_adapter=True)


def _has_model(entries: list[str]) -> bool:
    return any(re.match(r"(pytorch_)?model.*\.(safetensors|bin)$", entry) for entry in entries)


def _open_file(path: str, name: str) -> Checkpoint:
    if not is_url(path) and not os.path.exists(path):
        raise CheckpointError(f"there is no file or folder {path}")
    if not is_url(path) and os.path.isdir(path):
        raise CheckpointError(f"the folder {path} is empty")
    tensors, identity = _read_file(path)
    return Checkpoint(name, _ordered(tensors), identities=(identity,), is_adapter=_is_adapter(tensors))


def _open_pipeline(path: str, name: str, entries: list[str]) -> Checkpoint:
    """Open a diffusers pipeline: every folder with weights is a component, and prefixes its tensors' names."""
    tensors: dict[str, Tensor] = {}
    identities: list[Identity] = []
    files = dict(read_companions(path, entries).files)
    components = []
    for entry in entries:
        folder = join(path, entry)
        inner = list_folder(folder)
        if not inner:
            continue
        check_inside(path, entry)
        own = read_companions(folder, inner, with_config=True)
        files |= {f"{entry}/{key}": file for key, file in own.files.items()}
        if any(is_weights(file) for file in inner):
            found, facts = read_folder(folder, inner)
            tensors |= {f"{entry}/{key}": tensor for key, tensor in found.items()}
            identities += facts
            components.append(entry)
    if not components:
        raise CheckpointError(f"{path} is a pipeline without weights: none of its folders holds any")
    return Checkpoint(name, tensors, Companions({}, files), tuple(identities), tuple(components))


def read_folder(path: str, entries: list[str]) -> Found:
    """Read the headers of a folder's weights; safetensors are preferred to pickles of the same model.

    Args:
        path: the folder, here or behind a URL.
        entries: what is in it.

    Returns:
        Its tensors in natural order, and what their files were.

    Raises:
        CheckpointError: if it holds no weights, or they cannot be read.
        UnsafeFileError: if an index or a link leads out of it.
    """
    if torch_distributed.is_distributed(entries):
        return torch_distributed.read_distributed(path)
    for ending in ("safetensors", "bin"):
        candidates = _first_copies([e for e in entries if f".{ending}" in e])
        indexes = [e for e in candidates if _WEIGHT_INDEX.search(e)]
        plain = [e for e in indexes if e.endswith(f".{ending}.index.json")]
        if plain:
            return _read_indexed(path, plain[0])
        single = [e for e in candidates if re.fullmatch(rf"{_SINGLE}\.{ending}", e)]
        if single:
            chosen = next((e for e in single if not e.startswith(("adapter", "pytorch_lora"))), single[0])
            return _read_files(path, [chosen])
        if indexes:
            return _read_indexed(path, indexes[0])
        loose = [e for e in candidates if e.endswith(f".{ending}") and is_weights(e)]
        if ending == "safetensors" and loose:
            return _read_files(path, _one_variant(loose))
    pickles = _first_copies([e for e in entries if is_weights(e)])
    if pickles:
        return _read_files(path, pickles)
    if _SHARDED in entries and torch_distributed.is_distributed(list_folder(join(path, _SHARDED))):
        check_inside(path, _SHARDED)
        return torch_distributed.read_distributed(join(path, _SHARDED))
    shown = ", ".join(entries[:8]) + (" …" if len(entries) > 8 else "")
    # PEFT saves each adapter that is not named default in a folder of its name.
    within = [entry for entry in entries if (Path(path) / entry / "adapter_config.json").is_file()]
    hint = f"; an adapter is in {Path(path) / within[0]}" if within else ""
    raise CheckpointError(f"{path} holds no weights (safetensors or PyTorch); there is: {shown}{hint}")


def is_weights(entry: str) -> bool:
    """Whether a file's name is that of weights, rather than of a training run's state."""
    return entry.endswith(WEIGHT_FILES) and not _NOT_WEIGHTS.match(entry)


def is_companion(name: str) -> bool:
    """Whether a file's name is that of one that travels beside a model's weights and its config."""
    folder, _, file = name.rpartition("/")
    if folder:
        return folder == _TEMPLATES and file.endswith(".jinja") and is_file_name(file)
    if not is_file_name(name) or name in _NOT_COMPANIONS:
        return False
    return _COMPANION.match(name) is not None and _WEIGHT_INDEX.search(name) is None


def one_copy(entries: list[str]) -> list[str]:
    """Return the files of a folder that hold its weights once: no pickles beside safetensors, no second copies."""
    weights = [entry for entry in entries if is_weights(entry)]
    weights = [entry for entry in weights if entry.endswith(".safetensors")] or weights
    return _one_variant(_first_copies(weights)) if weights else []


def _first_copies(files: list[str]) -> list[str]:
    """Leave out the second copies and their indexes, unless there are no other weights."""
    first = [file for file in files if not file.startswith(_SECOND_COPIES)]
    return first if any(is_weights(file) for file in first) else files


def _one_variant(files: list[str]) -> list[str]:
    """Leave out precision variants, and one-file forms beside shards."""
    chosen = min(map(_variant, files))
    files = [file for file in files if _variant(file) == chosen]
    return [file for file in files if re.search(r"-\d+-of-\d+\.", file)] or files


def _variant(file: str) -> str:
    found = _VARIANT.search(file)
    return "" if found is None else found[1]


def _read_indexed(path: str, index: str) -> Found:
    mapping = _read_json(path, index, _LARGEST_INDEX).get("weight_map")
    if not mapping or not isinstance(mapping, dict) or not all(isinstance(file, str) for file in mapping.values()):
        raise CheckpointError(f"{join(path, index)} is not an index: it has no weight_map from names to files")
    files = sorted(set(mapping.values()))
    for file in files:
        if not is_file_name(file):
            raise UnsafeFileError(f"{join(path, index)} names the file {shown(file)}, which is not in its folder")
    tensors, identities = _read_files(path, files)
    for name, file in mapping.items():
        if name not in tensors:
            raise CheckpointError(f"{join(path, index)} says that {shown(name)} is in {file}, and it is not")
    extra = next((name for name in tensors if name not in mapping), None)
    if extra is not None:
        raise CheckpointError(f"{join(path, index)} does not name {shown(extra)}, which is in one of its files")
    return tensors, identities


def _read_files(path: str, files: list[str]) -> Found:
    tensors: dict[str, Tensor] = {}
    homes: dict[str, str] = {}
    identities = []
    for file in files:
        check_inside(path, file)
        found, identity = _read_file(join(path, file))
        identities.append(identity)
        for name, tensor in found.items():
            if name in tensors:
                raise CheckpointError(f"{path}: {shown(name)} is in both {homes[name]} and {file}")
            tensors[name], homes[name] = tensor, file
    return _ordered(tensors), identities


def _read_file(path: str) -> tuple[Mapping[str, Tensor], Identity]:
    source = open_source(path)
    if path.endswith(PICKLES) or bytes(source.read(0, min(source.size, 4))) == b"PK\x03\x04":
        return torch_pickle.read_state_dict(source)
    return read_header(source)


def _ordered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensors[name] for name in sorted(tensors, key=natural_order)}


def _read_json(path: str, file: str, largest: int) -> dict[str, Any]:
    """Read a folder's JSON file that holds an object, here or behind a URL."""
    check_inside(path, file)
    where = join(path, file)
    return parse_object(read_whole(where, largest), where)


def read_companions(path: str, entries: list[str], *, adapter: bool = False, with_config: bool = False) -> Companions:
    """Return what travels beside the weights of a folder.

    Args:
        path: the folder, here or behind a URL.
        entries: what is in it.
        adapter: whether its config is that of an adapter.
        with_config: whether ``config.json`` is carried as a file, as it is.

    Raises:
        CheckpointError: if the config cannot be read.
        UnsafeFileError: if a link leads out of the folder.
    """
    name = "adapter_config.json" if adapter else "config.json"
    # A component's config is carried as it is, but what reads it on the way need not expect nonsense.
    config: Mapping[str, Any] = _read_json(path, name, _LARGEST_CONFIG) if name in entries else {}
    files: dict[str, Path] = {}
    local = local_copies(path)
    for entry in entries:
        if is_companion(entry) or (with_config and entry == "config.json"):
            _carry(files, path, entry, entry, local)
    if _TEMPLATES in entries:
        check_inside(path, _TEMPLATES)
        folder = join(path, _TEMPLATES)
        local = local_copies(folder)
        for entry in list_folder(folder):
            if entry.endswith(".jinja"):
                _carry(files, folder, entry, f"{_TEMPLATES}/{entry}", local)
    return Companions({} if with_config else config, files)


def _carry(files: dict[str, Path], folder: str, entry: str, name: str, local: Callable[[str], Path]) -> None:
    check_inside(folder, entry)
    file = local(entry)
    if file.is_file() and file.stat().st_size <= _LARGEST_COMPANION:
        files[name] = file


def local_copies(path: str) -> Callable[[str], Path]:
    """Return a function from a companion's path in a folder to a file on this machine, fetched where it is remote."""
    if not is_url(path):
        return lambda entry: Path(path).absolute() / entry
    folder = Path(tempfile.mkdtemp(prefix="weightsmith-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)

    def fetch(entry: str) -> Path:
        source = open_source(join(path, entry))
        if source.size <= _LARGEST_COMPANION:
            (folder / entry).parent.mkdir(parents=True, exist_ok=True)
            (folder / entry).write_bytes(source.read(0, source.size))
        return folder / entry

    return fetch
