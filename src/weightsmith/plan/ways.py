"""Which method makes which tensor: the first rule of a recipe that holds decides, the merge's own takes the rest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weightsmith.errors import MethodError, PlanError, RecipeError, did_you_mean
from weightsmith.methods.registry import Method, get_method
from weightsmith.methods.settings import check_inputs
from weightsmith.plan.slots import NO_SETTINGS, Contribution, Model, Settings, Slot
from weightsmith.recipe.load import references
from weightsmith.recipe.schedule import Place, holds
from weightsmith.recipe.schema import Merge, ScopeRule


@dataclass(frozen=True, eq=False)
class Way:
    """How some of a merge's tensors are made.

    Attributes:
        method: the method.
        rule: the rule that says so, or None for the merge itself.
        place: the rule's place in the recipe, ``rules[0]``; empty for the merge itself.
        models: reference -> parameters that the rule gives for it, of the models that alone take part; None for all.
        adds_base: whether, for a method without use for a base, a base that is not listed is one of the models.
    """

    method: Method
    rule: ScopeRule | None = None
    place: str = ""
    models: Mapping[str, Settings] | None = None
    adds_base: bool = False

    @property
    def parameters(self) -> Settings:
        """What the rule gives for all its models."""
        return NO_SETTINGS if self.rule is None else self.rule.parameters

    def settings(self, model: Model) -> Settings:
        """Return what the rule gives for one model."""
        return (self.models or {}).get(model.reference, NO_SETTINGS)

    def named(self, text: object) -> str:
        """Return a sentence with the rule that it is about before it."""
        return f"{self.place}: {text}" if self.place else str(text)

    def participants(self, slot: Slot) -> tuple[Contribution | None, list[Contribution]]:
        """Tell the base from the models; a method without use for a base treats it as any other model.

        Raises:
            PlanError: if none of the rule's models contributes to the slot.
        """
        models = list(slot.models) if self.models is None else self._chosen(slot, self.models)
        if slot.base is None:
            return None, models
        own = slot.base.model
        if self.method.base != "unused":
            # To a method whose models have roles, the base may be one of them as well.
            return slot.base, [one for one in models if one.model is not own or self.method.roles]
        if self.adds_base and not any(one.model is own for one in models):
            models.append(slot.base)
        return None, models

    def _chosen(self, slot: Slot, models: Mapping[str, Settings]) -> list[Contribution]:
        found: list[Contribution] = []
        for reference in models:
            listed = [one for one in slot.models if one.model.reference == reference]
            of_base = slot.base is not None and slot.base.model.reference == reference
            found += listed or ([slot.base] if slot.base is not None and of_base else [])
        if not found:
            others = ", ".join(one.model.reference for one in slot.models)
            raise PlanError(
                self.named(f"{slot.name} is made of {others} alone, none of which is among the rule's models")
            )
        return found


class Ways:
    """The ways of one merge."""

    def __init__(self, recipe: Merge) -> None:
        """Find the methods, and check that every parameter is one that a method takes.

        Raises:
            MethodError: if a method does not exist, or does not take a parameter.
            RecipeError: if a parameter is given where it would have no effect, or a rule names a model that the
                merge does not have.
        """
        self._own = Way(get_method(recipe.merge_method), adds_base=recipe.compat == "mergekit")
        self._of_rules = [_of_rule(rule, f"rules[{i}]", self._own) for i, rule in enumerate(recipe.rules)]
        _check_references(recipe, self._of_rules)
        _check_parameters(recipe, [self._own, *self._of_rules])

    def of(self, where: Place) -> Way:
        """Return how the tensor at a place is made."""
        for way in self._of_rules:
            if way.rule is not None and holds(way.rule, where):
                return way
        return self._own

    def check(self, slots: Sequence[Slot], models: Sequence[Model]) -> tuple[list[Method], list[str]]:
        """Check that every way that makes a tensor can work on its models, and find the rules that make none.

        Args:
            slots: the output's tensors.
            models: all models of the merge.

        Returns:
            The methods that make tensors, the merge's own first, and what a person should know.

        Raises:
            MethodError: if a method cannot work on this many models, or without a base.
            PlanError: if the weights of a model are not numbers that a method can work on.
        """
        first: dict[Way, Slot] = {}
        merged = [slot for slot in slots if not slot.carried]
        for slot in merged:
            first.setdefault(self.of(slot.where), slot)
        used = [way for way in (self._own, *self._of_rules) if way in first]
        for way in used:
            _check_inputs(way, first[way])
            _check_models(way, models, first[way].base)
        warnings = [
            f"{reference} is the base: parameters given under it have no effect"
            for reference in _idle_settings({way: first[way] for way in used})
        ]
        warnings += [self._idle(way, merged) for way in self._of_rules if way not in first]
        # Where nothing is merged, the merge's own method is still what the recipe names.
        return list({way.method.name: way.method for way in used or [self._own]}.values()), warnings

    def _idle(self, way: Way, slots: Iterable[Slot]) -> str:
        """Say why a rule makes no tensor."""
        rule = way.rule
        assert rule is not None, "the merge itself is no rule"
        taken = {self.of(slot.where) for slot in slots if holds(rule, slot.where)}
        text = f"{way.place} ({_described(rule)})"
        if taken:
            before = " and ".join(one.place for one in self._of_rules if one in taken)
            return f"{text} has no effect: before it, {before} decided all tensors that it is for"
        return f"{text} has no effect: it is for none of the tensors that are merged"


def _of_rule(rule: ScopeRule, place: str, own: Way) -> Way:
    try:
        method = own.method if rule.merge_method is None else get_method(rule.merge_method)
    except MethodError as error:
        raise MethodError(f"{place}: {error}") from None
    if rule.models is None:
        return Way(method, rule, place, adds_base=own.adds_base)
    models = {entry.model: entry.parameters for entry in rule.models}
    if len(models) < len(rule.models):
        raise RecipeError(f"{place}: a model is named twice; name each once")
    return Way(method, rule, place, models)


def _described(rule: ScopeRule) -> str:
    parts = {"filter": rule.filter, **(rule.scope.model_dump() if rule.scope else {})}
    shown = {name: list(value) if isinstance(value, tuple) else value for name, value in parts.items()}
    return ", ".join(f"{name}: {value}" for name, value in shown.items() if value is not None)


def _check_references(recipe: Merge, ways: Iterable[Way]) -> None:
    known = dict.fromkeys(references(recipe))
    for way in ways:
        for reference in way.models or ():
            if reference not in known:
                raise RecipeError(
                    f"{way.place}.models: {reference} is none of the models of this merge"
                    f"{did_you_mean(reference, known)}; a rule takes some of them: {', '.join(known)}"
                )


def _check_parameters(recipe: Merge, ways: Sequence[Way]) -> None:
    """Refuse parameters that no method takes, or that are given where they would have no effect."""
    methods = list({way.method.name: way.method for way in ways}.values())

    def check(settings: Settings, where: str, methods: Sequence[Method], *, one_model: bool) -> None:
        for name in settings:
            takers = [method for method in methods if name in method.parameters]
            if not takers:
                raise _unknown(name, where, methods)
            if one_model and not any(method.parameters[name].per_model for method in takers):
                raise RecipeError(
                    f"{where}: {name} of method {takers[0].name!r} is one value for all models; "
                    "give it under the parameters of the slice, the module, the rule or the merge"
                )

    check(recipe.parameters, "parameters", methods, one_model=False)
    holders: list[tuple[str, Any]] = [("", recipe)]
    for name, module in (recipe.modules or {}).items():
        check(module.parameters, f"modules.{name}.parameters", methods, one_model=False)
        holders.append((f"modules.{name}.", module))
    for prefix, holder in holders:
        for i, entry in enumerate(holder.models or ()):
            check(entry.parameters, f"{prefix}models[{i}].parameters", methods, one_model=True)
        for i, piece in enumerate(holder.slices or ()):
            check(piece.parameters, f"{prefix}slices[{i}].parameters", methods, one_model=False)
            for j, source in enumerate(piece.sources):
                where = f"{prefix}slices[{i}].sources[{j}].parameters"
                check(source.parameters, where, methods, one_model=True)
    for way in ways:
        check(way.parameters, f"{way.place}.parameters", [way.method], one_model=False)
        for i, own in enumerate((way.models or {}).values()):
            check(own, f"{way.place}.models[{i}].parameters", [way.method], one_model=True)


def _unknown(name: str, where: str, methods: Sequence[Method]) -> MethodError:
    """Return the error for a parameter that no method takes."""
    if len(methods) == 1:
        try:
            methods[0].parameter(name)
        except MethodError as error:
            return MethodError(f"{where}: {error}")
    known = dict.fromkeys(parameter for method in methods for parameter in method.parameters)
    return MethodError(
        f"{where}: no method of this merge has a parameter {name!r}{did_you_mean(name, known)}; "
        + "; ".join(f"{method.name} takes: {', '.join(method.parameters) or 'none'}" for method in methods)
    )


def _check_inputs(way: Way, slot: Slot) -> None:
    """Check that a method can work on as many models as take part in a slot."""
    base, models = way.participants(slot)
    try:
        check_inputs(way.method, len(models), has_base=base is not None)
    except MethodError as error:
        raise MethodError(way.named(error)) from None


def _idle_settings(used: Mapping[Way, Slot]) -> list[str]:
    """Return the models whose parameters have no effect, because they are the base wherever they take part."""
    idle: dict[str, None] = {}
    effective: set[str] = set()
    for way, slot in used.items():
        base, models = way.participants(slot)
        effective |= {one.model.reference for one in models}
        if base is not None:
            listed = [one for one in slot.models if one.model is base.model]
            if way.settings(base.model) or any(one.settings for one in listed):
                idle[base.model.reference] = None
    return [reference for reference in idle if reference not in effective]


def _check_models(way: Way, models: Sequence[Model], base: Contribution | None) -> None:
    """Check that the weights of all models are numbers that a method can work on."""
    if way.method.name == "passthrough":
        return
    used = models if way.models is None else [model for model in models if model.reference in way.models]
    if base is not None and way.method.base != "unused":
        used = [base.model, *used]
    for model in used:
        quantised = model.checkpoint.config.get("quantization_config")
        if quantised:
            kind = quantised.get("quant_method", "quantised") if isinstance(quantised, dict) else "quantised"
            raise PlanError(
                way.named(
                    f"{model.reference} is quantised ({kind}): its tensors are codes, not weights, and cannot be "
                    "merged entry by entry; merge the model it was made from"
                )
            )
        if model.checkpoint.is_adapter:
            raise PlanError(
                way.named(
                    f"{model.reference} is an adapter: merging its factors entry by entry would not merge the changes "
                    f"they stand for; name it on its base: BASE+{model.reference}"
                )
            )
