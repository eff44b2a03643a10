"""A model while it is folded: its tensors, what was made of them so far, and what a person said of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from weightsmith import dtypes
from weightsmith.checkpoint.tensor import Tensor
from weightsmith.errors import PlanError
from weightsmith.reparameterized.instructions import Instruction
from weightsmith.reparameterized.layer import Layer, Norm, stored
from weightsmith.reparameterized.tensors import BiasTensor, KernelTensor, MadeTensor

EPS = 1e-5
_STATISTICS = ("running_mean", "running_var")
_OF_NORM = ("weight", "bias", *_STATISTICS, "num_batches_tracked")
# Elements of a row: what is held at least at a time. Branches whose shapes were made up can multiply to any number.
_LONGEST_ROW = 1 << 26
# A rule names a module's children, and theirs, at most so far down.
_DEPTH = 6


@dataclass
class Fold:
    """Tensors that became others.

    Attributes:
        kind: by which rule.
        module: where; the name that the tensors have in common.
        sources: the checkpoint's tensors that it rests on.
        results: the tensors that it makes.
    """

    kind: str
    module: str
    sources: tuple[str, ...]
    results: tuple[str, ...]


@dataclass
class Model:
    """A model while it is folded.

    Attributes:
        name: the checkpoint's name, for errors.
        tensors: its tensors as they stand; changes as rules are applied.
        instructions: what a person said.
        folds: what was done; one without results is part of another.
        used: ids of the instructions that were needed.
        norms: how many batch norms were looked at whose eps was assumed.
        place: the module that a rule looks at.
    """

    name: str
    tensors: dict[str, Tensor]
    instructions: Sequence[Instruction] = ()
    folds: list[Fold] = field(default_factory=list)
    used: set[int] = field(default_factory=set)
    norms: int = 0
    place: str = ""
    _origins: dict[str, Fold] = field(default_factory=dict)
    _kept: frozenset[str] = frozenset()
    _children: dict[str, set[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Leave alone what a person wants kept, and note what each module holds."""
        for name in self.tensors:
            path = name
            for _ in range(_DEPTH):
                path, _, child = path.rpartition(".")
                self._children.setdefault(path, set()).add(child)
                if not path:
                    break
        kept = set()
        for one in self.said("keep"):
            names = {name for name in self.tensors if one.matches(name)}
            kept |= names
            if names:
                self.use(one)
        self._kept = frozenset(kept)

    def said(self, kind: str) -> Iterable[Instruction]:
        """Yield what a person said of a kind."""
        return (one for one in self.instructions if one.kind == kind)

    def first_said(self, kind: str, name: str) -> Instruction | None:
        """Return the first thing said of a kind that is said of this name."""
        return next((one for one in self.said(kind) if one.matches(name)), None)

    def use(self, instruction: Instruction) -> None:
        """Note that an instruction was needed."""
        self.used.add(id(instruction))

    def modules(self) -> Iterator[str]:
        """Yield the modules that the checkpoint's tensors are in, inner ones before those that they are in."""
        for module in sorted(self._children, key=lambda module: (-module.count("."), module)):
            self.place = module
            yield module

    def children(self, module: str) -> set[str]:
        """Return what a module of the checkpoint holds: its tensors and inner modules, by their names in it."""
        return self._children.get(module, set())

    def get(self, name: str) -> Tensor | None:
        """Return a tensor that rules may use."""
        return None if name in self._kept else self.tensors.get(name)

    def layer(self, module: str, *, outputs: int | None = None) -> Layer | None:
        """Return the linear or convolution layer of a module, or None if there is none.

        Args:
            module: the module.
            outputs: how many outputs it has, if the first axis of its weight is not that.

        Raises:
            PlanError: if its bias does not fit, or its weight holds no floats.
        """
        weight = self.get(f"{module}.weight")
        if weight is None or len(weight.shape) < 2:
            return None
        layer = self.tensor_layer(f"{module}.weight")
        bias = self.get(f"{module}.bias")
        if bias is None or layer is None:
            return layer
        if bias.shape != (outputs or weight.shape[0],):
            raise self.error(
                module,
                f"bias is {list(bias.shape)}, and weight {list(weight.shape)}; a bias has one for each output",
            )
        own = bias.layer.bias if isinstance(bias, MadeTensor) else stored(weight, bias).bias
        return replace(layer, bias=own)

    def tensor_layer(self, name: str) -> Layer | None:
        """Return a tensor as a layer without bias, whose rows are not rounded if they are made, or None."""
        tensor = self.get(name)
        if tensor is None:
            return None
        if not dtypes.is_float(tensor.dtype):
            raise self.error(name, f"is {dtypes.name_of(tensor.dtype)}: codes of a quantised model are no weights")
        if not tensor.size:
            raise self.error(name, f"is {list(tensor.shape)}, and holds nothing")
        if isinstance(tensor, KernelTensor):
            return replace(tensor.layer, bias=None)
        return stored(tensor)

    def norm(self, module: str, *, needed: bool = False) -> Norm | None:
        """Return the batch norm of a module, or None if it has no running statistics.

        Args:
            module: the module.
            needed: whether a module with a weight but no statistics is an error.

        Raises:
            PlanError: if its tensors do not fit each other; or it has no statistics, and they are needed.
        """
        parts = {part: self.get(f"{module}.{part}") for part in _OF_NORM}
        found = [part for part in _STATISTICS if parts[part] is not None]
        mean, variance = parts["running_mean"], parts["running_var"]
        if mean is None or variance is None:
            if found or (needed and (parts["weight"] is not None or parts["bias"] is not None)):
                raise self.error(
                    module,
                    f"has no {' and no '.join(part for part in _STATISTICS if part not in found)}. A batch norm "
                    "without running statistics takes them from each batch (training mode), a layer or group norm "
                    "from each input: neither is a fixed factor that a layer could absorb",
                )
            return None
        for part, tensor in parts.items():
            if tensor is None or part == "num_batches_tracked":
                continue
            if tensor.shape != mean.shape or len(tensor.shape) != 1 or not dtypes.is_float(tensor.dtype):
                raise self.error(
                    module,
                    f"{part} is {dtypes.name_of(tensor.dtype)} {list(tensor.shape)}, and running_mean is "
                    f"{list(mean.shape)}; floats, one for each channel, are needed",
                )
        said = self.first_said("eps", module)
        if said is None:
            self.norms += 1
        else:
            self.use(said)
        return Norm(mean, variance, parts["weight"], parts["bias"], EPS if said is None else said["value"])

    def names(self, *modules: str, also: Iterable[str] = ()) -> list[str]:
        """Return the names of the tensors of layers and batch norms that are there, and of others."""
        wanted = [f"{module}.{part}" for module in modules for part in _OF_NORM] + list(also)
        return [name for name in wanted if self.get(name) is not None]

    def fold(self, kind: str, module: str, consumed: Sequence[str], made: Mapping[str, MadeTensor]) -> None:
        """Put tensors in place of others.

        Args:
            kind: by which rule.
            module: where.
            consumed: the names of those that go.
            made: name -> tensor that comes.

        Raises:
            PlanError: if there is another tensor of a name that comes.
        """
        for name in made:
            if name in self.tensors and name not in consumed:
                raise self.error(module, f"{kind} makes {name}, and there is one already: the model is folded in part")
        sources: dict[str, None] = {}
        for name in consumed:
            origin = self._origins.pop(name, None)
            sources |= dict.fromkeys((name,) if origin is None else origin.sources)
            if origin is not None:
                origin.results = tuple(result for result in origin.results if result != name)
            del self.tensors[name]
        done = Fold(kind, module, tuple(sources), tuple(made))
        self.folds.append(done)
        self._origins |= dict.fromkeys(made, done)
        self.tensors |= made

    def fold_layer(self, kind: str, module: str, consumed: Sequence[str], layers: Mapping[str, Layer]) -> None:
        """Put layers in place of tensors.

        Args:
            kind: by which rule.
            module: where.
            consumed: the names of the tensors that go.
            layers: the name of a module -> the layer that it is.
        """
        made: dict[str, MadeTensor] = {}
        for path, layer in layers.items():
            if math.prod(layer.shape[1:]) > _LONGEST_ROW:
                raise self.error(path, f"would be {list(layer.shape)}: no layer has rows so long")
            made[f"{path}.weight"] = KernelTensor(f"{path}.weight", layer)
            if layer.bias is not None:
                made[f"{path}.bias"] = BiasTensor(f"{path}.bias", layer)
        self.fold(kind, module, consumed, made)

    def made_by(self, name: str) -> str | None:
        """Return the kind of rule that made a tensor, or None if it is the checkpoint's own."""
        origin = self._origins.get(name)
        return None if origin is None else origin.kind

    def remaining_norms(self) -> list[str]:
        """Return the batch norms that no rule took, and no person wants kept."""
        end = ".running_mean"
        return [name.removesuffix(end) for name in self.tensors if name.endswith(end) and name not in self._kept]

    def error(self, place: str, text: str) -> PlanError:
        """Return an error about a place in the model."""
        return PlanError(f"{self.name}: {place}: {text}")


def join(module: str, child: str | None) -> str:
    """Return the path of a module's child; of the module itself where no child is named."""
    return module if not child else f"{module}.{child}" if module else child
