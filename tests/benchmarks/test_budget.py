from __future__ import annotations

from benchmarks.budget import Budget


def test_what_is_left_is_what_fits():
    now = [100.0]
    budget = Budget(60.0, lambda: now[0])
    assert budget.fits(60.0)
    now[0] += 50.0
    assert (budget.spent(), budget.left()) == (50.0, 10.0)
    assert not budget.fits(10.5)
    assert Budget(None).fits(1e12)


def test_what_comes_too_late_is_skipped_and_remembered():
    now = [100.0]
    budget = Budget(60.0, lambda: now[0])
    now[0] += 59.0
    assert budget.allows("this")
    now[0] += 1.0
    assert not budget.allows("that")
    assert budget.skipped == ["that"]
    assert Budget(None).allows("anything")
