"""The parameters that tensors are merged with: a merge has many tensors, and few different sets of parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from weightsmith.methods.settings import complete
from weightsmith.plan.slots import Contribution, Settings, Slot
from weightsmith.plan.ways import Way
from weightsmith.recipe.schedule import Place, Rule, constant, rules, value_at


class Resolver:
    """Finds the parameters of the tensors that are made in one way.

    What a recipe says is looked through once for every combination of settings, and parameters are checked once for
    every combination of values: neither once for every tensor.
    """

    def __init__(self, way: Way, compat: str | None) -> None:
        """Start with nothing known.

        Args:
            way: the method, and what a rule gives for it.
            compat: the tool whose defaults to take, or None.
        """
        self._way = way
        self._compat = compat
        self._known: dict[tuple[int, ...], _Combination] = {}

    def resolve(self, slot: Slot, models: Sequence[Contribution], *, has_base: bool) -> Mapping[str, Any]:
        """Return the complete parameters of a slot's tensor; do not change them, other tensors share them.

        Args:
            slot: the slot.
            models: those who take part in it, the base not among them.
            has_base: whether there is a base beside them.

        Raises:
            MethodError: as :func:`weightsmith.methods.settings.complete` does.
        """
        settings = tuple((self._way.settings(one.model), one.settings) for one in models)
        key = (has_base, id(slot.levels), *(id(each) for of_model in settings for each in of_model))
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = _Combination(self._way, slot.levels, settings)
        given = known.values(slot.where)
        # As text 1, 1.0 and True differ, and so do 0.0 and -0.0.
        text = repr(given) if given else ""
        found = known.completed.get(text)
        if found is None:
            found = known.completed[text] = complete(
                self._way.method, {**known.fixed, **given}, len(models), has_base=has_base, compat=self._compat
            )
        return found


class _Combination:
    """Settings that come together, and what has been made of them.

    Attributes:
        fixed: parameter -> what it is given for all tensors.
        completed: what the other parameters are given, as text -> all parameters.
    """

    def __init__(self, way: Way, levels: tuple[Settings, ...], settings: tuple[tuple[Settings, Settings], ...]) -> None:
        # They are known by their addresses, which must not come free.
        self._kept = levels, settings
        self.fixed: dict[str, Any] = {}
        self.completed: dict[str, Mapping[str, Any]] = {}
        self._varying: list[tuple[str, bool, list[tuple[Rule, ...]]]] = []
        shared = (way.parameters, *levels)
        own = [(of_rule, way.parameters, of_model, *levels) for of_rule, of_model in settings]
        for parameter in way.method.parameters.values():
            name = parameter.name
            reached = own if parameter.per_model else [shared]
            candidates = [rules(each, name) for each in reached]
            if all(constant(one) for one in candidates):
                self.fixed[name] = _given(candidates, Place(""), per_model=parameter.per_model)
            else:
                self._varying.append((name, parameter.per_model, candidates))

    def values(self, where: Place) -> dict[str, Any]:
        """Return what the parameters that vary are given for a tensor."""
        return {name: _given(candidates, where, per_model=each) for name, each, candidates in self._varying}


def _given(candidates: Sequence[Sequence[Rule]], where: Place, *, per_model: bool) -> Any:
    found = [value_at(one, where) for one in candidates]
    return found if per_model else found[0]
