"""Numbers as text."""

from typing import Any

import pytest

from analysis.report.markup import EN_DASH, percent, prose, show


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (2.1655, "2.17"),
        (0.000123, "0.000123"),
        (9.999, "10.0"),
        (31744, "31,744"),
        (-3.2, "\N{MINUS SIGN}3.20"),
        (0, "0"),
        (1.5e-5, "1.50\N{MULTIPLICATION SIGN}10^\N{MINUS SIGN}5"),
        (2.5e7, "2.50\N{MULTIPLICATION SIGN}10^7"),
        (None, EN_DASH),
        (float("nan"), EN_DASH),
        (float("inf"), EN_DASH),
        ("3", EN_DASH),
    ],
)
def test_numbers_are_shown_with_three_digits_and_never_as_nan(value: Any, shown: str) -> None:
    assert show(value) == shown


def test_percentages() -> None:
    assert [percent(x).replace("\N{NO-BREAK SPACE}", " ") for x in (0.2731, 0.0312, 0.0004, 0, 1, None)] == [
        *("27 %", "3.1 %", "0.040 %", "0 %", "100 %"),
        EN_DASH,
    ]


def test_flags_and_what_is_quoted_in_messages_are_code() -> None:
    assert prose("a < b: `harvest --mask-norm 10`, or --split train") == (
        "a &lt; b: <code>harvest --mask-norm 10</code>, or <code>--split</code> train"
    )
