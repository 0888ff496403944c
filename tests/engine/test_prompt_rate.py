"""What an engine makes of prompts in a second, as of late."""

from __future__ import annotations

import pytest

from engine.batch import ScheduledSequence, StepPlan
from engine.prompt_rate import MEMORY_S, PromptRate
from engine.sequence import Sequence
from tests.engine.toy import make_request


def plan(*sizes: int) -> StepPlan:
    sequence = Sequence.from_request(make_request("x", [1] * 4), 0.0)
    return StepPlan(tuple(ScheduledSequence(sequence, 0, size, False) for size in sizes))


def test_only_prompts_count() -> None:
    rate = PromptRate()
    rate.add(plan(1, 1), 0.5)
    assert rate.tokens_per_s == 0
    rate.add(plan(1, 99, 101), 0.5)
    assert rate.tokens_per_s == pytest.approx(400)
    rate.add(plan(1, 1), 100.0)
    assert rate.tokens_per_s == pytest.approx(400)


def test_what_is_long_ago_counts_less() -> None:
    rate = PromptRate()
    for _ in range(100):
        rate.add(plan(1000), 1.0)
    for _ in range(int(MEMORY_S)):
        rate.add(plan(100), 1.0)
    assert rate.tokens_per_s == pytest.approx(550, rel=0.05)
