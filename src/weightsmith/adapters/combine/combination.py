"""A combination of adapters that is not written yet: its tensors are computed as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from weightsmith.adapters.combine import layout, peft
from weightsmith.adapters.combine.bases import COEFFICIENTS, DESCRIPTION_FILE, Bases, Description, folder_name
from weightsmith.adapters.combine.inputs import Inputs
from weightsmith.adapters.combine.making import Limit, Maker, Product, in_turns
from weightsmith.adapters.combine.output import ADAPTER, CONFIG, AdapterOutput
from weightsmith.adapters.combine.recipe import Recipe, combiner_of, dtype_of, parameters_of
from weightsmith.adapters.combine.report import LayerReport, Report
from weightsmith.adapters.combine.saved import layer_biases, saved_tensors
from weightsmith.adapters.combine.tensors import alike, rows_of, weighted
from weightsmith.adapters.peft_config import config_text
from weightsmith.checkpoint.checkpoint import Checkpoint
from weightsmith.checkpoint.layout import Part
from weightsmith.checkpoint.tensor import Tensor
from weightsmith.engine.threads import ThreadMapper, default_threads
from weightsmith.errors import MethodError, PlanError

_Built = tuple[dict[str, Tensor], dict[str, str], list[Part], Mapping[str, Any]]
_LORA = [Part("", ADAPTER)]


class Combination(AdapterOutput):
    """A combination of adapters that is not written yet.

    Attributes:
        recipe: how they are combined.
    """

    def __init__(
        self,
        recipe: Recipe,
        adapters: Sequence[Checkpoint],
        base: Checkpoint | None = None,
        *,
        threads: int | None = None,
        memory: int | None = None,
    ) -> None:
        """Look at the adapters, and decide what is written.

        Reads what must be known of values before anything can be laid out: the ranks that hold the sum exactly, or a
        share of it, where no rank is given; one layer at a time in each thread.

        Args:
            recipe: how they are combined.
            adapters: the adapters.
            base: the model that they are for.
            threads: how many threads to use; by default one per core.
            memory: most bytes to hold while ranks are found.

        Raises:
            CheckpointError: if one cannot be read, is no adapter, or holds what is not finite.
            MethodError: if the method is unknown or does not take these parameters.
            PlanError: if they cannot be combined so.
        """
        self.recipe = recipe
        self._threads = threads or default_threads()
        self._memory = memory
        combiner = combiner_of(recipe)
        self._combiner = combiner
        parameters = parameters_of(recipe, combiner)
        averages = combiner.works == "factors" and parameters.get("average", "factors") == "factors"
        self._adapters = Inputs(adapters, recipe.weights, base, seed=recipe.seed, low_rank=not averages)
        self._dtype = dtype_of(recipe.dtype, self._adapters.dtype)
        self._parameters = parameters
        if combiner.works == "factors":
            self._adapters.weights = tuple(combiner.call(self._adapters, parameters))
        self._makers: list[Maker] = []
        if averages:
            built = self._of_tensors()
        elif combiner.works == "basis":
            built = self._of_bases()
        else:
            built = self._of_layers()
        tensors, files, parts, config = built
        super().__init__(
            "+".join(one.name for one in adapters),
            tensors,
            files,
            inputs=[*adapters, *([base] if base is not None else [])],
            beside=adapters[0].companions.files,
            config=config,
            warnings=[*self._adapters.warnings, *self._left_out()],
            parts=parts,
        )

    def to_yaml(self) -> str:
        """See :meth:`Output.to_yaml`."""
        return self.recipe.to_yaml()

    def report(self) -> Report:
        """Return ranks and errors; layers that this run did not make are made to be measured.

        Raises:
            CheckpointError: if one cannot be read, or holds what is not finite.
        """
        layers = self._map(lambda maker: maker.known_facts(), self._makers)
        return Report(
            self.recipe.method,
            self._parameters,
            tuple(adapter.name for adapter in self._adapters.adapters),
            self._adapters.weights,
            tuple(layers),
            tuple(self._notes(layers)),
        )

    # What the three kinds of results are made of: tensors, files, folders and a config.

    def _of_layers(self) -> _Built:
        inputs, recipe = self._adapters, self.recipe
        if not inputs.sites:
            raise PlanError("the adapters change no layer by factors: there is nothing to combine")
        limit = Limit(None if self._combiner.own_rank else recipe.rank, recipe.energy, recipe.decomposition)
        if recipe.compat is not None:
            self._makers, config = peft.combination(inputs, recipe.method, self._parameters, recipe.rank, self._dtype)
            return in_turns(self._makers), {CONFIG: config_text(config)}, _LORA, config
        found = [
            Product(inputs, site, self._combiner, self._parameters, limit, self._dtype)
            for site in inputs.sites.values()
        ]
        self._makers = [*found]
        self._map(lambda maker: maker.settle(), found)
        tensors = in_turns(found)
        sums = self._combiner.exact or self._combiner.works == "factors"
        biases = layer_biases(inputs, self._combiner.name, self._dtype, sums=sums)
        plain = saved_tensors(inputs, recipe.saved or self._combiner.saved, self._dtype)
        ranks = {maker.site.module: int(maker.rank or 1) for maker in found}
        config = layout.lora_config(inputs, ranks, plain, bias=bool(biases))
        return tensors | biases | plain, {CONFIG: config_text(config)}, _LORA, config

    def _of_tensors(self) -> _Built:
        inputs = self._adapters
        only = self._parameters.get("only")
        wanted = {part.strip() for part in only.split(",")} if only else None
        first = inputs.adapters[0].checkpoint
        tensors: dict[str, Tensor] = dict(first)
        chosen = [name for name in alike(inputs) if wanted is None or wanted & set(name.split("."))]
        if not chosen:
            raise MethodError(f"no tensor of {first.name} has a part named {only}")
        for name in chosen:
            tensors[name] = weighted(name, rows_of(inputs, name), inputs.weights, self._dtype)
        config = dict(first.config)
        return tensors, {CONFIG: config_text(config)}, _LORA, config

    def _of_bases(self) -> _Built:
        inputs = self._adapters
        for adapter in inputs.adapters:
            if adapter.plain:
                raise PlanError(
                    f"{adapter.name} holds {next(iter(adapter.plain))} beside its factors, which a basis of factors "
                    "does not give back; bundle the models instead: weightsmith bundle create --kind rmm"
                )
        kind = self._combiner.call(inputs, self._parameters)
        found = [Bases(inputs, site, kind, self._dtype) for site in inputs.sites.values()]
        self._makers = [*found]
        config = layout.lora_config(inputs, {maker.site.module: maker.rank for maker in found})
        count = found[0].count
        folders = [folder_name(number) for number in range(count)]
        files = {f"{folder}/{CONFIG}": config_text(config) for folder in folders}
        tasks = dict(zip(inputs.labels, inputs.configs, strict=True))
        files[DESCRIPTION_FILE] = Description(count, kind.centre, tasks).to_text()
        parts = [Part(f"{folder}/", ADAPTER) for folder in folders] + [Part(f"{COEFFICIENTS}/", COEFFICIENTS)]
        return in_turns(found), files, parts, {}

    # Threads and words.

    def _map(self, function: Callable[[Any], Any], makers: Sequence[Maker]) -> list[Any]:
        """Run a function on makers, as many at a time as memory allows."""
        largest = max((maker.held for maker in makers), default=0)
        if self._memory is not None and largest > self._memory:
            module = max(makers, key=lambda maker: maker.held).site.module
            raise PlanError(
                f"{module} needs about {largest / 1e6:,.0f} MB of memory, and --memory allows "
                f"{self._memory / 1e6:,.0f} MB"
            )
        at_once = self._threads if self._memory is None else max(min(self._threads, self._memory // max(largest, 1)), 1)
        with ThreadMapper(at_once, matrices=True) as mapper:
            return list(mapper(function, makers))

    def _left_out(self) -> list[str]:
        """Return what is said of saved modules that PEFT's combinations leave out."""
        if self.recipe.compat is None:
            return []
        holding = [adapter.name for adapter in self._adapters.adapters if adapter.plain]
        return [f"{name}: its biases and saved modules are left out, as PEFT leaves them" for name in holding]

    def _notes(self, layers: Sequence[LayerReport]) -> list[str]:
        notes = []
        limited = self.recipe.rank is not None or self.recipe.energy is not None
        if self._combiner.name in ("linear", "cat", "orthogonal") and not limited and layers:
            most = max(layer.rank for layer in layers)
            notes.append(f"every rank that holds the sum is kept, up to {most}; --rank or --energy makes it smaller")
        if any(None in layer.ranks for layer in layers):
            notes.append(
                "changes of no low rank (DoRA and the like) were formed on the base, and the sum cut to the rank"
            )
        if self._combiner.works == "entries":
            notes.append(
                "the method works on the deltas entry by entry, and an SVD cuts its result: a larger --rank loses less"
            )
        return notes
