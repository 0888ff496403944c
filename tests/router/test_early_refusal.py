"""Who cannot be served in time is told so: on arrival, while it waits, and when its turn comes."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from router.admission import Line
from router.config import RouterConfig
from router.errors import OverloadedError
from router.fair_queue import Claim
from tests.router.harness import run
from tests.router.waiters import Clock, Waiters


async def measured(clock: Clock, **config: Any) -> Waiters:
    """A line of 20 requests of 100 tokens each, of which one a second got its place."""
    made = Waiters(Line(RouterConfig(**config), clock))
    for number in range(40):
        await made.add(f"r{number}", Claim(num_tokens=100, deadline=110.0))
    for _ in range(20):
        clock.now += 1.0
        await made.admit(1)
    return made


def asking(made: Waiters, clock: Clock, left_s: float, priority: int = 0) -> Claim:
    """One that comes now, with so much time."""
    return made.line.claim(
        priority=priority, tenant="default", num_prompt_tokens=90, max_tokens=10, deadline=clock.now + left_s
    )


def test_whoever_would_miss_its_deadline_is_refused_on_arrival() -> None:
    async def scenario() -> None:
        clock = Clock()
        made = await measured(clock)
        made.line.check_open(asking(made, clock, 40.0))
        told = r"20 requests wait for a worker, this one for about 1\d\.. s; its deadline leaves it 10\.0 s to wait"
        with pytest.raises(OverloadedError, match=told) as caught:
            made.line.check_open(asking(made, clock, 10.0))
        assert caught.value.retry_after_s is not None
        assert 5.0 < caught.value.retry_after_s < 15.0
        assert made.line.refused == {"deadline": 1}
        made.line.check_open(asking(made, clock, 10.0, priority=-1))  # goes before all others
        made.line.served(10, 4.0, 18.0)
        made.line.check_open(asking(made, clock, 60.0))
        with pytest.raises(OverloadedError, match=r"its deadline leaves it 16\.0 s to wait"):
            made.line.check_open(asking(made, clock, 40.0))  # an answer takes 24 s
        await made.end()

    run(scenario())


def test_whoever_would_miss_the_slo_is_refused_on_arrival() -> None:
    async def scenario() -> None:
        clock = Clock()
        made = await measured(clock, ttft_slo_s=10.0)
        told = r"a first token within 10 s \(ttft_slo_s\) leaves it 10\.0 s to wait; try again in \d+\.\d s"
        with pytest.raises(OverloadedError, match=told) as caught:
            made.line.check_open(asking(made, clock, 600.0))
        assert caught.value.retry_after_s is not None
        assert 5.0 < caught.value.retry_after_s < 15.0
        assert made.line.refused == {"ttft_slo": 1}
        await made.end()

    run(scenario())


def test_what_higher_classes_take_is_not_there_for_the_others() -> None:
    async def scenario() -> None:
        clock = Clock()
        made = await measured(clock)
        made.line.check_open(asking(made, clock, 40.0))
        for _ in range(30):
            clock.now += 0.2
            made.line.arrive(Claim(-1, num_tokens=100))
        made.line.check_open(asking(made, clock, 40.0, priority=-1))
        with pytest.raises(OverloadedError, match="its deadline leaves it"):
            made.line.check_open(asking(made, clock, 40.0))
        await made.end()

    run(scenario())


def test_whoever_is_too_late_when_its_turn_comes_does_not_try() -> None:
    async def scenario() -> None:
        clock = Clock()
        made = Waiters(Line(RouterConfig(), clock))
        for name, due in (("late", 101.0), ("in time", 110.0)):
            await made.add(name, Claim(deadline=due, admit_by=due))
        clock.now = 102.0
        await made.admit(1)
        assert (list(made.refusals), made.order) == (["late"], ["in time"])
        await made.end()

    run(scenario())


def test_whoever_waits_in_vain_is_refused_as_soon_as_that_is_known() -> None:
    async def scenario() -> None:
        clock = Clock()
        made = await measured(clock)
        for name, priority, left_s in (("hopeless", 0, 6.0), ("doubtful", 0, 12.0), ("urgent", -1, 8.0)):
            due = clock.now + left_s
            await made.add(name, Claim(priority, num_tokens=100, deadline=due, admit_by=due))
        clock.now += 0.3
        made.line.news()
        await asyncio.sleep(0)
        assert list(made.refusals) == ["hopeless"]
        assert made.line.refused == {"waited": 1}
        assert "try again in" in made.refusals["hopeless"].message
        await made.end()

    run(scenario())
