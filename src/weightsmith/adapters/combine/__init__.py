"""Several adapters into one: exact sums, sums cut to a rank, and the published merges of LoRAs.

>>> import weightsmith as ws
>>> merged = ws.adapters.merge(["code", "maths"], weight=[0.7, 0.3], rank=32)     # doctest: +SKIP
>>> merged.save("both")                                                           # doctest: +SKIP
>>> print(merged.report().error)                                                  # doctest: +SKIP
"""
