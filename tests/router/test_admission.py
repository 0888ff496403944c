"""Requests that wait for a place: order, bounds, and nobody forgotten."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import grpc
import pytest

from router.admission import EARMARK_AFTER, Place, PlaceState
from router.errors import OverloadedError
from router.fair_queue import Claim
from router.tenant_config import TenantConfig
from tests.router.fake_worker import Behaviour, expected_answer
from tests.router.harness import PROMPT, ask, cluster, eventually, run
from tests.router.waiters import Waiters, line_of


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
