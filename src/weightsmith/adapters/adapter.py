"""An adapter, read from its checkpoint: which parts it holds for which layer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from weightsmith import dtypes
from weightsmith.adapters.change import Change, LowRank
from weightsmith.adapters.forms import Shape
from weightsmith.adapters.layer import Layer, Weight
from weightsmith.adapters.registry import Parameterization, get_parameterization
from weightsmith.adapters.settings import Setting, Settings
from weightsmith.checkpoint.checkpoint import Checkpoint
from weightsmith.checkpoint.tensor import Tensor
from weightsmith.errors import CheckpointError, PlanError, did_you_mean

PREFIX = "base_model.model."
_TRANSPOSED = Setting("fan_in_fan_out", "flag", False, "layers are stored as [in, out] (GPT-2's Conv1D)")


class Adapter:
    """An adapter in PEFT's layout.

    Attributes:
        checkpoint: its tensors and config.
        kind: what kind it is.
        modules: module -> part -> tensor, for the layers that it changes.
        plain: name in the base -> tensor that takes its place (trained biases, ``modules_to_save``).
        shared: part -> tensor, of what all layers share.
        transposed: whether its config says that layers are stored as ``[in, out]``.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Read an adapter's names, shapes and config.

        Args:
            checkpoint: the adapter.

        Raises:
            CheckpointError: if it is no adapter, of a kind that is not known, or does not hold what its kind must.
        """
        self.checkpoint = checkpoint
        config = checkpoint.config
        self.kind: Parameterization = get_parameterization(checkpoint.name, config)
        for key, reason in self.kind.refuses.items():
            if config.get(key):
                raise CheckpointError(f"{checkpoint.name} has {key} in its config, and cannot be folded: {reason}")
        self.settings = Settings(checkpoint.name, config, (*self.kind.settings, _TRANSPOSED))
        self.transposed = bool(self.settings.value(_TRANSPOSED.name, ""))
        self.modules: dict[str, dict[str, Tensor]] = {}
        self.plain: dict[str, Tensor] = {}
        self.shared: dict[str, Tensor] = {}
        self._read()

    @property
    def name(self) -> str:
        """How a person names it."""
        return self.checkpoint.name

    def saves(self, name: str) -> bool:
        """Whether a plain tensor was trained (``modules_to_save``), and not only saved with the rest."""
        saved = self.checkpoint.config.get("modules_to_save")
        module = name.rpartition(".")[0]
        return isinstance(saved, list) and any(
            isinstance(one, str) and (module == one or module.endswith(f".{one}")) for one in saved
        )

    def layer(self, module: str, weight: Weight | None = None) -> Layer:
        """Return one of the layers that it changes, checked as far as headers can tell.

        Args:
            module: one of ``modules``.
            weight: the base's weight.

        Raises:
            CheckpointError: if there is no base, and its parts do not fit one another; or its settings do not fit them.
            PlanError: if they do not fit the base's weight.
        """
        found = self._fit(module, weight)
        if found is None:
            raise self._misfit(module, weight)
        lengths, shape = found
        layer = Layer(self.name, module, self.modules[module], self.shared, self.settings, lengths, shape, weight)
        if self.kind.check is not None:
            self.kind.check(layer)
        return layer

    def fits(self, module: str, weight: Weight) -> bool:
        """Whether the shapes of a module's parts fit a weight."""
        return self._fit(module, weight) is not None

    def change(self, module: str, weight: Weight | None = None) -> Change:
        """Read what is held for a module, and return what becomes of its weight.

        Raises:
            CheckpointError: see :meth:`layer`; also if that depends on the base, and there is none.
            PlanError: see :meth:`layer`.
        """
        return self.kind.function(self.layer(module, weight))

    def low_rank(self) -> Iterator[tuple[Layer, LowRank]]:
        """Read every layer's change as a product of two factors, one layer at a time; no base is needed.

        Raises:
            CheckpointError: if the changes are no such products.
        """
        for module in self.modules:
            layer = self.layer(module)
            change = self.kind.function(layer)
            if not isinstance(change, LowRank):
                raise CheckpointError(
                    f"{self.name} is of the kind {self.kind.title}, whose changes are no products of two low-rank "
                    "factors; fold it into its base, and extract a LoRA from the result"
                )
            yield layer, change

    def _fit(self, module: str, weight: Weight | None) -> tuple[Mapping[str, Shape], Shape | None] | None:
        shapes = {part: tensor.shape for part, tensor in self.modules[module].items()}
        for form in self.kind.forms:
            lengths = form.fit(weight.shape if weight is not None else None, shapes)
            if lengths is not None:
                return lengths, weight.shape if weight is not None else form.weight_shape(lengths)
        return None

    def _misfit(self, module: str, weight: Weight | None) -> Exception:
        parts = self.modules[module]
        forms = [form for form in self.kind.forms if set(form.parts) <= set(parts) <= form.names]
        alike = [form for form in forms if weight is not None and form.axes(weight.shape)]
        if not forms:
            return CheckpointError(
                f"{self.name} has only {' and '.join(sorted(parts))} for {module}; {self.kind.title} needs "
                f"{_either(form.parts for form in self.kind.forms)}"
            )
        held = ", ".join(f"{part} {list(tensor.shape)}" for part, tensor in parts.items())
        wanted = "; or ".join(str(form) for form in alike or forms)
        if weight is None:
            return CheckpointError(f"{self.name}: {module}: {held} do not fit one another; needed is {wanted}")
        return PlanError(
            f"{self.name}: {held} do not fit {weight.tensor.name}, which is {list(weight.tensor.shape)}; needed is "
            f"{wanted}"
        )

    def _read(self) -> None:
        heads = {part.partition(".")[0] for part in (*self.kind.parts, *self.kind.aliases)}
        origin: dict[tuple[str, str], str] = {}
        for key, tensor in self.checkpoint.items():
            bare = key.removeprefix("base_model.").removeprefix("model.").removesuffix(".weight")
            if bare in self.kind.shared:
                self.shared[bare] = tensor
                self._check(bare, tensor)
                continue
            renamed = self._renamed(key)
            found = self._split(renamed, heads)
            if found is None:
                self._keep_plain(renamed, tensor)
                continue
            module, part = found
            first = origin.setdefault(found, key)
            if first != key:
                raise CheckpointError(f"{self.name} holds {part} of {module} twice, as {first} and as {key}")
            self._check(f"{part} of {module}", tensor, place=part in self.kind.places)
            self.modules.setdefault(module, {})[part] = tensor

    def _renamed(self, key: str) -> str:
        for pattern, replacement in self.kind.renames.items():
            key = re.sub(pattern, replacement, key)
        return key

    def _keep_plain(self, key: str, tensor: Tensor) -> None:
        stems = {part.partition("_")[0] + "_" for part in self.kind.parts if "_" in part}
        if any(word.startswith(stem) for word in key.split(".") for stem in stems):
            raise CheckpointError(f"{self.name} holds {key}, which is no part of {self.kind.title}")
        name = plain_name(key)
        if name in self.plain:
            raise CheckpointError(f"{self.name} holds {name} twice, the second time as {key}")
        self.plain[name] = tensor

    def _split(self, key: str, heads: set[str]) -> tuple[str, str] | None:
        """Return module and part: what stands before and after the first word of a part."""
        words = key.split(".")
        for place in range(len(words) - 1, 0, -1):
            if words[place] in heads:
                rest = [word for word in words[place + 1 :] if word != "default"]
                part = ".".join([words[place], *(rest[:-1] if rest[-1:] == ["weight"] else rest)])
                part = self.kind.aliases.get(part, part)
                if part in self.kind.parts:
                    return plain_name(".".join(words[:place])), part
        return None

    def _check(self, what: str, tensor: Tensor, *, place: bool = False) -> None:
        if not tensor.size or not (place or dtypes.is_float(tensor.dtype)):
            raise CheckpointError(
                f"{self.name}: {what} is {dtypes.name_of(tensor.dtype)} {list(tensor.shape)}; "
                f"{'places' if place else 'floats'} are needed, and not none of them"
            )


def plain_name(key: str) -> str:
    """Return the base's name for a tensor or module of an adapter."""
    key = key.removeprefix(PREFIX).replace(".base_layer.", ".").removesuffix(".base_layer")
    return re.sub(r"\.modules_to_save(\.default)?\.", ".", key)


def find(name: str, base: Checkpoint, adapter: str) -> str:
    """Return the base's name of a tensor; with or without the first parts, which wrappers of a model add.

    Raises:
        PlanError: if the base has no such tensor.
    """
    for candidate in (name, name.partition(".")[2]):
        if candidate in base:
            return candidate
    longer = [known for known in base if known.endswith(f".{name}")]
    if len(longer) == 1:
        return longer[0]
    raise PlanError(f"{adapter} changes {name}, which {base.name} does not have{did_you_mean(name, base)}")


def _either(names: Iterable[Iterable[str]]) -> str:
    return ", or ".join(dict.fromkeys(" and ".join(sorted(one)) for one in names))
