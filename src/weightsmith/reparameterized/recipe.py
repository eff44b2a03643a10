"""Making a model in another form again, from the recipe in its manifest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weightsmith.plan.remake import understood
from weightsmith.reparameterized.fold import fold_model
from weightsmith.reparameterized.result import Restructured
from weightsmith.reparameterized.unfold import unfold_compander, unfold_weight_norm

_UNFOLDS = {"weight_norm": unfold_weight_norm, "compander": unfold_compander}


def remake(key: str, content: Mapping[str, Any], *, threads: int | None = None) -> Restructured:
    """Return the model that a manifest describes; see :func:`weightsmith.plan.remake.remake`."""
    with understood():
        model, dtype, unfold = str(content["model"]), content.get("dtype"), content.get("unfold")
        if unfold is not None:
            settings = {name: value for name, value in unfold.items() if name != "kind"}
            make: Any = _UNFOLDS[unfold["kind"]]
            unfolded: Restructured = make(model, **settings)
            return unfolded
        rules = list(content["rules"])
    return fold_model(model, rules, dtype=dtype)
