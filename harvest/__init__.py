"""Residual streams of a causal language model, at every layer, written into an activation store.

`harvest.run.harvest(config)` is the whole of it; `harvest.model.load`, `harvest.residual` and
`harvest.lens.translators` are what other packages use. Importing this package costs nothing.
"""
