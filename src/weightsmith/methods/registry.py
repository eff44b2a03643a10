"""The contract of a merge method, and the register of all of them.

A method is one function on a :class:`~weightsmith.methods.block.Block`, decorated with :func:`method`. Its
keyword parameters, their types, defaults and ranges are read from its signature; its page (``weightsmith
methods NAME``) from its docstring.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from weightsmith.errors import MethodError, did_you_mean
from weightsmith.methods.block import Form, Work
from weightsmith.methods.parameters import Param, Parameter, PerModel, read_parameters

__all__ = ["Continuation", "Method", "Param", "PerModel", "all_methods", "get_method", "load_plugin", "method"]

Granularity = Literal["elements", "rows", "filters", "tensor"]
BasePolicy = Literal["required", "optional", "unused"]
FisherPolicy = Literal["required", "optional", "unused"]
Property = Literal["idempotent", "symmetric", "translates", "removable"]
TrimScope = Literal["tensor", "layer", "model"]

# Importing a family registers its methods. A new family is added here and nowhere else.
_FAMILIES = (
    "linear",
    "averages",
    "sparse",
    "robust",
    "spherical",
    "deltas",
    "transfer",
    "dropping",
    "consensus",
    "interference",
    "selective",
    "stock",
    "columns",
    "spectral",
    "subspaces",
    "knots",
    "continual",
)
_ENTRY_POINTS = "weightsmith.methods"


@dataclass(frozen=True)
class Continuation:
    """How a merge is gone on with: its result becomes the first model of the next.

    Attributes:
        parameters: names of the parameters by which a result takes part.
        state: what the statistic found (None where the method has none), parameters and number of models -> their
            values, or None where a merge with these cannot be gone on with.
    """

    parameters: tuple[str, ...] = ()
    state: Callable[[Any, Mapping[str, Any], int], Mapping[str, float] | None] = lambda *_: {}


@dataclass(frozen=True)
class Method:
    """A merge method and all that it declares about itself.

    Attributes:
        name: the name recipes use.
        function: ``function(block, **parameters)``, or ``function(block, statistic, **parameters)`` where the
            method has a statistic; returns an array of the blocks' shape.
        description: the docstring.
        source: the paper or tool the method comes from.
        base: whether it needs a base, can use one, or has no use for one.
        minimum: least number of models, the base not counted.
        maximum: greatest number of models, or None.
        parameters: by name, in order.
        reads: parameters and a tensor's form -> what a block must hold.
        work: None, or parameters, a tensor's form and the number of models -> what its linear algebra costs there;
            None of it where it has none.
        statistic: None, or ``statistic(scope, **parameters)``, a generator
            (:data:`~weightsmith.methods.block.Statistic`); it is given those parameters that it names.
        scope: name of the parameter that says what the statistic ranges over (``tensor``, ``layer`` or
            ``model``), or None for the tensor.
        selects: whether its statistic selects by rank, and so holds candidates in memory.
        random: whether it draws random numbers.
        fisher: whether it needs, can use, or has no use for checkpoints of importances of the weights.
        also: other names under which the same formula is published.
        roles: what the base (if one is required) and each model is to the method, in order, where they are not alike;
            the last one is also that of all further models. Such a method takes models as they are listed, the base
            among them if it is listed too.
        least: None, or ``least(**parameters)``, the least number of models with those parameters that it names.
        check: None, or a function that raises MethodError for parameters that do not go together.
        properties: what the conformance battery may expect: ``idempotent`` (copies of one model give that
            model, weights being equal and normalised), ``symmetric`` (order of models does not matter),
            ``translates`` (a checkpoint added to base and models is added to the result), ``removable``
            (a model of weight 0 has no influence).
        carries: None, or parameters -> whether the result is the first model's tensor as it is; it is then
            copied, not computed.
        continues: None, or how a merge is gone on with when further models arrive.
        compat: tool name -> parameter values that restore that tool's behaviour.
        example: parameters that show the method at work, for documentation and the battery; per-model ones
            hold a single value.
    """

    name: str
    function: Callable[..., Any]
    description: str
    source: str
    base: BasePolicy
    minimum: int
    maximum: int | None
    parameters: Mapping[str, Parameter]
    reads: Callable[[Mapping[str, Any], Form], Granularity]
    work: Callable[[Mapping[str, Any], Form, int], Work | None] | None = None
    statistic: Callable[..., Any] | None = None
    statistic_parameters: tuple[str, ...] = ()
    scope: str | None = None
    selects: bool = False
    random: bool = False
    fisher: FisherPolicy = "unused"
    also: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()
    least: Callable[..., int] | None = None
    least_parameters: tuple[str, ...] = ()
    check: Callable[[Mapping[str, Any]], None] | None = None
    properties: frozenset[Property] = frozenset()
    carries: Callable[[Mapping[str, Any]], bool] | None = None
    continues: Continuation | None = None
    compat: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    example: Mapping[str, Any] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """The first line of the description."""
        return self.description.split("\n", 1)[0]

    @property
    def cost(self) -> str:
        """What it costs, in words."""
        if self.work is not None:
            return "takes whole matrices apart; 'weightsmith plan' counts the decompositions and operations"
        if self.statistic is None:
            return "one pass over the data"
        return "some passes over the data: first for what it must know of a whole tensor, last for the result"

    @property
    def needs(self) -> str:
        """What it is to be given, in words."""
        if self.maximum is None:
            count = f"{self.minimum}+ models"
        elif self.maximum == self.minimum:
            count = f"{self.minimum} model{'s' if self.minimum > 1 else ''}"
        else:
            count = f"{self.minimum} to {self.maximum} models"
        base = {"required": ", a base", "optional": ", base optional", "unused": ""}[self.base]
        fisher = {"required": ", Fisher checkpoints", "optional": ", Fisher checkpoints optional", "unused": ""}
        return count + base + fisher[self.fisher]

    @property
    def family(self) -> str:
        """What it shares with the methods that are defined beside it, in words."""
        page = inspect.getdoc(inspect.getmodule(self.function)) or self.function.__module__
        return page.split("\n", 1)[0].removesuffix(".")

    @property
    def order(self) -> str:
        """What the base and the models are to it, in words; empty where models are alike."""
        roles = list(self.roles)
        base = [f"base_model is {roles.pop(0)}"] if roles and self.base == "required" else []
        return "; ".join([*base, f"the models are, in this order, {', '.join(roles)}"]) if roles else ""

    def parameter(self, name: str) -> Parameter:
        """Return the parameter of that name.

        Raises:
            MethodError: if there is none; the nearest known one is suggested.
        """
        found = self.parameters.get(name)
        if found is None:
            known = ", ".join(self.parameters) or "none"
            raise MethodError(
                f"method {self.name!r} has no parameter {name!r}{did_you_mean(name, self.parameters)}; "
                f"it takes: {known}"
            )
        return found

    def call(self, block: Any, statistic: Any, parameters: Mapping[str, Any]) -> Any:
        """Run the method on one block. Parameter names that are Python keywords are adapted here."""
        arguments = {_python_name(name): value for name, value in parameters.items()}
        if self.statistic is None:
            return self.function(block, **arguments)
        return self.function(block, statistic, **arguments)

    def start_statistic(self, scope: Any, parameters: Mapping[str, Any]) -> Any:
        """Start the statistic's generator with the parameters that it names."""
        if self.statistic is None:
            raise MethodError(f"method {self.name!r} has no statistic")
        return self.statistic(scope, **_chosen(parameters, self.statistic_parameters))

    def check_number(self, models: int, parameters: Mapping[str, Any]) -> None:
        """Check that there are as many models as these parameters take.

        Raises:
            MethodError: if there are too few.
        """
        if self.least is None:
            return
        least = self.least(**_chosen(parameters, self.least_parameters))
        if models < least:
            given = [name for name in self.least_parameters if parameters[name] is not None]
            with_them = ", ".join(f"{name}: {parameters[name]}" for name in given)
            raise MethodError(
                f"method {self.name!r} takes at least {least} model(s) with {with_them}, and {models} are given"
            )


_METHODS: dict[str, Method] = {}
# Another name -> the method's.
_ALSO: dict[str, str] = {}
Function = TypeVar("Function", bound=Callable[..., Any])


def method(
    name: str | None = None,
    *,
    base: BasePolicy = "unused",
    minimum: int = 1,
    maximum: int | None = None,
    reads: Granularity | Callable[[Mapping[str, Any], Form], Granularity] = "elements",
    work: Callable[[Mapping[str, Any], Form, int], Work | None] | None = None,
    statistic: Callable[..., Any] | None = None,
    scope: str | None = None,
    selects: bool = False,
    random: bool = False,
    fisher: FisherPolicy = "unused",
    also: Iterable[str] = (),
    roles: Iterable[str] = (),
    least: Callable[..., int] | None = None,
    check: Callable[[Mapping[str, Any]], None] | None = None,
    properties: Iterable[Property] = (),
    carries: Callable[[Mapping[str, Any]], bool] | None = None,
    continues: Continuation | None = None,
    source: str = "",
    compat: Mapping[str, Mapping[str, Any]] | None = None,
    example: Mapping[str, Any] | None = None,
) -> Callable[[Function], Function]:
    """Register a function as a merge method. The function itself is returned unchanged.

    See :class:`Method` for the meaning of the arguments; the name defaults to the function's.

    Raises:
        MethodError: if the function's signature cannot be a method's, or the name is taken by another function.
    """

    def decorate(function: Function) -> Function:
        chosen = name or function.__name__
        names = (chosen, *also)
        for one in names:
            taken = _METHODS.get(_ALSO.get(one, one))
            if taken is not None and not _same_function(taken.function, function):
                raise MethodError(f"there is a method {one!r} already, from {taken.function.__module__}")
        _ALSO.update(dict.fromkeys(names[1:], chosen))
        parameters = read_parameters(function, chosen)
        _METHODS[chosen] = Method(
            name=chosen,
            function=function,
            description=inspect.getdoc(function) or "",
            source=source,
            base=base,
            minimum=minimum,
            maximum=maximum,
            parameters=parameters,
            reads=reads if callable(reads) else (lambda *_: reads),
            work=work,
            statistic=statistic,
            statistic_parameters=_named_by(statistic, parameters, chosen, "the statistic"),
            scope=scope,
            selects=selects,
            random=random,
            fisher=fisher,
            also=names[1:],
            roles=tuple(roles),
            least=least,
            least_parameters=_named_by(least, parameters, chosen, "the least number of models"),
            check=check,
            properties=frozenset(properties),
            carries=carries,
            continues=continues,
            compat=compat or {},
            example=example or {},
        )
        return function

    return decorate


def get_method(name: str) -> Method:
    """Return the method of that name, or that is known by it as well, from here, a plugin or an entry point.

    Raises:
        MethodError: if there is no such method; the nearest known name is suggested.
    """
    _load_families()
    if _ALSO.get(name, name) not in _METHODS:
        _load_entry_points()
    found = _METHODS.get(_ALSO.get(name, name))
    if found is None:
        raise MethodError(
            f"there is no method {name!r}{did_you_mean(name, [*_METHODS, *_ALSO])}; "
            "'weightsmith methods' lists them all"
        )
    return found


def all_methods() -> dict[str, Method]:
    """Return every method by name: those of this package first, in the order of their families."""
    _load_families()
    _load_entry_points()
    return dict(_METHODS)


def _load_families() -> None:
    for family in _FAMILIES:
        importlib.import_module(f"weightsmith.methods.{family}")


def _load_entry_points() -> None:
    from importlib.metadata import entry_points

    for entry in entry_points(group=_ENTRY_POINTS):
        entry.load()


def _same_function(one: Callable[..., Any], other: Callable[..., Any]) -> bool:
    # A plugin file loaded twice defines its functions anew; that is not a clash of names.
    return (one.__qualname__, inspect.getfile(one)) == (other.__qualname__, inspect.getfile(other))


def _python_name(name: str) -> str:
    return "lambda_" if name == "lambda" else name


def _chosen(parameters: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {_python_name(name): parameters[name] for name in names}


def _named_by(
    function: Callable[..., Any] | None, parameters: Mapping[str, Parameter], name: str, what: str
) -> tuple[str, ...]:
    """Return the method's parameters that a function beside it asks for, by the names of its own."""
    if function is None:
        return ()
    wanted = [
        p.name.rstrip("_")
        for p in inspect.signature(function).parameters.values()
        if p.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    unknown = [w for w in wanted if w not in parameters]
    if unknown:
        raise MethodError(f"{what} of {name!r} names {unknown[0]!r}, which the method does not take")
    return tuple(wanted)


def load_plugin(path: str) -> list[Method]:
    """Run a Python file that defines methods, and return the methods it added.

    The file is a program and runs with all your rights: give only files you trust. Recipes cannot name one.

    Raises:
        MethodError: if the file does not exist, fails, or defines no method.
    """
    from importlib.util import module_from_spec, spec_from_file_location
    from pathlib import Path

    _load_families()
    file = Path(path)
    if not file.is_file():
        raise MethodError(f"there is no file {path} to load methods from")
    spec = spec_from_file_location("weightsmith_plugin_" + re.sub(r"\W", "_", file.stem), file)
    if spec is None or spec.loader is None:
        raise MethodError(f"{path} is not a Python file; methods are loaded from .py files")
    module = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise MethodError(f"{path} failed while it was loaded: {type(error).__name__}: {error}") from error
    added = [m for m in _METHODS.values() if inspect.getfile(m.function) == str(file)]
    if not added:
        raise MethodError(f"{path} defines no method: decorate a function with @weightsmith.method(...)")
    return added
