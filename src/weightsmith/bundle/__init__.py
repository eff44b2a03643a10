"""Several models in one folder: a shared part, and a small part for each task.

>>> import weightsmith as ws
>>> ws.bundle.create("experts", ["code", "maths"], base="base", kind="emr")    # doctest: +SKIP
>>> ws.open("experts", task="maths")                                           # doctest: +SKIP
>>> ws.merge("linear", ["experts#code", "experts#maths"])                      # doctest: +SKIP
"""

from __future__ import annotations

from weightsmith.bundle.bundle import Bundle, Sizes, open_task
from weightsmith.bundle.bundle import open_bundle as open
from weightsmith.bundle.create import Created, create

__all__ = ["Bundle", "Created", "Sizes", "create", "open", "open_task"]
