"""Section: how the numbers moved while the autoencoder was trained. Tested in test_page.py."""

from html import escape

from analysis.report.data import Results
from analysis.report.markup import Section, integer, show, table

TITLE = "Over the training"


def section(results: Results) -> Section:
    """The curve as a table, and how the numbers moved at its end."""
    if not (curve := results.get("convergence", "curve")):
        return Section(TITLE, "<p>Not shown: the checkpoint keeps no numbers from during its training.</p>")
    rows = [
        (integer(point["step"]), integer(point["vectors"]), *(show(point[n]) for n in ("fvu", "ratio", "stays_on")))
        for point in curve
    ]
    head = ("step", "vectors", "FVU", "aggregate / token-level", "stays on at the next layer")
    return Section(
        TITLE,
        f"<p>{escape(str(results.get('convergence', 'text')))}</p>"
        + table(head, rows)
        + '<p class="note">On one sample of a few hundred held-out tokens: their movement is meant, not their value. '
        "FVU: lower is better. By mass, and with every active pair counting once.</p>",
    )
