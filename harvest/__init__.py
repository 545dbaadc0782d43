"""Writes the residual stream of a causal language model, at every layer, into an activation store.

`harvest.run.harvest(config)` does all of it; other packages use `harvest.model.load`, `harvest.residual` and
`harvest.lens.translators`. Importing this package is quick.
"""
