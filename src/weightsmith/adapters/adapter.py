"""An adapter, read from its checkpoint: which parts it holds for which layer."""

from __future__ import annotations

import re
from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from itertools import permutations

from weightsmith import dtypes
from weightsmith.adapters.change import Change, LowRank
from weightsmith.adapters.forms import Shape, declared
from weightsmith.adapters.layer import Layer, Weight
from weightsmith.adapters.loaded import Experts, join_experts, stored_names
from weightsmith.adapters.peft_config import PREFIX
from weightsmith.adapters.registry import Parameterization, get_parameterization
from weightsmith.adapters.settings import Setting, Settings
from weightsmith.checkpoint.checkpoint import Checkpoint
from weightsmith.checkpoint.tensor import Tensor
from weightsmith.errors import CheckpointError, PlanError, did_you_mean

# First parts of names that an adapter may lack.
_MOST_FIRST_PARTS = 4
_TOKENS = ".token_adapter.trainable_tokens_delta"
# Of one module, that target_parameters names: all orders of them are tried.
_MOST_PARAMETERS = 6
_TRANSPOSED = Setting("fan_in_fan_out", "flag", False, "layers are stored as [in, out] (GPT-2's Conv1D)")


class Adapter:
    """An adapter in PEFT's layout.

    Attributes:
        checkpoint: its tensors and config.
        kind: what kind it is.
        modules: module -> part -> tensor, for the layers that it changes.
        plain: name in the base -> tensor that takes its place (trained biases, ``modules_to_save``).
        shared: part -> tensor, of what all layers share.
        tokens: embeddings in the base -> rows that are trained, and the places at which they stand.
        experts: modules -> what they change, where that is a parameter that a base's experts are joined to when it is
            loaded; known once the base is (:meth:`bind`).
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
        self._forms = [form for form in self.kind.forms if form.when is None or config.get(form.when)]
        self.settings = Settings(checkpoint.name, config, (*self.kind.settings, _TRANSPOSED))
        self.transposed = bool(self.settings.value(_TRANSPOSED.name, ""))
        self.modules: dict[str, dict[str, Tensor]] = {}
        self.plain: dict[str, Tensor] = {}
        self.shared: dict[str, Tensor] = {}
        self.tokens: dict[str, tuple[tuple[int, ...], Tensor]] = {}
        # Modules whose change PEFT makes twice.
        self._twice: set[str] = set()
        # Modules whose weight is not named after them.
        self._weights: dict[str, str] = {}
        # Modules that are parameters of experts which the base stores one by one.
        self.experts: dict[str, Experts] = {}
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
        parts, siblings = self.modules[module], len(self.modules)
        layer = Layer(self.name, module, parts, self.shared, self.settings, lengths, shape, weight, siblings)
        if self.kind.check is not None:
            self.kind.check(layer)
        return layer

    def weight_name(self, module: str, base: Checkpoint) -> str:
        """Return the name of the weight that a module's parts change."""
        if module in self._weights:
            return self._weights[module]
        attention = f"{module}.in_proj_weight"
        # PyTorch's own attention keeps queries, keys and values in one matrix of this name.
        return attention if attention in base and f"{module}.weight" not in base else f"{module}.weight"

    def times(self, module: str) -> int:
        """Return how often a module's change is made.

        PEFT wraps ``out_proj`` of PyTorch's own attention within the wrapped attention, and both add its change: it is
        there twice as the model is trained and used (in PEFT 0.21.2).
        """
        return 2 if module in self._twice else 1

    def of_experts(self, module: str, weight: Tensor) -> bool:
        """Whether a module's parts change the weights of several experts, one tensor (``target_parameters``)."""
        return module in self._weights and len(weight.shape) == 3

    def bind(self, base: Checkpoint) -> None:
        """Find out which parameters of the base (``target_parameters``) the parts are for: PEFT does not write it.

        Several parameters of a module are wrapped one in another, so that the names tell the module alone.

        Raises:
            PlanError: if the base's shapes do not tell.
        """
        targets = self.checkpoint.config.get("target_parameters")
        if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
            return
        levels: dict[str, list[str]] = {}
        for module in self.modules.keys() - self._weights.keys():
            levels.setdefault(re.sub(r"(\.base_layer)+$", "", module), []).append(module)
        for path, modules in levels.items():
            joined = join_experts(path, base)
            known = ChainMap[str, Tensor]({**joined}, base)  # type: ignore[arg-type]
            self._bind(path, modules, _parameters(path, targets, known), known)
            self.experts |= {name: joined[name] for name in self.modules.keys() & joined.keys()}

    def _bind(self, path: str, modules: list[str], names: list[str], base: Mapping[str, Tensor]) -> None:
        if not names and modules == [path]:
            # A module whose own weight is changed, in an adapter that changes parameters as well.
            return
        if len(names) > _MOST_PARAMETERS:
            raise PlanError(
                f"{self.name} has {len(names)} parameters of {path} as targets; {_MOST_PARAMETERS} are known"
            )
        views = {name: [Weight(base[name], transposed=side) for side in (False, True)] for name in names}
        fitting = [
            chosen
            for chosen in permutations(names, len(modules))
            if all(
                any(self._fit(module, view) is not None for view in views[name])
                for module, name in zip(modules, chosen, strict=True)
            )
        ]
        if len(fitting) != 1:
            raise PlanError(
                f"{self.name} changes {len(modules)} parameters of {path}, of which target_parameters names "
                f"{', '.join(names) or 'none that the base has'}: their shapes "
                f"{'fit none of them' if not fitting else 'do not tell which is which'}"
            )
        for module, name in zip(modules, fitting[0], strict=True):
            self._weights[name] = name
            # Each is known by its parameter's name from now on, by which patterns give it a rank as well.
            self.modules[name] = self.modules.pop(module)

    def fits(self, module: str, weight: Weight) -> bool:
        """Whether the shapes of a module's parts fit a weight, and what its kind checks of them as well."""
        try:
            self.layer(module, weight)
        except (CheckpointError, PlanError):
            return False
        return True

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
            times = self.times(module)
            yield layer, change if times == 1 else LowRank(change.left * times, change.right)

    def _fit(self, module: str, weight: Weight | None) -> tuple[Mapping[str, Shape], Shape | None] | None:
        shapes = {part: tensor.shape for part, tensor in self.modules[module].items()}
        shared = {part: tensor.shape for part, tensor in self.shared.items()}
        for form in self._forms:
            lengths = form.fit(weight.shape if weight is not None else None, shapes, shared)
            if lengths is not None:
                return lengths, weight.shape if weight is not None else form.weight_shape(lengths)
        return None

    def _misfit(self, module: str, weight: Weight | None) -> Exception:
        parts = self.modules[module]
        forms = [form for form in self._forms if form.holds(parts)]
        alike = [form for form in forms if weight is not None and form.axes(weight.shape)]
        if not forms:
            return CheckpointError(
                f"{self.name} has only {' and '.join(sorted(parts))} for {module}; {self.kind.title} needs "
                f"{_either(form.parts for form in self._forms)}{self._remedy}"
            )
        held = ", ".join(f"{part} {list(tensor.shape)}" for part, tensor in (*parts.items(), *self.shared.items()))
        wanted = "; or ".join(str(form) for form in alike or forms)
        if weight is None:
            return CheckpointError(f"{self.name}: {module}: {held} do not fit one another; needed is {wanted}")
        return PlanError(
            f"{self.name}: {held} do not fit {weight.tensor.name}, which is {list(weight.tensor.shape)}; needed is "
            f"{wanted}"
        )

    def _read(self) -> None:
        heads = {part.partition(".")[0] for part in (*self.kind.parts, *self.kind.aliases)}
        wrapped = bool(self.checkpoint.config.get("target_parameters"))
        origin: dict[tuple[str, str], str] = {}
        for key, tensor in self.checkpoint.items():
            bare = key.removeprefix("base_model.").removeprefix("model.").removesuffix(".weight")
            head = bare.partition(".")[0]
            if head in self.kind.shared:
                self.shared[bare] = tensor
                self._check(bare, tensor, head)
                continue
            if key.endswith(_TOKENS):
                self._keep_tokens(plain_name(key.removesuffix(_TOKENS)), tensor)
                continue
            renamed = self._renamed(key)
            found = self._split(renamed, heads)
            if found is None:
                if not any(word in self.kind.ignored for word in renamed.split(".")):
                    self._keep_plain(renamed, tensor)
                continue
            module, part = found
            if wrapped:
                module += ".base_layer" * key.count(".base_layer")
                found = module, part
            if ".base_layer.out_proj." in key:
                self._twice.add(module)
            first = origin.setdefault(found, key)
            if first != key:
                raise CheckpointError(f"{self.name} holds {part} of {module} twice, as {first} and as {key}")
            self._check(f"{part} of {module}", tensor, part)
            self.modules.setdefault(module, {})[part] = tensor
        self._check_shared()

    def _check_shared(self) -> None:
        known = {name.partition(".")[0] for name in self.shared}
        if not self.modules and (known or not (self.plain or self.tokens)):
            raise CheckpointError(f"{self.name} holds nothing for any layer{self._remedy}")
        needed = {part for form in self.kind.forms for part in form.shared}
        absent = [part for part in self.kind.shared if part not in known and (part in needed or self.kind.lacking)]
        if absent:
            raise CheckpointError(
                f"{self.name} does not hold {' and '.join(absent)}, which its layers share{self._remedy}"
            )

    @property
    def _remedy(self) -> str:
        return f"; {self.kind.lacking}" if self.kind.lacking else ""

    def _keep_tokens(self, module: str, tensor: Tensor) -> None:
        given = self.checkpoint.config.get("trainable_token_indices")
        if isinstance(given, Mapping):
            given = next((given[key] for key in given if f".{module}".endswith(f".{key}")), None)
        known = isinstance(given, list) and all(isinstance(place, int) and place >= 0 for place in given)
        if not given or not known:
            raise CheckpointError(
                f"{self.name} holds trained tokens of {module}, and trainable_token_indices in adapter_config.json "
                "does not say which"
            )
        if tensor.shape[:1] != (len(given),) or len(tensor.shape) != 2 or len(set(given)) < len(given):
            raise CheckpointError(
                f"{self.name} holds trained tokens of {module} as {list(tensor.shape)}, and trainable_token_indices in "
                f"adapter_config.json gives {len(set(given))} tokens"
            )
        self._check(f"the trained tokens of {module}", tensor, "")
        self.tokens[f"{module}.weight"] = tuple(given), tensor

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
                if declared(part) in self.kind.parts:
                    return plain_name(".".join(words[:place])), part
        return None

    def _check(self, what: str, tensor: Tensor, part: str) -> None:
        place = part in self.kind.places
        full = tensor.size > 0 or self.kind.may_be_empty
        if not full or not (place or dtypes.is_float(tensor.dtype)):
            raise CheckpointError(
                f"{self.name}: {what} is {dtypes.name_of(tensor.dtype)} {list(tensor.shape)}; "
                f"{'places' if place else 'floats'} are needed, and not none of them"
            )


def _parameters(path: str, targets: list[str], base: Mapping[str, Tensor]) -> list[str]:
    """Return the base's tensors that are a module's own parameters, and targets of an adapter."""
    lasts = dict.fromkeys(target.rpartition(".")[2] for target in targets)
    outer = (path, path.partition(".")[2])
    names = [next((f"{one}.{last}" for one in outer if f"{one}.{last}" in base), "") for last in lasts]
    return [name for name in names if name and any(f".{name}".endswith(f".{target}") for target in targets)]


def plain_name(key: str) -> str:
    """Return the base's name for a tensor or module of an adapter."""
    key = re.sub(r"\.(base_layer|token_adapter)(?=\.|$)", "", key.removeprefix(PREFIX))
    return re.sub(r"\.modules_to_save(\.default)?\.", ".", key)


class Names:
    """The tensors of a base by their names, with or without the first parts, which wrappers of a model add.

    Names are also taken as transformers gives them to modules of models that it stores under others.
    """

    def __init__(self, base: Checkpoint) -> None:
        """Look at a base's names."""
        self._base = base

    @cached_property
    def _endings(self) -> dict[str, str | None]:
        """What names end with -> the name; None where several do."""
        known: dict[str, str | None] = {}
        for name in self._base:
            words = name.split(".")
            for first in range(1, min(len(words), _MOST_FIRST_PARTS + 1)):
                ending = ".".join(words[first:])
                known[ending] = None if ending in known else name
        return known

    def find(self, name: str, adapter: str) -> str:
        """Return the base's name of a tensor.

        Args:
            name: as an adapter has it.
            adapter: the adapter's name, for errors.

        Raises:
            PlanError: if the base has no such tensor.
        """
        for spelled in (name, *stored_names(name)):
            for candidate in (spelled, spelled.partition(".")[2]):
                if candidate in self._base:
                    return candidate
            longer = self._endings.get(spelled)
            if longer is not None:
                return longer
        quantised = "; it is quantised: fold into the model that it was made from"
        raise PlanError(
            f"{adapter} changes {name}, which {self._base.name} does not have"
            f"{quantised if self._base.config.get('quantization_config') else did_you_mean(name, self._base)}"
        )


def _either(names: Iterable[Iterable[str]]) -> str:
    return ", or ".join(dict.fromkeys(" and ".join(sorted(one)) for one in names))
