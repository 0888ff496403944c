"""The router's figures."""

from __future__ import annotations

import pytest

from router.stats import Histogram


def test_histogram_counts_by_bound() -> None:
    histogram = Histogram()
    for value in (0.0005, 0.001, 0.5, 1000.0, None):
        histogram.observe(value)
    assert (histogram.num, histogram.counts[0], histogram.counts[-1]) == (4, 2, 1)
    assert histogram.total == pytest.approx(1000.5015)
