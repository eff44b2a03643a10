"""An adapter to begin a training with, and the base that belongs to it, neither written yet."""

from __future__ import annotations

import dataclasses
import fnmatch
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from weightsmith import dtypes
from weightsmith.adapters.change import Change, LowRank
from weightsmith.adapters.folded import FoldedTensor, Term
from weightsmith.adapters.peft_config import config_text, most_common, patterns
from weightsmith.architecture.stacks import analyse
from weightsmith.checkpoint.checkpoint import Checkpoint, Companions
from weightsmith.checkpoint.companions import write_companions
from weightsmith.checkpoint.layout import ONE_FILE
from weightsmith.checkpoint.layout import Part as FilePart
from weightsmith.checkpoint.tensor import Array, Tensor
from weightsmith.dtypes import DType
from weightsmith.engine.executor import Summary
from weightsmith.engine.plan import MATRIX_MEMORY, Plan
from weightsmith.engine.threads import ThreadMapper, default_threads
from weightsmith.errors import MethodError, PlanError
from weightsmith.extraction.lowrank import factor_fields, rounded_factor
from weightsmith.extraction.modules import Module, Modules
from weightsmith.extraction.parts import Made
from weightsmith.extraction.placement import base_of, target_names, task_type
from weightsmith.extraction.room import Ahead, Room
from weightsmith.initialization.methods import METHODS, Given, explained
from weightsmith.initialization.recipe import Recipe
from weightsmith.initialization.statistics import Activations
from weightsmith.kernels.convert import widen
from weightsmith.methods.matrices import leading_work
from weightsmith.plan.output import Output, check_folder

_FLOAT64 = np.dtype(np.float64)


class Start:
    """The factors of one layer."""

    def __init__(
        self, tensor: Tensor, module: Module, recipe: Recipe, rank: int, activations: Activations | None, room: Room
    ) -> None:
        """Stand for a layer.

        Args:
            tensor: its weight.
            module: its module.
            recipe: how the training begins.
            rank: its rank.
            activations: what is known of its inputs.
            room: where matrices are worked on.
        """
        self.tensor = tensor
        self.module = module
        self.rank = rank
        self.scale = (recipe.alpha if recipe.alpha is not None else recipe.rank) / recipe.rank
        self.dtype: DType = dtypes.float_from_name(recipe.dtype)
        self._recipe = recipe
        self._activations = activations
        self._room = room

    @property
    def memory(self) -> int:
        """Bytes that are held while the factors are made, at most."""
        rows, columns = self.module.sides
        item = self.working.itemsize
        inputs = 4 * columns * columns * _FLOAT64.itemsize if self._activations is not None else 0
        work = leading_work(rows, columns, self.rank, self._recipe.decomposition, item).elements * item
        return 4 * self.tensor.size * _FLOAT64.itemsize + work + inputs

    @property
    def working(self) -> DType:
        """The dtype of the arithmetic."""
        return dtypes.working_dtype([self.tensor.dtype])

    def weight(self) -> Array:
        """Return the weight as the layer uses it: ``[out, in]``.

        Raises:
            PlanError: if it is not finite.
        """
        flat = widen(self.tensor.read(0, self.tensor.size), self.working)
        if not np.isfinite(flat).all():
            raise PlanError(f"{self.tensor.name} has values that are NaN or infinite; leave the layer out (--target)")
        return self.module.oriented(flat)

    def make(self) -> tuple[Array, ...]:
        """Return A and B, flat and in their dtype."""
        with self._room.take(self.memory):
            method, data = METHODS[self._recipe.method], self._activations
            given = Given(
                self.module.name,
                self.rank,
                self.scale,
                self._recipe.seed,
                self._recipe.decomposition,
                data.components(self.module.name, self.rank) if data and method.data == "components" else None,
                data.covariance(self.module.name) if data and method.data == "covariance" else None,
                self._recipe.smallest,
            )
            down, up = method.function(self.weight(), given)
        # Fewer directions than the rank asks for leave rows of zeros.
        down = np.pad(down, ((0, self.rank - len(down)), (0, 0)))
        return tuple(
            rounded_factor(f"lora_{side} of {self.module.name}", factor, self.dtype).reshape(-1)
            for side, factor in (("A", down), ("B", up))
        )

    def change(self, ahead: Ahead) -> Change:
        """Return ``s B A`` of the factors as they are written."""
        rows, columns = self.module.sides
        down, up = (widen(array, _FLOAT64) for array in ahead.get(self))
        return LowRank(up.reshape(rows, self.rank) * self.scale, down.reshape(self.rank, columns))


class Starts:
    """All layers of an adapter to begin with.

    Attributes:
        recipe: how it begins.
        base: the base.
        layers: the factors of each layer.
        modules: the modules of the base.
        room: where matrices are worked on.
        ahead: has the factors made.
        threads: how many threads to use.
    """

    def __init__(self, recipe: Recipe, base: Checkpoint, activations: Checkpoint | None, threads: int | None) -> None:
        """Decide what there is; ranks are shared out by what directions explain, if they are.

        Args:
            recipe: how it begins.
            base: the base.
            activations: the file of activations that the recipe names.
            threads: how many threads to use.

        Raises:
            PlanError: if the base has no such layers.
            CheckpointError: if the activations do not fit them.
        """
        if base.is_adapter:
            raise PlanError(f"{base.name} is an adapter, and cannot be a base")
        if base.components:
            raise PlanError(f"{base.name} is a pipeline of several models; name one: {base.name}/{base.components[0]}")
        if base.config.get("quantization_config"):
            raise PlanError(f"{base.name} is quantised: its tensors are codes, and have no singular vectors")
        self.recipe = recipe
        self.base = base
        self.modules = Modules(base, base.config)
        self.threads = threads or default_threads()
        self.room = Room(MATRIX_MEMORY, self.threads)
        self.ahead = Ahead()
        self._activations = None if activations is None else Activations(activations)
        self.layers = self._make()

    def _make(self) -> list[Start]:
        modules = self._chosen()
        ranks = {module.name: min(self.recipe.rank, *module.sides) for module in modules}
        if self._activations is not None:
            for module in modules:
                self._activations.check(module.name, module.sides[1])
        starts = [self._start(module, ranks[module.name]) for module in modules]
        if self.recipe.rho > 1:
            with ThreadMapper(self.threads, matrices=True) as mapper:
                shares = list(mapper(self._explained, starts))
            shared = shared_out(shares, self.recipe.rank)
            starts = [self._start(one.module, rank) for one, rank in zip(starts, shared, strict=True) if rank]
        return starts

    def _start(self, module: Module, rank: int) -> Start:
        tensor = self.base[f"{module.name}.weight"]
        return Start(tensor, module, self.recipe, rank, self._activations, self.room)

    def _explained(self, start: Start) -> Sequence[float]:
        """Return the shares of variance of as many directions as a layer may get."""
        most = min(round(self.recipe.rank * self.recipe.rho), *start.module.sides)
        with self.room.take(start.memory):
            if self._activations is not None:
                found = self._activations.components(start.module.name, most).ratios
            else:
                found = explained(start.weight(), most)
        return [float(share) for share in found]

    def _chosen(self) -> list[Module]:
        layers = analyse(self.base, self.base.config)
        found = []
        for name in self.base:
            module = self.modules.find(name)
            if module is None or module.form not in ("linear", "transposed"):
                continue
            if self.recipe.targets:
                last = module.name.rpartition(".")[2]
                if not any(
                    pattern == last or fnmatch.fnmatchcase(module.name, pattern) for pattern in self.recipe.targets
                ):
                    continue
            elif layers.locate(name) is None:
                continue
            found.append(module)
        if not found:
            targets = f"fits {', '.join(self.recipe.targets)}" if self.recipe.targets else "lies within layers"
            raise PlanError(f"{self.base.name} has no linear layer that {targets}")
        return found


class _Starting(Output):
    """What the adapter and its base share.

    Attributes:
        recipe: how the training begins.
        work: the layers.
    """

    recipe: Recipe
    work: Starts

    def to_yaml(self) -> str:
        """See :meth:`Output.to_yaml`."""
        return self.recipe.to_yaml()

    def save(self, target: str | os.PathLike[str], **options: Any) -> Summary:
        """See :meth:`Output.save`."""
        work = self.work
        work.room.most = threads = options.get("threads") or work.threads
        if options.get("memory") is not None:
            work.room.limit = options["memory"]
        with ThreadMapper(1, matrices=True), work.ahead.working(work.layers, threads):
            return super().save(target, **options)


class StartingAdapter(_Starting):
    """An adapter to begin a training with."""

    def __init__(
        self, recipe: Recipe, base: Checkpoint, activations: Checkpoint | None = None, *, threads: int | None = None
    ) -> None:
        """Decide what it holds; ranks are shared out by what directions explain, if they are.

        Args:
            recipe: how it begins.
            base: the base.
            activations: the file of activations that the recipe names.
            threads: how many threads to use.

        Raises:
            PlanError: if the base has no such layers.
            CheckpointError: if the activations do not fit them.
        """
        self.recipe = recipe
        self.work = work = Starts(recipe, base, activations, threads)
        tensors = {
            field.name: Made(field, which, start, work.ahead)
            for start in work.layers
            for which, field in enumerate(factor_fields(start.module, start.rank, start.dtype))
        }
        super().__init__(
            f"{recipe.method} on {base.name}",
            tensors,
            inputs=[base] if activations is None else [base, activations],
            written={},
            companions=Companions(self._adapter_config()),
        )
        self.is_adapter = True

    def parts(self) -> list[FilePart]:
        """See :meth:`Output.parts`."""
        return [FilePart("", "adapter_model")]

    def save(self, target: str | os.PathLike[str], **options: Any) -> Summary:
        """Compute the factors and write them; see :meth:`Output.save`. There is one file, as PEFT reads it."""
        check_folder(target, "an adapter is a folder, with its config beside the weights")
        return super().save(target, **{**options, "shard_size": ONE_FILE})

    def write_beside(self, folder: Path, plan: Plan) -> list[str]:
        """See :meth:`Output.write_beside`: the adapter's config."""
        (folder / "adapter_config.json").write_text(config_text(self.config), "utf-8")
        return []

    def residual(self) -> StartingBase:
        """Return the base that belongs to the adapter.

        Raises:
            MethodError: if the method leaves the base as it is.
        """
        return StartingBase(self)

    def _adapter_config(self) -> dict[str, Any]:
        recipe = self.recipe
        ranks = {start.module.name: start.rank for start in self.work.layers}
        common = recipe.rank if recipe.rank in ranks.values() else most_common(ranks.values())
        # The scale is the same for all, so alpha differs where the rank does.
        scale = self.work.layers[0].scale
        differing = patterns(ranks, common)
        trained_on = recipe.trained_on or (None if METHODS[recipe.method].takes_part else recipe.base)
        base = {} if trained_on is None else base_of(trained_on)
        return {
            "peft_type": "LORA",
            **base,
            "task_type": task_type(self.work.base.config),
            "inference_mode": False,
            "r": common,
            "lora_alpha": _whole(scale * common),
            "rank_pattern": differing,
            "alpha_pattern": {name: _whole(scale * rank) for name, rank in differing.items()},
            "target_modules": target_names(ranks, self.work.modules.paths),
            "fan_in_fan_out": any(start.module.form == "transposed" for start in self.work.layers),
            "bias": "none",
            "lora_dropout": 0.0,
            # The factors are here: PEFT is not to make others, nor to change the base, when it loads them.
            "init_lora_weights": True,
            "use_dora": False,
            "use_rslora": False,
        }


class StartingBase(_Starting):
    """The rest of a base, without the part that the adapter begins with: ``W - s B A``, in the base's dtype."""

    def __init__(self, adapter: StartingAdapter) -> None:
        """Take what an adapter begins with out of its base.

        Args:
            adapter: the adapter.

        Raises:
            MethodError: if its method leaves the base as it is.
        """
        recipe = adapter.recipe
        if not METHODS[recipe.method].takes_part:
            raise MethodError(f"{recipe.method} begins with a change of zero: the base stays as it is")
        self.recipe = dataclasses.replace(recipe, residual=True)
        self.work = work = adapter.work
        base = work.base
        tensors: dict[str, Tensor] = dict(base)
        for start in work.layers:
            term = Term(-1.0, partial(start.change, work.ahead))
            rest = FoldedTensor(start.tensor, [term], transposed=start.module.stored_transposed)
            rest.held, rest.whole = start.memory, True
            tensors[start.tensor.name] = rest
        dtype = dtypes.float_from_name(recipe.residual_dtype) if recipe.residual_dtype else None
        written = {} if dtype is None else {name: dtype for name, one in base.items() if dtypes.is_float(one.dtype)}
        name = f"{base.name} without {recipe.method}"
        super().__init__(name, tensors, inputs=[base], written=written, companions=base.companions)

    def parts(self) -> list[FilePart]:
        """See :meth:`Output.parts`."""
        return [FilePart()]

    def write_beside(self, folder: Path, plan: Plan) -> list[str]:
        """See :meth:`Output.write_beside`: config and files of the base."""
        return write_companions(folder, self.config, self.companions.files)


def shared_out(shares: Sequence[Sequence[float]], rank: int) -> list[int]:
    """Return ranks of layers by what their directions explain: as many in all as if each had the same.

    All shares of all layers are put in one order, and the first ``rank`` times the number of layers are taken; a
    layer's rank is how many of these are its own. As in PEFT's EVA.

    Args:
        shares: of each layer, the shares of variance of its directions, falling.
        rank: the rank that each would have.
    """
    order = sorted((-share, layer, place) for layer, own in enumerate(shares) for place, share in enumerate(own))
    ranks = [0] * len(shares)
    for _, layer, _ in order[: rank * len(shares)]:
        ranks[layer] += 1
    return ranks


def _whole(value: float) -> float | int:
    return int(value) if value == int(value) else value
