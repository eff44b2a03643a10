"""Models named by their id on a hub: the local cache first, then a download, by huggingface_hub."""

from __future__ import annotations

import re
from pathlib import Path

from weightsmith.checkpoint.storage import WEIGHT_FILES
from weightsmith.errors import CheckpointError

_ID = re.compile(r"^[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?$")
_TEXTS = ["*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "*.txt", "LICENSE*", "*/*.json"]
_SAFETENSORS = ["*.safetensors", "*/*.safetensors"]
_PICKLES = ["*.bin", "*.pt", "*.pth"]


def is_hub_id(path: str) -> bool:
    """Whether this could be ``name`` or ``organisation/name`` on a hub."""
    return _ID.match(path) is not None and not path.endswith(WEIGHT_FILES)


def resolve(model: str, revision: str | None) -> str:
    """Return the local folder of a hub model, downloading it if the cache lacks it.

    Cache, token, endpoint and offline mode are huggingface_hub's own (``HF_HOME``, ``HF_TOKEN``,
    ``HF_ENDPOINT``, ``HF_HUB_OFFLINE``). Safetensors are fetched, pickles only where there are none; code
    never is.

    Args:
        model: the id.
        revision: a branch, tag or commit; by default the main branch.

    Raises:
        CheckpointError: if it is in no cache and cannot be fetched, or huggingface_hub is not installed.
    """
    here = f"there is no file or folder {model} here"
    try:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        raise CheckpointError(f"{here}; to open it as a model on the hub: pip install 'weightsmith[hub]'") from error
    if "/" not in model and revision is None and not _cached(model):
        raise CheckpointError(f"{here}, and no model of this name in the hub's cache")
    try:
        cached = _in_cache(model, revision)
        if cached is not None:
            return cached
        names = huggingface_hub.list_repo_files(model, revision=revision)
        weights = _SAFETENSORS if any(name.endswith(".safetensors") for name in names) else _PICKLES
        return huggingface_hub.snapshot_download(model, revision=revision, allow_patterns=[*_TEXTS, *weights])
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise CheckpointError(f"{here}, and the hub does not give it: {reason}") from error


def _in_cache(model: str, revision: str | None) -> str | None:
    """Return the cached folder of a model, if its weights are in it: a cache may hold the config alone."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    for weights in (_SAFETENSORS, _PICKLES):
        try:
            folder = huggingface_hub.snapshot_download(
                model, revision=revision, allow_patterns=[*_TEXTS, *weights], local_files_only=True
            )
        except LocalEntryNotFoundError:
            continue
        if any(path for pattern in weights for path in Path(folder).glob(pattern)):
            return str(folder)
    return None


def _cached(model: str) -> bool:
    from huggingface_hub.constants import HF_HUB_CACHE

    return (Path(HF_HUB_CACHE) / f"models--{model}").is_dir()
