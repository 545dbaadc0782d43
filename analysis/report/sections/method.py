"""Section: formula, unit, direction and source of every number. Tested in test_page.py."""

from analysis.report.data import Results
from analysis.report.markup import Section, page_file


def section(_: Results) -> Section:
    """The same text in every report."""
    return Section("Method", page_file("method.html"))
