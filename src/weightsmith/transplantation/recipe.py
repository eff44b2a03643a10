"""How a model is given another one's tokenizer: all settings, checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import yaml

from weightsmith.architecture.vocabulary import MOST_PADDING
from weightsmith.errors import MethodError, did_you_mean, shown
from weightsmith.transplantation import neighbours, similarity
from weightsmith.transplantation.nearest import Metric
from weightsmith.transplantation.neighbours import Scheme
from weightsmith.transplantation.pursuit import ANCHORS

Method = Literal[
    "omp",
    "interpolation",
    "nearest",
    "wechsel",
    "focus",
    "landmark_pca",
    "subword",
    "mean",
    "zero",
    "random",
    "gaussian",
]
METHODS: tuple[Method, ...] = get_args(Method)
Pieces = Literal["mean", "sum", "weighted_mean", "first_last"]
Where = Literal["none", "embeddings", "head", "both"]
Template = Literal["donor", "keep", "none"]
Part = Literal["embeddings", "head"]

# Methods that look at where the donor's tokens lie.
SEARCHING: frozenset[Method] = frozenset({"omp", "interpolation", "nearest", "wechsel", "focus", "landmark_pca"})
# Setting -> the methods that it means something for.
_MEANT: dict[str, frozenset[Method]] = {
    "atoms": frozenset({"omp"}),
    "centred": frozenset({"omp"}),
    "neighbours": frozenset({"omp", "interpolation", "wechsel"}),
    "temperature": frozenset({"wechsel"}),
    "weights": frozenset({"interpolation"}),
    "metric": frozenset({"interpolation"}),
    "pieces": frozenset({"subword"}),
    "auxiliary": SEARCHING,
    "seed": frozenset({"random", "gaussian"}),
    "scale": frozenset({"random", "gaussian"}),
}
_NEIGHBOURS: dict[Method, int] = {"interpolation": neighbours.NEIGHBOURS, "wechsel": similarity.NEIGHBOURS}
# Hewitt multiplies the covariance by 1e-5.
_SCALES: dict[Method, float] = {"gaussian": 1e-5**0.5}


@dataclass(frozen=True)
class Way:
    """How the rows of new tokens are made, in one part of the model.

    Attributes:
        method: one of :data:`METHODS`.
        atoms: of ``omp``, how many anchors make up a token.
        centred: of ``omp``, whether rows are taken from the mean of the anchors' rows on, here as there.
        neighbours: of ``omp``, how many anchors next to each token are looked at, None for all; of ``interpolation``
            and ``wechsel``, how many are taken.
        temperature: of ``wechsel``, that of the softmax.
        weights: of ``interpolation``, how neighbours are weighed.
        metric: of ``interpolation``, what near means.
        pieces: of ``subword``, what is made of the pieces.
        scale: of ``random`` and ``gaussian``, what deviations from the mean are multiplied by.
        seed: of these, the seed.
    """

    method: Method
    atoms: int
    centred: bool
    neighbours: int | None
    temperature: float
    weights: Scheme
    metric: Metric
    pieces: Pieces
    scale: float
    seed: int

    @property
    def searches(self) -> bool:
        """Whether it looks at where the donor's tokens lie."""
        return self.method in SEARCHING


@dataclass(frozen=True)
class Recipe:
    """How a model is given another one's tokenizer.

    Attributes:
        model: the model's reference.
        donor: the reference of the model, or of the tokenizer alone, that is taken over.
        method: how the rows of new tokens are made.
        head_method: how those of the head are, where it is another way.
        atoms: see :class:`Way`; 64 by default.
        centred: see :class:`Way`.
        neighbours: see :class:`Way`; by default all anchors for ``omp``, 64 for ``interpolation``, 10 for ``wechsel``.
        temperature: see :class:`Way`; 0.1 by default.
        weights: see :class:`Way`; ``distance`` by default.
        metric: see :class:`Way`; ``euclidean`` by default.
        pieces: see :class:`Way`; ``mean`` by default.
        byte_match: where ``<0x41>`` is taken for ``A``.
        prefix_match: where a new token takes the row of the longest token that it begins with.
        trained_only: whether tokens that look untrained are kept out of the anchors.
        auxiliary: a file with a vector for each of the donor's tokens, searched in place of its embeddings.
        pad_to_multiple_of: the number of rows is made a multiple of it.
        keep_size: whether there are at least as many rows as before.
        scale: see :class:`Way`; 1 by default for ``random``, and for ``gaussian`` the root of 1e-5.
        chat_template: ``donor``'s, ``keep`` for the model's own, or ``none``.
        seed: of ``random`` and ``gaussian``.
    """

    model: str
    donor: str
    method: Method = "omp"
    head_method: Method | None = None
    atoms: int | None = None
    centred: bool = False
    neighbours: int | None = None
    temperature: float | None = None
    weights: Scheme | None = None
    metric: Metric | None = None
    pieces: Pieces | None = None
    byte_match: Where = "none"
    prefix_match: Where = "none"
    trained_only: bool = False
    auxiliary: str | None = None
    pad_to_multiple_of: int | None = None
    keep_size: bool = False
    scale: float | None = None
    chat_template: Template = "donor"
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_choice("method", METHODS)
        for name, choices in (
            ("head_method", METHODS),
            ("weights", get_args(Scheme)),
            ("metric", get_args(Metric)),
            ("pieces", get_args(Pieces)),
        ):
            if getattr(self, name) is not None:
                self._check_choice(name, choices)
        for name, choices in (("byte_match", get_args(Where)), ("prefix_match", get_args(Where))):
            self._check_choice(name, choices)
        self._check_choice("chat_template", get_args(Template))
        for name in ("atoms", "neighbours", "pad_to_multiple_of"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise MethodError(f"{name} is {shown(value)}; a whole number from 1 is needed")
        if self.pad_to_multiple_of is not None and self.pad_to_multiple_of > MOST_PADDING:
            raise MethodError(f"pad_to_multiple_of is {self.pad_to_multiple_of:,}; at most {MOST_PADDING:,} is meant")
        for name in ("centred", "trained_only", "keep_size"):
            if not isinstance(getattr(self, name), bool):
                raise MethodError(f"{name} is {shown(getattr(self, name))}; true or false is needed")
        if type(self.seed) is not int:
            raise MethodError(f"seed is {shown(self.seed)}; a whole number is needed")
        if self.auxiliary is not None and not isinstance(self.auxiliary, str):
            raise MethodError(f"auxiliary is {shown(self.auxiliary)}; the path of a file is needed")
        for name, such in (("temperature", 0.1), ("scale", 1)):
            if getattr(self, name) is not None and not _is_positive(getattr(self, name)):
                raise MethodError(f"{name} is {shown(getattr(self, name))}; a number above 0 is needed, such as {such}")
        self._check_given()
        if "omp" in self._methods and self.neighbours is not None and self.neighbours < self.way("embeddings").atoms:
            raise MethodError(
                f"each token is to be made of {self.way('embeddings').atoms:,} anchors, picked among "
                f"{self.neighbours:,} neighbours: give at least as many neighbours as atoms"
            )

    def only(self, method: Method) -> Recipe:
        """Return the recipe with one method, and of the settings those that mean something for it.

        A number of neighbours is meant for the recipe's own methods: 32 of ``interpolation`` are too few for ``omp``.
        """
        others: dict[str, Any] = {
            field.name: field.default
            for field in dataclasses.fields(self)
            if field.name in _MEANT
            and (method not in _MEANT[field.name] or (field.name == "neighbours" and method not in self._methods))
        }
        return dataclasses.replace(self, method=method, head_method=None, **others)

    def way(self, part: Part) -> Way:
        """Return how the rows of new tokens are made in a part of the model, with all defaults."""
        method = self.head_method if part == "head" and self.head_method is not None else self.method
        return Way(
            method,
            ANCHORS if self.atoms is None else self.atoms,
            self.centred and method == "omp",
            _NEIGHBOURS.get(method) if self.neighbours is None else self.neighbours,
            similarity.TEMPERATURE if self.temperature is None else float(self.temperature),
            self.weights or "distance",
            self.metric or "euclidean",
            self.pieces or "mean",
            _SCALES.get(method, 1.0) if self.scale is None else float(self.scale),
            self.seed,
        )

    def matches_bytes(self, part: Part) -> bool:
        """Whether ``<0x41>`` is taken for ``A`` in a part of the model."""
        return self.byte_match in (part, "both")

    def matches_prefixes(self, part: Part) -> bool:
        """Whether new tokens take the row of a token that they begin with, in a part of the model."""
        return self.prefix_match in (part, "both")

    def to_json(self) -> dict[str, Any]:
        """Return the settings that are not the default."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        }

    def to_yaml(self) -> str:
        """Return it as YAML, as the result's manifest keeps it."""
        return yaml.safe_dump({"transplant": self.to_json()}, sort_keys=False, allow_unicode=True)

    @property
    def _methods(self) -> list[Method]:
        """The methods that are used."""
        return [self.method] if self.head_method in (None, self.method) else [self.method, self.head_method]

    def _check_given(self) -> None:
        """Refuse settings that mean nothing for the methods."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name, meant in _MEANT.items():
            if getattr(self, name) != defaults[name] and not meant.intersection(self._methods):
                raise MethodError(
                    f"{name} means nothing for the method {' and '.join(self._methods)}; it is a setting of "
                    f"{', '.join(one for one in METHODS if one in meant)}"
                )

    def _check_choice(self, name: str, choices: Sequence[str]) -> None:
        value = getattr(self, name)
        if value not in choices:
            near = did_you_mean(value, choices) if isinstance(value, str) else ""
            raise MethodError(f"{name} is {shown(value)}; one of {', '.join(choices)} is needed{near}")


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")
