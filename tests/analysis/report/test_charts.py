"""Charts: lines that go below zero, and values by themselves."""

import re

import numpy as np
import pytest

from analysis.report.charts import lines_chart


def test_lines_below_zero_stay_in_the_frame() -> None:
    html = lines_chart([(np.array([-0.5, 0.0, 1.0]), "a", "ours")], "x", range(3), "layer")
    path = next(d for d in re.findall(r'class="curve ours" d="([^"]*)"', html) if d.count("L") == 2)
    heights = [float(y) for _, y in re.findall(r"[ML]([\d.]+) ([-\d.]+)", path)]
    assert all(0 <= y <= 1000 for y in heights)
    assert np.interp(0, [-0.5, 1.0], [heights[0], heights[2]]) == pytest.approx(heights[1], abs=0.2)
    assert [float(label) for label in re.findall(r'class="yt"[^>]*>([^<]*)<', html)] == [-0.5, 0, 0.5, 1, 1.5]


def test_a_value_by_itself_is_a_dash() -> None:
    html = lines_chart([(np.array([0.5, np.nan, 1.0, 0.5, np.nan]), "", "ours")], "x", range(5), "layer")
    assert re.findall(r'class="curve ours" d="([^"]*)"', html) == [
        "M90.0 666.7h20M500.0 333.3L700.0 666.7"
    ]  # from 0 to 1.5
    alone = lines_chart([(np.array([1.0]), "", "ours")], "x", [7], "layer")
    assert re.findall(r'class="curve ours" d="M490.0 [\d.]+h20"', alone)
