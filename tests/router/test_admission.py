"""Requests that wait for a place: order, bounds, and nobody forgotten."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import grpc
import pytest

from router.admission import EARMARK_AFTER, Line, Place, PlaceState
from router.config import RouterConfig
from router.errors import OverloadedError
from router.fair_queue import Claim
from router.tenant_config import TenantConfig
from tests.router.fake_worker import Behaviour, expected_answer
from tests.router.harness import PROMPT, ask, cluster, eventually, run


@pytest.mark.parametrize("split", [True, False])
def test_full_workers_queue_requests_in_order(model: Path, split: bool) -> None:
    async def scenario() -> None:
        async with cluster(model, split=split, behaviour=Behaviour(capacity=1)) as made:
            tasks = []
            for number in range(8):
                tasks.append(asyncio.create_task(made.ask(ask(f"r{number}", num=20))))
                await eventually(lambda n=number: made.app.stats().in_flight == n + 1 or tasks[0].done())
            answers = await asyncio.gather(*tasks)
            assert all(answer.token_ids == expected_answer(PROMPT, 20) for answer in answers)
            assert made.workers["d0"].reserved == [f"r{number}" for number in range(8)]
            await made.idle()

    run(scenario())


def test_priority_goes_first(model: Path) -> None:
    async def scenario() -> None:
        async with cluster(model, behaviour=Behaviour(capacity=1, step_s=0.01)) as made:
            first = asyncio.create_task(made.ask(ask("first", num=20)))
            await eventually(lambda: made.workers["d0"].running)
            later = []
            for number, priority in enumerate([5, 0, -5]):
                request = ask(f"r{priority}", num=2)
                request.priority = priority
                later.append(asyncio.create_task(made.ask(request)))
                await eventually(lambda n=number: made.app.stats().queued == n + 1)
            await asyncio.gather(first, *later)
            assert made.workers["d0"].reserved == ["first", "r-5", "r0", "r5"]

    run(scenario())


def test_full_line_refuses_at_once(model: Path) -> None:
    async def scenario() -> None:
        async with cluster(model, behaviour=Behaviour(capacity=0), max_queued=2) as made:
            waiting = [asyncio.create_task(made.refused(ask(f"r{number}"))) for number in range(2)]
            await eventually(lambda: made.app.stats().queued == 2)
            started = time.monotonic()
            refusal = await made.refused(ask("r9"))
            assert time.monotonic() - started < 0.25
            assert refusal.code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "the limit is 2" in refusal.message
            assert refusal.retry_after_s is not None
            assert 1.0 <= refusal.retry_after_s <= 1.25
            for task in waiting:
                task.cancel()
            await made.idle()

    run(scenario())


def test_full_worker_is_passed_over_for_another(model: Path) -> None:
    async def scenario() -> None:
        async with cluster(model, prefill=2, decode=2, policy="round_robin") as made:
            made.workers["d0"].behaviour.capacity = 0
            made.workers["p0"].behaviour.prefill_capacity = 0
            for number in range(4):
                answer = await made.ask(ask(f"r{number}"))
                assert answer.finished is not None
                assert (answer.finished.prefill_worker, answer.finished.decode_worker) == ("p1/1", "d1/1")
            assert made.app.stats().failed_attempts == 0
            await made.idle()

    run(scenario())


def test_waiting_requests_fail_together_when_the_workers_go(model: Path) -> None:
    async def scenario() -> None:
        async with cluster(model, behaviour=Behaviour(capacity=0)) as made:
            waiting = [asyncio.create_task(made.refused(ask(f"r{number}"))) for number in range(10)]
            await eventually(lambda: made.app.stats().queued == 10)
            await made.workers["d0"].stop()
            started = time.monotonic()
            refusals = await asyncio.gather(*waiting)
            assert time.monotonic() - started < 1.5
            assert {refusal.code for refusal in refusals} == {grpc.StatusCode.UNAVAILABLE}

    run(scenario())


async def waiter(place: Place, order: list[str], name: str) -> None:
    with place:
        await place.turn(may_refuse=True)
        if place.state is PlaceState.FREE or (not order and place.claim.priority == 0):
            await place.wait(may_refuse=True)
        order.append(name)
        place.admitted()


def line_of(**config: Any) -> Line:
    return Line(RouterConfig(**config))


def test_news_wakes_the_head_and_success_wakes_the_next() -> None:
    async def scenario() -> None:
        line, order = line_of(), list[str]()
        tasks = []
        for name, priority in (("b", 1), ("c", 1), ("a", 0)):
            tasks.append(asyncio.create_task(waiter(line.arrive(Claim(priority)), order, name)))
            await asyncio.sleep(0)
        assert len(line) == 3
        line.news()
        await asyncio.gather(*tasks)
        assert order[0] == "a"
        assert sorted(order) == ["a", "b", "c"]
        assert not len(line)

    run(scenario())


def test_head_that_leaves_hands_its_turn_on() -> None:
    async def scenario() -> None:
        line, order = line_of(), list[str]()
        head = asyncio.create_task(waiter(line.arrive(Claim()), order, "head"))
        await asyncio.sleep(0)
        second = asyncio.create_task(waiter(line.arrive(Claim()), order, "second"))
        await asyncio.sleep(0)
        head.cancel()
        await asyncio.gather(head, return_exceptions=True)
        line.news()
        await second
        assert order == ["second"]
        assert not len(line)

    run(scenario())


def test_news_during_a_try_is_not_lost() -> None:
    async def scenario() -> None:
        line = line_of()
        with line.arrive(Claim()) as place:
            await place.turn(may_refuse=True)
            waiting = asyncio.create_task(place.wait(may_refuse=True))
            await asyncio.sleep(0)
            line.news()
            await waiting
            await place.turn(may_refuse=True)
            line.news()
            async with asyncio.timeout(1.0):
                await place.wait(may_refuse=True)
        assert not len(line)

    run(scenario())


def test_line_of_no_places_refuses_whoever_must_wait() -> None:
    async def scenario() -> None:
        with line_of(max_queued=0).arrive(Claim()) as place, pytest.raises(OverloadedError):
            await place.wait(may_refuse=True)

    run(scenario())


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Waiters:
    """Requests that wait at a line; each tries when it is woken, and gets its place if `room` has one."""

    def __init__(self, line: Line) -> None:
        self.line = line
        self.order: list[str] = []
        self.refusals: dict[str, OverloadedError] = {}
        self.room = 0
        self.too_large: set[str] = set()
        self._tasks: list[asyncio.Task[None]] = []

    async def add(self, name: str, claim: Claim) -> None:
        self._tasks.append(asyncio.create_task(self._wait(name, claim)))
        await asyncio.sleep(0)

    async def _wait(self, name: str, claim: Claim) -> None:
        with self.line.arrive(claim) as place:
            try:
                await place.turn(may_refuse=True)
                while not self.room or name in self.too_large:
                    await place.wait(may_refuse=True)
                    await place.turn(may_refuse=True)
            except OverloadedError as error:
                self.refusals[name] = error
                return
            self.room -= 1
            self.order.append(name)
            place.admitted()

    async def admit(self, num: int) -> None:
        """There is room for so many, one after the other."""
        for _ in range(num):
            self.room += 1
            self.line.news()
            for _ in range(3):
                await asyncio.sleep(0)

    async def end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        assert not len(self.line)


def test_shares_of_tenants_hold_while_one_floods() -> None:
    async def scenario() -> None:
        made = Waiters(line_of(tenants={"paying": TenantConfig(weight=2.0)}))
        for number in range(40):
            await made.add(f"flood{number}", Claim(tenant="flood", num_tokens=100))
        for number in range(20):
            await made.add(f"paying{number}", Claim(tenant="paying", num_tokens=100))
        await made.admit(18)
        assert sum(name.startswith("paying") for name in made.order) in (11, 12, 13)
        await made.end()

    run(scenario())


def test_a_tenant_has_the_earliest_deadline_first() -> None:
    async def scenario() -> None:
        made = Waiters(line_of())
        for name, deadline in (("late", 1e9), ("soon", 1e6), ("later", 2e9), ("sooner", 1e5)):
            await made.add(name, Claim(deadline=deadline))
        await made.admit(4)
        assert made.order == ["sooner", "soon", "late", "later"]
        await made.end()

    run(scenario())


def test_a_large_request_is_not_overtaken_for_ever() -> None:
    async def scenario() -> None:
        made = Waiters(line_of())
        made.too_large.add("large")
        await made.add("large", Claim(num_tokens=1000, deadline=1e9))
        for _ in range(EARMARK_AFTER):
            await made.admit(1)
        for number in range(5):  # with earlier deadlines
            await made.add(f"small{number}", Claim(deadline=1e6))
        await made.admit(1)
        assert made.order == []
        made.too_large.clear()
        await made.admit(2)
        assert made.order[0] == "large"
        await made.end()

    run(scenario())


def test_a_higher_class_does_overtake_a_large_request() -> None:
    async def scenario() -> None:
        made = Waiters(line_of())
        made.too_large.add("large")
        await made.add("large", Claim())
        for _ in range(EARMARK_AFTER):
            await made.admit(1)
        await made.add("urgent", Claim(priority=-1))
        await made.admit(1)
        assert made.order == ["urgent"]
        await made.end()

    run(scenario())


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
        assert "try again in" in made.refusals["hopeless"].message
        await made.end()

    run(scenario())


def test_a_tenant_has_a_limit_of_its_own() -> None:
    async def scenario() -> None:
        made = Waiters(line_of(tenants={"small": TenantConfig(max_queued=2)}))
        for number in range(2):
            await made.add(f"r{number}", Claim(tenant="small"))
        made.line.check_open(Claim(tenant="other"))
        with pytest.raises(OverloadedError, match=r"2 requests of tenant small wait .* the limit is 2"):
            made.line.check_open(Claim(tenant="small"))
        await made.end()

    run(scenario())


def test_a_request_that_lost_its_place_goes_before_all_of_its_class() -> None:
    async def scenario() -> None:
        made = Waiters(line_of())
        with made.line.arrive(Claim(num_tokens=500)) as place:
            await place.turn(may_refuse=True)
            place.admitted()
            await made.add("other", Claim(deadline=1.0))
            async with asyncio.timeout(1.0):
                await place.turn(may_refuse=False)
            place.admitted()
        await made.end()

    run(scenario())


def test_tenants_of_a_flooded_cluster_get_their_shares(model: Path) -> None:
    async def scenario() -> None:
        async with cluster(model, behaviour=Behaviour(capacity=0, step_s=0.001)) as made:
            floods = [asyncio.create_task(made.ask(ask(f"flood{number}", num=4), tenant="a")) for number in range(12)]
            await eventually(lambda: made.app.stats().queued == 12)
            others = [asyncio.create_task(made.ask(ask(f"other{number}", num=4), tenant="b")) for number in range(4)]
            await eventually(lambda: made.app.stats().queued == 16)
            made.workers["d0"].behaviour.capacity = 1
            await asyncio.gather(*floods, *others)
            order = made.workers["d0"].reserved
            assert [name for name in order[:9] if name.startswith("other")] == [f"other{n}" for n in range(4)]
            await made.idle()

    run(scenario())
