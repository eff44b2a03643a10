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
    torch_files,
)

TARGETS: dict[str, Target] = {
    module.TARGET.name: module.TARGET
    for module in (safetensors, index, torch_files, distributed, adapter, recipe, companions, bundle, layouts, running)
}
