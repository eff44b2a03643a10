"""The ways of combining adapters that are known: each one small function with typed parameters."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from weightsmith.adapters.change import LowRank
from weightsmith.adapters.combine.inputs import Inputs
from weightsmith.adapters.combine.stack import Stack
from weightsmith.errors import MethodError, did_you_mean
from weightsmith.methods.parameters import Parameter, read_parameters
from weightsmith.methods.registry import all_methods, get_method
from weightsmith.methods.settings import complete

# The modules of this package that define methods, in the order in which pages list them.
_FAMILIES = ("sums", "units", "averages", "bases")
_ALSO = {"dare": "dare_linear", "sum": "linear", "robustmerge": "copa", "fedit": "fedavg"}
Works = Literal["products", "factors", "basis", "entries"]
# What becomes of biases and saved modules: their changes are added up, or averaged, or left out.
Saved = Literal["sum", "mean", "drop"]


@dataclass(frozen=True)
class Combiner:
    """One way of combining adapters.

    Attributes:
        name: by which it is asked for.
        works: on what: ``products``, one layer at a time; ``factors``, tensor by tensor, with a weight for each
            adapter; ``basis``, which gives several adapters; ``entries``, a method of :mod:`weightsmith.methods` on the
            deltas.
        function: what it does; see :func:`products`, :func:`factors` and :func:`basis`. None of entries.
        about: its description.
        source: where it is published.
        parameters: by name.
        exact: whether it gives the weighted sum of the deltas itself.
        own_rank: whether ``--rank`` is the rank it works with, not one to cut its result to.
        weighted: whether it takes weights.
        rank: returns the rank of its result for the ranks of a layer's adapters and its parameters, or None where only
            the result tells.
        check: raises a MethodError where parameters do not fit the adapters.
        averages: of products: turns the weights that were given into those of the sum.
    """

    name: str
    works: Works
    function: Callable[..., Any] | None
    about: str
    source: str
    parameters: Mapping[str, Parameter]
    exact: bool = False
    own_rank: bool = False
    weighted: bool = True
    rank: Callable[[Sequence[int], Mapping[str, Any]], int | None] | None = None
    averages: bool = False

    @property
    def summary(self) -> str:
        """The first line of the description."""
        return self.about.split("\n", 1)[0]

    @property
    def family(self) -> str:
        """The module that defines it."""
        return self.function.__module__.rpartition(".")[2] if self.function is not None else ""

    @property
    def saved(self) -> Saved:
        """What becomes of biases and saved modules, unless a person says."""
        return "sum" if self.exact else "mean"

    def complete(self, given: Mapping[str, Any], adapters: int) -> dict[str, Any]:
        """Fill in defaults, and check every value.

        Args:
            given: values by name.
            adapters: how many adapters there are.

        Raises:
            MethodError: for an unknown or missing parameter, or a value out of range.
        """
        if self.works == "entries":
            return complete(get_method(self.name), given, adapters, has_base=True)
        for name in given:
            if name.rstrip("_") not in self.parameters:
                takes = ", ".join(self.parameters) or "none"
                raise MethodError(
                    f"the method {self.name!r} has no parameter {name!r}{did_you_mean(name, self.parameters)}; it "
                    f"takes: {takes}"
                )
        plain = {name.rstrip("_"): value for name, value in given.items()}
        found: dict[str, Any] = {}
        for parameter in self.parameters.values():
            value = plain.get(parameter.name)
            if value is None and parameter.required:
                raise MethodError(f"the method {self.name!r} needs the parameter {parameter.name!r}")
            found[parameter.name] = parameter.check(parameter.default if value is None else value)
        return found

    def call(self, given: Any, parameters: Mapping[str, Any]) -> Any:
        """Run the function on what it works on."""
        assert self.function is not None
        return self.function(given, **{_python_name(name): value for name, value in parameters.items()})


_known: dict[str, Combiner] = {}


def products(
    name: str,
    *,
    source: str,
    exact: bool = False,
    own_rank: bool = False,
    rank: Callable[[Sequence[int], Mapping[str, Any]], int | None] | None = None,
) -> Callable[[Callable[..., LowRank]], Callable[..., LowRank]]:
    """Register a function from what all adapters hold for a layer (:class:`Stack`) to a product of two factors."""

    def register(function: Callable[..., LowRank]) -> Callable[..., LowRank]:
        _add(name, "products", function, source, exact=exact, own_rank=own_rank, rank=rank)
        return function

    return register


def factors(name: str, *, source: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function from :class:`Inputs` to one weight for each adapter.

    Its parameter ``average`` says what they weigh: ``products``, or ``factors``, tensor by tensor.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _add(name, "factors", function, source, averages=True)
        return function

    return register


def basis(name: str, *, source: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function that gives several adapters."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _add(name, "basis", function, source, own_rank=True, weighted=False)
        return function

    return register


def all_combiners() -> Mapping[str, Combiner]:
    """Return all methods that are made for adapters, by name."""
    for family in _FAMILIES:
        importlib.import_module(f"weightsmith.adapters.combine.{family}")
    # Some families import others, whichever comes first.
    return dict(sorted(_known.items(), key=lambda item: _FAMILIES.index(item[1].family)))


def get_combiner(name: str) -> Combiner:
    """Return a method: one made for adapters, or one for task vectors, that then works on the entries of the deltas.

    Raises:
        MethodError: if there is none of that name, or it is none that works on deltas alone.
    """
    known = all_combiners()
    wanted = _ALSO.get(name, name)
    if wanted in known:
        return known[wanted]
    try:
        method = get_method(wanted)
    except MethodError:
        every = [*known, *_ALSO, *all_methods()]
        raise MethodError(
            f"there is no method {name!r}{did_you_mean(name, every)}; 'weightsmith adapter merge --help' and "
            "'weightsmith methods' list them all"
        ) from None
    if method.roles or method.fisher == "required" or method.base != "required" or method.maximum == 1:
        raise MethodError(
            f"the method {name!r} works on whole models, not on the deltas of adapters; merge base+adapter with it by "
            "'weightsmith merge', and extract a LoRA from the result"
        )
    return Combiner(
        method.name,
        "entries",
        None,
        method.description,
        method.source,
        method.parameters,
        weighted="weight" in method.parameters,
    )


def _add(name: str, works: Works, function: Callable[..., Any], source: str, **others: Any) -> None:
    if name in _known and _known[name].function.__module__ != function.__module__:
        raise ValueError(f"two methods of combining adapters are named {name}")
    about = inspect.getdoc(function) or ""
    _known[name] = Combiner(name, works, function, about, source, read_parameters(function, name), **others)


def _python_name(name: str) -> str:
    return "lambda_" if name == "lambda" else name


__all__ = ["Combiner", "Inputs", "Saved", "Stack", "all_combiners", "basis", "factors", "get_combiner", "products"]
