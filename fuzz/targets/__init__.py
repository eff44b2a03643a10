"""The targets, by name."""

from __future__ import annotations

from fuzz.target import Target
from fuzz.targets import (
    adapter,
    bundle,
    companions,
    distributed,
    index,
    layouts,
    recipe,
    running,
    safetensors,
    slow_tokenizers,
    torch_files,
)

_MODULES = (safetensors, index, torch_files, distributed, adapter, recipe, companions, bundle, layouts, running)
TARGETS: dict[str, Target] = {module.TARGET.name: module.TARGET for module in (*_MODULES, slow_tokenizers)}
