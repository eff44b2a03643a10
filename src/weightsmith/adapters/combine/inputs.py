"""The adapters that are combined: what their headers tell, and their layers, read one at a time."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from weightsmith import dtypes
from weightsmith.adapters.adapter import Adapter, Names
from weightsmith.adapters.change import Change, LowRank
from weightsmith.adapters.combine.stack import Stack
from weightsmith.adapters.fold import fold
from weightsmith.adapters.folded import FoldedTensor
from weightsmith.adapters.kinds.low_rank import MAGNITUDE
from weightsmith.adapters.layer import Layer
from weightsmith.adapters.layouts.normal import normalize
from weightsmith.checkpoint.checkpoint import Checkpoint
from weightsmith.checkpoint.reference import parse_reference
from weightsmith.checkpoint.tensor import Array
from weightsmith.dtypes import DType
from weightsmith.errors import CheckpointError, PlanError, RecipeError

Form = Literal["linear", "embedding", "convolution"]
_WAY_OUT = "name the base (--base), and its change is formed on it; or fold it and extract a LoRA from the result"


@dataclass(frozen=True)
class Site:
    """A layer that some of the adapters change.

    Attributes:
        module: its name.
        form: how PEFT lays a LoRA of it out.
        shape: the weight's shape.
        ranks: each adapter's rank: 0 where it does not change the layer, None where its change has no low rank.
    """

    module: str
    form: Form
    shape: tuple[int, ...]
    ranks: tuple[int | None, ...]

    @property
    def sides(self) -> tuple[int, int]:
        """Rows and columns of the weight as a matrix ``[out, everything else]``."""
        rows = self.shape[0]
        columns = 1
        for length in self.shape[1:]:
            columns *= length
        return rows, columns


class Inputs:
    """The adapters that are combined.

    Attributes:
        adapters: in their order.
        weights: one for each.
        labels: a stable name for each: random numbers depend on it.
        base: the model that they are for, or None.
        seed: of random methods.
        sites: the layers that some of them change, in the order in which they are met.
    """

    def __init__(
        self,
        checkpoints: Sequence[Checkpoint],
        weights: Sequence[float],
        base: Checkpoint | None = None,
        *,
        seed: int = 0,
        low_rank: bool = True,
    ) -> None:
        """Look at the adapters' headers.

        Args:
            checkpoints: the adapters.
            weights: one for each.
            base: the model that they are for.
            seed: of random methods.
            low_rank: whether layers will be asked for as products of factors.

        Raises:
            CheckpointError: if one is no adapter, or none of low rank and there is no base.
            PlanError: if they do not fit each other or the base.
        """
        self.adapters = [_opened(one, base) for one in checkpoints]
        self.weights = tuple(weights)
        self.labels = _labels([one.name for one in checkpoints])
        self.base = base
        self.seed = seed
        self._names = None if base is None else Names(base)
        self._folded: dict[int, tuple[Checkpoint, Names]] = {}
        self.sites: dict[str, Site] = {}
        if low_rank:
            modules = dict.fromkeys(module for adapter in self.adapters for module in adapter.modules)
            self.sites = {module: self._site(module) for module in modules}

    @property
    def configs(self) -> list[Mapping[str, Any]]:
        """Each adapter's config."""
        return [adapter.checkpoint.config for adapter in self.adapters]

    @cached_property
    def dtype(self) -> DType:
        """The dtype that holds those of all adapters' tensors."""
        found = [tensor.dtype for adapter in self.adapters for tensor in adapter.checkpoint.values()]
        dtype = dtypes.promote([one for one in found if dtypes.is_float(one)] or [np.dtype(np.float32)])
        return dtype if dtype.itemsize >= 2 else np.dtype(np.float32)

    @property
    def warnings(self) -> list[str]:
        """What a person should know of adapters that are combined."""
        found = []
        bases = Counter(str(config.get("base_model_name_or_path")) for config in self.configs)
        bases.pop("None", None)
        if len(bases) > 1:
            found.append(
                f"the adapters were trained on different bases ({', '.join(bases)}); what they change means the same "
                "only on one"
            )
        alone = [adapter.name for adapter in self.adapters if not self._shares(adapter)]
        if len(self.adapters) > 1 and alone:
            found.append(
                f"{', '.join(alone)}: no layer is changed by another adapter too; are the names those of one model?"
            )
        return found

    def stack(self, module: str) -> Stack:
        """Read what all adapters hold for a layer, as products of factors.

        Raises:
            CheckpointError: if values are NaN or infinite, or a change is no such product.
        """
        site = self.sites[module]
        rows, columns = site.sides
        parts = []
        for number, rank in enumerate(site.ranks):
            found = self.change(number, module) if rank != 0 else LowRank(np.zeros((rows, 0)), np.zeros((0, columns)))
            if not isinstance(found, LowRank):
                raise CheckpointError(
                    f"{self.adapters[number].name}: {module}: its change is no product of two low-rank factors, and "
                    "this method works on factors; use linear, svd or a method on the deltas' entries with --base, "
                    "or fold the adapter and extract a LoRA from the result"
                )
            parts.append(found)
        return Stack(module, tuple(parts), self.weights, self.labels, self.seed)

    def layer(self, number: int, module: str) -> Layer:
        """Return one of the layers that an adapter changes, with the base's weight where there is a base."""
        weight = None if self.base is None else self._on_base(number, module).view
        return self.adapters[number].layer(module, weight)

    def change(self, number: int, module: str) -> LowRank | Array:
        """Read one adapter's change of a layer: a product of factors, or a matrix ``[out, columns]`` of float64.

        Raises:
            CheckpointError: if values are NaN or infinite.
        """
        adapter = self.adapters[number]
        if self.sites[module].ranks[number] is None:
            dense = self._on_base(number, module).change()
            if not np.isfinite(dense).all():
                raise _not_finite(adapter, module)
            return dense
        found = self._alone(adapter, module) or self._on_base(number, module).terms[0].make()
        assert isinstance(found, LowRank)
        if not (np.isfinite(found.left).all() and np.isfinite(found.right).all()):
            raise _not_finite(adapter, module)
        return found

    def of_base(self, name: str, number: int = 0) -> str:
        """Return the base's name of a tensor that an adapter names.

        Raises:
            PlanError: if the base has no such tensor.
        """
        assert self._names is not None
        return self._names.find(name, self.adapters[number].name)

    def _shares(self, adapter: Adapter) -> bool:
        return any(set(adapter.modules) & set(other.modules) for other in self.adapters if other is not adapter)

    def _site(self, module: str) -> Site:
        found: list[tuple[Adapter, Form, tuple[int, ...]]] = []
        ranks: list[int | None] = []
        for number, adapter in enumerate(self.adapters):
            if module not in adapter.modules:
                ranks.append(0)
                continue
            rank, shape = self._rank(number, module)
            ranks.append(rank)
            form: Form = "convolution" if len(shape) > 2 else "linear"
            if any("embedding" in part for part in adapter.modules[module]):
                form = "embedding"
            found.append((adapter, form, shape))
        first = found[0]
        for other in found[1:]:
            if other[1:] != first[1:]:
                raise PlanError(
                    f"{module} is {first[1]} {list(first[2])} to {first[0].name}, and {other[1]} {list(other[2])} to "
                    f"{other[0].name}: they are not of one model"
                )
        return Site(module, first[1], first[2], tuple(ranks))

    def _rank(self, number: int, module: str) -> tuple[int | None, tuple[int, ...]]:
        """Return rank and shape of a layer; what a LoRA's header tells needs no reading."""
        adapter = self.adapters[number]
        if adapter.kind.peft_type == "LORA" and MAGNITUDE not in adapter.modules[module]:
            layer = adapter.layer(module)
            return layer.length("r"), layer.shape
        found = self._alone(adapter, module)
        if found is not None:
            # Not all kinds tell of convolutions; then they are none.
            return found.rank, adapter.layer(module).known_shape or (len(found.left), found.right.shape[1])
        tensor = self._on_base(number, module)
        made = tensor.terms[0].make()
        return (made.rank if isinstance(made, LowRank) else None), tensor.view.shape

    def _alone(self, adapter: Adapter, module: str) -> LowRank | None:
        """Return a change that is a product of factors without a base, or None where there is a base to form it on."""
        try:
            found: Change = adapter.change(module)
        except CheckpointError:
            if self.base is None:
                raise
            return None
        if isinstance(found, LowRank):
            return found
        if self.base is None:
            raise CheckpointError(
                f"{adapter.name}: {module}: what {_kind_of(adapter, module)} changes is no product of two low-rank "
                f"factors; {_WAY_OUT}"
            )
        return None

    def _on_base(self, number: int, module: str) -> FoldedTensor:
        assert self.base is not None
        adapter = self.adapters[number]
        if number not in self._folded:
            made = fold(self.base, adapter.checkpoint)
            self._folded[number] = made, Names(made)
        folded, names = self._folded[number]
        tensor = folded[names.find(f"{module}.weight", adapter.name)]
        assert isinstance(tensor, FoldedTensor)
        return tensor


def _opened(checkpoint: Checkpoint, base: Checkpoint | None) -> Adapter:
    if not checkpoint.is_adapter:
        raise CheckpointError(
            f"{checkpoint.name} is no adapter: it has no adapter_config.json; 'weightsmith merge' merges models"
        )
    if checkpoint.config.get("target_parameters"):
        raise CheckpointError(
            f"{checkpoint.name} changes parameters of experts (target_parameters in its config), and adapters of these "
            "are not combined: fold each into the base, or all of them at once (weightsmith fuse)"
        )
    return Adapter(normalize(checkpoint, base))


def _not_finite(adapter: Adapter, module: str) -> CheckpointError:
    return CheckpointError(f"{adapter.name}: {module}: values are NaN or infinite")


def _kind_of(adapter: Adapter, module: str) -> str:
    return "DoRA" if MAGNITUDE in adapter.modules[module] else adapter.kind.title


def _labels(names: Sequence[str]) -> tuple[str, ...]:
    """Return names that do not change with the folder that adapters are in; equal ones get their place."""
    short = []
    for name in names:
        try:
            short.append(parse_reference(name).short_name)
        except RecipeError:
            short.append(name)
    counts = Counter(short)
    return tuple(f"{name}:{place}" if counts[name] > 1 else name for place, name in enumerate(short))


def folder_of(adapter: Adapter) -> Path | None:
    """Return the folder that an adapter's file is in, where it is on this machine."""
    paths = [identity.path for identity in adapter.checkpoint.identities]
    return Path(paths[0]).parent if paths and "://" not in paths[0] and os.path.exists(paths[0]) else None


def step_in_name(folder: Path) -> int | None:
    """Return the step that the folder of a checkpoint is named after, ``checkpoint-500``; None where it is not."""
    found = re.fullmatch(r"checkpoint-(\d{1,15})", folder.name)
    return int(found[1]) if found else None
