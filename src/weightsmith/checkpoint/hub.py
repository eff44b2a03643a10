"""Models named by their id on a hub: the local cache first, then a download, by huggingface_hub."""

from __future__ import annotations

import re
from pathlib import Path

from weightsmith.checkpoint.folder import BUNDLE_FILE, is_weights, one_copy
from weightsmith.checkpoint.manifest import manifest_of
from weightsmith.checkpoint.storage import WEIGHT_FILES
from weightsmith.errors import CheckpointError

_ID = re.compile(r"^[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?$")
_TEXTS = ["*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "*.spm", "*.vocab", "*.bpe", "*.codes"]
_TEXTS += ["LICENSE*", "NOTICE*"]
# A bundle keeps the files of its models in a folder, their names after a hash.
_TEXTS += ["files/*-LICENSE*", "files/*-NOTICE*"]
_PIPELINE = "model_index.json"
_SHARD = re.compile(r"-(\d+)-of-(\d+)\.[a-z]+$")


def is_hub_id(path: str) -> bool:
    """Whether this could be ``name`` or ``organisation/name`` on a hub."""
    return _ID.match(path) is not None and not path.endswith(WEIGHT_FILES)


def resolve(model: str, revision: str | None) -> str:
    """Return the local folder of a hub model, downloading it if the cache lacks it.

    Cache, token, endpoint and offline mode are huggingface_hub's own (``HF_HOME``, ``HF_TOKEN``,
    ``HF_ENDPOINT``, ``HF_HUB_OFFLINE``). One copy of the weights is fetched: safetensors, and pickles only where
    there are none; code never is.

    Args:
        model: the id.
        revision: a branch, tag or commit; by default the main branch.

    Raises:
        CheckpointError: if it is in no cache and cannot be fetched, or huggingface_hub is not installed.
    """
    here = f"there is no file or folder {model} here"
    try:
        import huggingface_hub
    except ImportError as error:
        raise CheckpointError(f"{here}; to open it as a model on the hub: pip install 'weightsmith[hub]'") from error
    if "/" not in model and revision is None and not _cached(model):
        raise CheckpointError(f"{here}, and no model of this name in the hub's cache")
    try:
        cached = _in_cache(model, revision)
        if cached is not None:
            return cached
        names = huggingface_hub.list_repo_files(model, revision=revision)
        return huggingface_hub.snapshot_download(model, revision=revision, allow_patterns=[*_TEXTS, *_weights(names)])
    # Without a network, errors are those of huggingface_hub's HTTP library, which is another from version to version.
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise CheckpointError(f"{here}, and the hub does not give it: {reason}") from error


def _weights(names: list[str]) -> list[str]:
    """Choose the weights to fetch of a repository's files: at its top, in a pipeline's components, or of a bundle."""
    if BUNDLE_FILE in names:
        return [name for name in names if name.endswith(".safetensors")]
    depth = 1 if _PIPELINE in names else 0
    folders: dict[str, list[str]] = {}
    for name in names:
        if name.count("/") == depth:
            folder, slash, file = name.rpartition("/")
            folders.setdefault(folder + slash, []).append(file)
    return [folder + file for folder, files in folders.items() for file in one_copy(files)]


def _in_cache(model: str, revision: str | None) -> str | None:
    """Return the cached folder of a model, if its weights are in it.

    A cache may hold the config alone, or what an interrupted download left.
    """
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        # Newer versions of huggingface_hub remember a repository's files, and check what is asked for against them.
        found = huggingface_hub.snapshot_download(
            model, revision=revision, allow_patterns=_TEXTS, local_files_only=True
        )
    except LocalEntryNotFoundError:
        return None
    folder = Path(found)
    if (folder / BUNDLE_FILE).exists():
        return str(folder) if _has_all_parts(folder) else None
    parts = [folder]
    if (folder / _PIPELINE).exists():
        # Components without weights, such as schedulers, name their configs otherwise.
        parts = [path.parent for path in folder.glob("*/config.json")]
    return str(folder) if parts and all(map(_has_all_shards, parts)) else None


def _has_all_parts(folder: Path) -> bool:
    """Whether a bundle's folder holds all weights that its manifest names."""
    try:
        entries = manifest_of(folder).tensors.values()
    except CheckpointError:
        return False
    return all((folder / file).exists() for file in {entry.file for entry in entries})


def _has_all_shards(folder: Path) -> bool:
    """Whether a folder holds weights, and beside every numbered shard all the others."""
    files = {path.name for path in folder.iterdir() if is_weights(path.name) and path.exists()}
    for file in files:
        shard = _SHARD.search(file)
        if shard is not None:
            number, count = shard.span(1), int(shard[2])
            digits = number[1] - number[0]
            if any(f"{file[: number[0]]}{i:0{digits}}{file[number[1] :]}" not in files for i in range(1, count + 1)):
                return False
    return bool(files)


def _cached(model: str) -> bool:
    from huggingface_hub.constants import HF_HUB_CACHE

    return (Path(HF_HUB_CACHE) / f"models--{model}").is_dir()
