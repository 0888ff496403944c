"""Requests that wait for a place: order, bounds, and nobody forgotten."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import grpc
import pytest

from router.admission import Line, Place, PlaceState
from router.errors import OverloadedError
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
            assert refusal.retry_after_s == 1.0
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
        if place.state is PlaceState.FREE:
            await place.wait(may_refuse=True)
        order.append(name)
        place.admitted()


def test_news_wakes_the_head_and_success_wakes_the_next() -> None:
    async def scenario() -> None:
        line, order = Line(10, 1.0), list[str]()
        tasks = []
        for name, priority in (("b", 1), ("c", 1), ("a", 0)):
            tasks.append(asyncio.create_task(waiter(line.arrive(priority), order, name)))
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
        line, order = Line(10, 1.0), list[str]()
        head = asyncio.create_task(waiter(line.arrive(0), order, "head"))
        await asyncio.sleep(0)
        second = asyncio.create_task(waiter(line.arrive(0), order, "second"))
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
        line = Line(10, 1.0)
        with line.arrive(0) as place:
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
        with Line(0, 1.0).arrive(0) as place, pytest.raises(OverloadedError):
            await place.wait(may_refuse=True)

    run(scenario())
