"""Recipe and headers -> plan."""

from __future__ import annotations

from weightsmith.rooms import make_callable

make_callable(__name__, "weightsmith.api", "plan")
