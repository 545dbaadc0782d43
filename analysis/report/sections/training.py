"""Section: how the numbers changed while the autoencoder was trained. Tested in test_page.py."""

from html import escape

from analysis.report.data import Results
from analysis.report.markup import Section, integer, show, table

TITLE = "During training"


def section(results: Results) -> Section:
    """The curve as a table, and how far the numbers still moved at its end."""
    if not (curve := results.get("convergence", "curve")):
        return Section(TITLE, "<p>Not shown: the checkpoint holds no measurements from its training.</p>")
    rows = [
        (integer(point["step"]), integer(point["vectors"]), *(show(point[n]) for n in ("fvu", "ratio", "stays_on")))
        for point in curve
    ]
    head = ("step", "vectors", "FVU", "aggregate / token-level", "stays on at the next layer")
    return Section(
        TITLE,
        f"<p>{escape(str(results.get('convergence', 'text')))}</p>"
        + table(head, rows)
        + '<p class="note">Measured on one sample of a few hundred held-out tokens: read the trend, not the values. '
        "FVU: lower is better. The ratio is by mass; for staying on, every active pair counts once.</p>",
    )
