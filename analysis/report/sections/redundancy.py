"""Section: how similar decoder rows are, and the most similar pairs. Tested in test_page.py."""

from analysis.report.data import Results
from analysis.report.markup import Section, integer, show, table, tiles

TITLE = "Redundancy"
INTRODUCTION = """<p>Has the dictionary learnt the same direction once per layer? Two latents are near-parallel if the
cosine of their decoder rows is above {cosine}, and redundant if their layer profiles are also disjoint: Σ<sub>l</sub>
min(P(l | a), P(l | b)) below {overlap}. MMCS is the mean, over live latents, of the highest cosine to another live
latent; lower is less redundant.</p>"""


def section(results: Results) -> Section:
    if not (found := results.get("redundancy")):
        return Section(TITLE, "<p>Not shown: this analysis was made without comparing decoder rows.</p>")
    live = f"of {integer(len(results.counts))} live latents"
    numbers = (
        ("MMCS", show(found["mmcs"]), "lower is less redundant; 1: every latent has a parallel one"),
        ("Near-parallel pairs", integer(found["parallel_pairs"]), "of live latents"),
        ("Redundant pairs", integer(found["redundant_pairs"]), "near-parallel, with disjoint layer profiles"),
        ("Latents in a redundant pair", integer(found["redundant_latents"]), live),
    )
    head = ("latent a", "latent b", "cosine", "overlap of profiles", "mean layer of a", "mean layer of b")
    names = ("cosine", "overlap", "layer_mean_a", "layer_mean_b")
    rows = [(str(p["latent_a"]), str(p["latent_b"]), *(show(p[name]) for name in names)) for p in results.pairs]
    note = '<p class="note">Redundant pairs first, then by cosine; redundancy.parquet holds more.</p>'
    pairs = table(head, rows) + note if rows else "<p>No pair is near-parallel.</p>"
    limits = {name: show(found[f"{name}_threshold"]) for name in ("cosine", "overlap")}
    return Section(TITLE, INTRODUCTION.format(**limits) + tiles(numbers) + pairs)
