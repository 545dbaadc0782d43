"""Section: the table of latents that report.js fills, and its packed numbers."""

import numpy as np

from analysis.latents.table import KINDS
from analysis.report.charts import VIRIDIS
from analysis.report.data import OPTIONAL_SCALARS, Results
from analysis.report.markup import Section, fill, pack_arrays

WHOLE = ("latent", "count", "n_tokens", "n_layers_active")
REAL = ("mean", "layer_mean", "layer_std", "within_token", "between_tokens", "entropy")


def section(results: Results) -> Section:
    """The filters and the empty table; its numbers and examples as data."""
    if len(results.counts) == 0:
        return Section("Latents", "<p>No latent fired in these tokens, so there is none to show.</p>", results.examples)
    kinds = "".join(f"<option>{kind}</option>" for kind in KINDS) if len(results.kinds) else ""
    return Section("Latents", fill("latents.html", kinds=kinds), _numbers(results) + results.examples)


def _numbers(results: Results) -> str:
    """The numbers of the table. Whole numbers are exact, others have 32 bits, shares by layer 16: within 0.05 %."""
    arrays = {name: unsigned(results.latents[name]) for name in WHOLE}
    real = [*REAL, *(name for name in OPTIONAL_SCALARS if name in results.latents)]
    arrays |= {name: results.latents[name].astype("<f4") for name in real}
    mass = results.latents["total"]
    arrays["mass_share"] = (mass / mass.sum()).astype("<f4")
    if len(results.kinds):
        arrays["kind"] = np.array([KINDS.index(kind) for kind in results.kinds], "<u2")
    arrays |= {"probs": results.probs.astype("<f2"), "counts": unsigned(results.counts)}
    return pack_arrays("latent-data", arrays, layers=results.layer_numbers, kinds=KINDS, colours=VIRIDIS)


def unsigned(values: np.ndarray) -> np.ndarray:
    """Whole numbers in the narrowest type that report.js reads and that holds them."""
    top = int(values.max(initial=0))
    return values.astype("<u2" if top < 2**16 else "<u4" if top < 2**32 else "<f8")
