"""From the values a person gave to the complete, checked parameters of a method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from weightsmith.errors import MethodError
from weightsmith.methods.registry import Method


def complete(
    method: Method,
    given: Mapping[str, Any],
    models: int,
    *,
    has_base: bool,
    compat: str | None = None,
) -> dict[str, Any]:
    """Fill in defaults, check every value, and spread single values of per-model parameters over the models.

    Args:
        method: the method.
        given: values by parameter name; a per-model parameter takes a sequence of one value per model (None
            for a model that was given none), or one value for all.
        models: number of models, the base not counted.
        has_base: whether there is a base.
        compat: a tool whose behaviour to restore: its values replace defaults, never what was given.

    Returns:
        One value per parameter; a tuple of one value per model for per-model ones.

    Raises:
        MethodError: for an unknown or missing parameter, a value out of range, a missing base, or too few or
            too many models.
    """
    check_inputs(method, models, has_base=has_base)
    for name in given:
        method.parameter(name)
    replaced = method.compat.get(compat, {}) if compat else {}
    found: dict[str, Any] = {}
    for parameter in method.parameters.values():
        default = replaced.get(parameter.name, parameter.default)
        value = given.get(parameter.name)
        if not parameter.per_model:
            if value is None and parameter.required:
                raise MethodError(f"method {method.name!r} needs the parameter {parameter.name!r}")
            found[parameter.name] = parameter.check(default if value is None else value)
            continue
        spread = _spread(value, models, method, parameter.name)
        values = []
        for i, one in enumerate(spread):
            if one is None and parameter.required:
                raise MethodError(
                    f"method {method.name!r} needs {parameter.name!r} for every model; model {i + 1} has none"
                )
            values.append(parameter.check(default if one is None else one))
        found[parameter.name] = tuple(values)
    method.check_number(models, found)
    if method.check is not None:
        method.check(found)
    return found


def check_inputs(method: Method, models: int, *, has_base: bool) -> None:
    """Check that a method can work on this many models, with or without a base.

    Raises:
        MethodError: if it cannot.
    """
    order = f"; {method.order}" if method.order else ""
    if method.base == "required" and not has_base:
        raise MethodError(f"method {method.name!r} needs a base: give base_model (--base){order}")
    least, most = method.minimum, method.maximum
    if models < least or (most is not None and models > most):
        if most == least:
            wanted = f"exactly {least}"
        elif most is None:
            wanted = f"at least {least}"
        else:
            wanted = f"{least} to {most}"
        beside = " beside the base" if method.base != "unused" and has_base else ""
        raise MethodError(f"method {method.name!r} takes {wanted} model(s){beside}, and {models} are given{order}")


def _spread(value: Any, models: int, method: Method, name: str) -> Sequence[Any]:
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != models:
            raise MethodError(
                f"method {method.name!r}: {name} has {len(value)} values for {models} models; give one for each"
            )
        return value
    return [value] * models
