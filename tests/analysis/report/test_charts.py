"""Charts: lines that go below zero."""

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
