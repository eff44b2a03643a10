"""What a person should see before and after a merge: one pass over the models, and findings as plain data.

>>> import weightsmith as ws
>>> found = ws.report("code", "maths", base="base")     # doctest: +SKIP
>>> found.agreements.total[0].cosine                    # doctest: +SKIP
>>> found.frames()["changes"]                           # doctest: +SKIP
"""

from __future__ import annotations

from weightsmith.rooms import make_callable

make_callable(__name__, "weightsmith.report.create", "report")
