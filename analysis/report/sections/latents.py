"""Section: the table of latents that report.js fills, and its packed numbers. Tested in test_page.py."""

import numpy as np

from analysis.latents.table import KINDS
from analysis.report.charts import VIRIDIS
from analysis.report.data import OPTIONAL_SCALARS, Results
from analysis.report.examples import example_blocks
from analysis.report.markup import Section, fill, pack_arrays

WHOLE = ("latent", "count", "n_tokens", "n_layers_active")
REAL = ("mean", "layer_mean", "layer_std", "within_token", "between_tokens", "entropy")

MOST_NUMBERS = 5_000_000  # characters that the table's numbers may take unrounded
ROOM = 14_400_000  # characters for all data on latents, so that the page stays below 15 MB

ROUNDED = """ With so many latents, the numbers are rounded here (to three digits; shares by layer to 1/255 of the
highest) and firings by layer are left out; latents.parquet has everything."""


def section(results: Results) -> Section:
    """The filters and an empty table, with its numbers and contexts as data blocks."""
    fired = results.latents["count"]
    if len(fired) == 0:
        return Section("Latents", "<p>No latent fired on these tokens, so there is none to show.</p>")
    kinds = "".join(f"<option>{kind}</option>" for kind in KINDS)
    numbers = _numbers(results)
    if rounded := len(numbers) > MOST_NUMBERS:
        numbers = _numbers(results, rounded=True)
    levels = (results.number("latent_logits", f"unembedding_chance{kind}") for kind in ("_99", ""))
    chance, budget = next((level for level in levels if level is not None), None), ROOM - len(numbers)
    blocks = example_blocks(results.folder, results.latents["latent"], fired, chance=chance, budget=budget)
    body = fill("latents.html", kinds=kinds, rounded=ROUNDED if rounded else "")
    return Section("Latents", body, numbers + blocks)


def _numbers(results: Results, *, rounded: bool = False) -> str:
    """The numbers of the table: whole numbers exactly, others in 32 bits, shares by layer in 16 (within 0.05 %). If
    rounded, in 16 bits, and shares in 8, as parts of the row's highest and rounded up, so that none becomes 0."""
    arrays = {name: unsigned(results.latents[name]) for name in WHOLE}
    real = [*REAL, *(name for name in OPTIONAL_SCALARS if name in results.latents)]
    arrays |= {name: results.latents[name].astype("<f2" if rounded else "<f4") for name in real}
    mass = results.latents["total"]
    arrays["mass_share"] = (mass / mass.sum()).astype("<f4")
    arrays["kind"] = np.array([KINDS.index(kind) for kind in results.kinds], "<u2")
    if rounded:
        arrays["probs"] = np.ceil(255 * (results.probs / results.probs.max(axis=1, keepdims=True))).astype("u1")
    else:
        arrays |= {"probs": results.probs.astype("<f2"), "counts": unsigned(results.counts)}
    return pack_arrays("latent-data", arrays, layers=results.layer_numbers, kinds=KINDS, colours=VIRIDIS)


def unsigned(values: np.ndarray) -> np.ndarray:
    """Whole numbers in the narrowest type that holds them and that report.js reads."""
    top = int(values.max(initial=0))
    return values.astype("<u2" if top < 2**16 else "<u4" if top < 2**32 else "<f8")
