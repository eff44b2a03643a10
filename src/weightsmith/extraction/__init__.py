"""Adapters out of plain weights: what a fine-tune changed, in little room.

>>> import weightsmith as ws
>>> adapter = ws.extract("tuned", "base", energy=0.9)    # doctest: +SKIP
>>> adapter.save("adapter")                               # doctest: +SKIP
>>> adapter.report().error                                # doctest: +SKIP
"""
