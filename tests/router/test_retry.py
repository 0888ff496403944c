"""Workers die, refuse and give up; the client sees a pause at most."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from router.errors import AttemptFailedError, UnavailableError
from router.info import WorkerLife
from router.retry import Attempts
from tests.router.fake_worker import Behaviour, FakeWorker, expected_answer
from tests.router.harness import PROMPT, Answer, Cluster, ask, cluster, eventually, run


async def decoding(made: Cluster, request_id: str, beyond: int) -> FakeWorker:
    """The worker that decodes a request, once it has got some way."""

    def serving() -> list[FakeWorker]:
        return [
            worker
            for worker in made.workers.values()
            if request_id in worker.running and worker.running[request_id].known > beyond
        ]

    await eventually(serving)
    return serving()[0]


async def stream_across(made: Cluster, harm: Callable[[FakeWorker], object], num: int = 60) -> Answer:
    """A stream whose decode worker is harmed in the middle."""
    streaming = asyncio.create_task(made.ask(ask("r1", num=num)))
    worker = await decoding(made, "r1", beyond=10)
    outcome = harm(worker)
    if asyncio.iscoroutine(outcome):
        await outcome
    return await streaming


@pytest.mark.parametrize("split", [True, False])
def test_decode_worker_killed_mid_stream(model: Path, split: bool) -> None:
    async def scenario() -> None:
        async with cluster(model, split=split, decode=2, behaviour=Behaviour(step_s=0.005)) as made:
            answer = await stream_across(made, lambda worker: worker.kill())
            assert answer.token_ids == expected_answer(PROMPT, 60)
            assert answer.reason == "LENGTH"
            assert made.app.stats().failed_attempts == 1
            second = [request for worker in made.workers.values() for request in worker.received if request.attempt]
            assert second
            assert all(list(request.resume_from) == answer.token_ids[: len(request.resume_from)] for request in second)
            assert all(len(request.resume_from) > 10 for request in second)
            first = [request for worker in made.workers.values() for request in worker.received if not request.attempt]
            assert all(request.age_s >= 0 for request in first)
            assert min(request.age_s for request in second) > max(request.age_s for request in first) + 0.05
            await made.idle()

    run(scenario())


def test_prefill_worker_killed_after_its_part_is_done(model: Path) -> None:
    async def scenario() -> None:
        async with cluster(model, behaviour=Behaviour(step_s=0.005)) as made:
            (prefill,) = [worker for worker in made.workers.values() if worker.role == "prefill"]
            answer = await stream_across(made, lambda _decode: prefill.kill())
            assert answer.token_ids == expected_answer(PROMPT, 60)
            assert made.app.stats().failed_attempts == 0

    run(scenario())


def test_decode_worker_falls_silent(model: Path) -> None:
    async def scenario() -> None:
        waits = {"heartbeat_s": 0.2, "worker_silence_s": 0.5}
        async with cluster(model, decode=2, behaviour=Behaviour(step_s=0.005), **waits) as made:
            started = time.monotonic()
            answer = await stream_across(made, lambda worker: setattr(worker.behaviour, "silent", True))
            assert answer.token_ids == expected_answer(PROMPT, 60)
            assert time.monotonic() - started < 5.0
            await made.ready(2)

    run(scenario())


def test_worker_that_gives_a_request_up(model: Path) -> None:
    async def scenario() -> None:
        async with cluster(model, decode=2) as made:
            for worker in made.workers.values():
                worker.behaviour.fail_at = 7
            answer = await made.ask(ask("r1", num=20))
            assert answer.token_ids == expected_answer(PROMPT, 20)
            assert made.app.stats().failed_attempts >= 1
            await made.idle()

    run(scenario())


def test_a_request_that_is_given_back_goes_on_through_the_prefill_pool(model: Path) -> None:
    """No failure: the only workers are asked again, however few attempts there are."""

    async def scenario() -> None:
        async with cluster(model, max_attempts=1) as made:
            made.workers["d0"].behaviour.preempt_at = {3, 7, 11}
            answer = await made.ask(ask("r1", num=20))
            assert answer.token_ids == expected_answer(PROMPT, 20)
            assert (made.app.stats().failed_attempts, made.app.stats().given_back) == (0, 3)
            assert made.workers["p0"].prefilled == ["r1"] * 4
            told = [(len(request.resume_from), request.num_preemptions) for request in made.workers["p0"].received]
            assert told == [(0, 0), (3, 1), (7, 2), (11, 3)]
            assert not made.workers["d0"].aborts
            await made.idle()

    run(scenario())


def test_a_request_that_its_worker_hands_back_goes_on_at_another_one(model: Path) -> None:
    """Neither a failure nor a preemption, however few attempts there are."""

    async def scenario() -> None:
        async with cluster(model, decode=2, max_attempts=1) as made:
            for name, positions in (("d0", {3, 7}), ("d1", {3, 7, 11})):
                made.workers[name].behaviour.hand_back_at = positions
            answer = await made.ask(ask("r1", num=20))
            assert answer.token_ids == expected_answer(PROMPT, 20)
            stats = made.app.stats()
            assert (stats.failed_attempts, stats.given_back) == (0, 0)
            assert stats.moved >= 2
            told = [(len(request.resume_from), request.num_preemptions) for request in made.workers["p0"].received]
            assert told[:2] == [(0, 0), (3, 0)]
            assert not any(num for _, num in told)
            assert not made.workers["d0"].aborts + made.workers["d1"].aborts
            await made.idle()

    run(scenario())


def test_one_that_is_handed_back_waits_for_a_worker_that_comes_back_in_time(model: Path) -> None:
    """The grace counts from then on, however long the request has been running, and its end is UNAVAILABLE."""

    async def scenario() -> None:
        async with cluster(model, max_attempts=1, no_worker_grace_s=0.3) as made:
            worker = made.workers["d0"]
            worker.behaviour.step_s = 0.05
            for comes_back in (True, False):
                call = asyncio.create_task(made.ask(ask(num=20)) if comes_back else made.refused(ask(num=20)))
                await eventually(lambda: worker.running)
                worker.set_role("prefill")
                await asyncio.sleep(0.5)
                assert worker.running, "what runs stays"
                position = next(iter(worker.running.values())).known + 1
                worker.behaviour.hand_back_at = {position}
                await eventually(lambda: not worker.running)
                if comes_back:
                    worker.set_role("decode")
                    assert (await call).token_ids == expected_answer(PROMPT, 20)
                else:
                    refusal = await call
                    assert refusal.code is grpc.StatusCode.UNAVAILABLE
                    assert "no decode worker is ready" in refusal.message
            await made.idle()

    run(scenario())


def test_a_worker_that_drains_already_costs_no_attempt(model: Path) -> None:
    async def scenario() -> None:
        async with cluster(model, prefill=2, decode=2, max_attempts=1, policy="round_robin") as made:
            made.workers["d0"].behaviour.refuses_as_draining = True
            made.workers["p1"].behaviour.refuses_as_draining = True
            answers = await asyncio.gather(*(made.ask(ask(num=5)) for _ in range(8)))
            assert all(answer.token_ids == expected_answer(PROMPT, 5) for answer in answers)
            assert made.workers["d0"].num_refused > 0
            assert made.workers["p1"].num_refused > 0
            assert made.app.stats().failed_attempts == 0
            await made.idle()

    run(scenario())


def test_only_worker_of_a_role_may_try_again(model: Path) -> None:
    async def scenario() -> None:
        async with cluster(model) as made:
            made.workers["d0"].behaviour.fail_at = 3
            answer = await made.ask(ask("r1", num=20))
            assert answer.token_ids == expected_answer(PROMPT, 20)
            await made.idle()

    run(scenario())


def test_repeated_tokens_are_dropped(model: Path) -> None:
    async def scenario() -> None:
        async with cluster(model, behaviour=Behaviour(repeat=True)) as made:
            answer = await made.ask(ask("r1", num=30))
            assert answer.token_ids == expected_answer(PROMPT, 30)

    run(scenario())


@pytest.mark.parametrize("harm", ["kill", "silent"])
def test_prefill_worker_lost_while_it_computes(model: Path, harm: str) -> None:
    async def scenario() -> None:
        waits = {"heartbeat_s": 0.2, "worker_silence_s": 0.5}
        async with cluster(model, prefill=2, behaviour=Behaviour(prefill_s=0.3), **waits) as made:
            streaming = asyncio.create_task(made.ask(ask("r1", num=10)))
            await eventually(lambda: any(worker.prefilling for worker in made.workers.values()))
            victim = next(worker for worker in made.workers.values() if worker.prefilling)
            if harm == "kill":
                await victim.kill()
            else:
                victim.behaviour.silent = True
            answer = await streaming
            assert answer.token_ids == expected_answer(PROMPT, 10)
            assert answer.finished is not None
            assert answer.finished.prefill_worker != f"{victim.worker_id}/1"
            await eventually(lambda: ("decode", "r1", 0) in made.workers["d0"].aborts)
            await made.idle()

    run(scenario())


def test_worker_that_answers_unavailable_is_left_alone(model: Path) -> None:
    async def scenario() -> None:
        async with cluster(model, decode=2) as made:
            made.workers["d0"].behaviour.unavailable = True
            for number in range(4):
                answer = await made.ask(ask(f"r{number}"))
                assert answer.finished is not None
                assert answer.finished.decode_worker == "d1/1"

    run(scenario())


def test_gives_up_after_max_attempts(model: Path) -> None:
    async def scenario() -> None:
        async with cluster(model, decode=3, max_attempts=2) as made:
            for worker in made.workers.values():
                worker.behaviour.unavailable = worker.role == "decode"
            refusal = await made.refused(ask("r1"))
            assert refusal.code is grpc.StatusCode.UNAVAILABLE
            assert "2 attempts" in refusal.message
            assert refusal.retry_after_s == 1.0
            await made.idle()

    run(scenario())


def test_restarted_worker_serves_with_its_new_epoch(model: Path) -> None:
    async def scenario() -> None:
        async with cluster(model, no_worker_grace_s=5.0) as made:
            assert (await made.ask(ask("r1"))).reason == "LENGTH"
            await made.workers["d0"].kill()
            again = asyncio.create_task(made.ask(ask("r2")))
            await asyncio.sleep(0.1)
            await made.add_worker("d0", "decode")
            answer = await again
            assert answer.finished is not None
            assert answer.finished.decode_worker == "d0/2"

    run(scenario())


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_no_worker_of_a_role_is_unavailable_soon(model: Path, role: str) -> None:
    async def scenario() -> None:
        counts = {"prefill": 1, "decode": 1, role: 0}
        async with cluster(model, **counts) as made:
            started = time.monotonic()
            refusals = await asyncio.gather(*(made.refused(ask(f"r{number}")) for number in range(5)))
            assert time.monotonic() - started < 1.5
            for refusal in refusals:
                assert refusal.code is grpc.StatusCode.UNAVAILABLE
                assert f"no {role} worker is ready" in refusal.message
                assert refusal.retry_after_s == 1.0
            await made.idle()

    run(scenario())


def test_attempts_count_failures_and_keep_away_from_who_failed() -> None:
    async def scenario() -> None:
        attempts = Attempts(max_attempts=3, retry_after_s=2.0)
        life, other = WorkerLife("w", 1, 1), WorkerLife("x", 1, 1)
        assert [attempts.begin(), attempts.begin()] == [0, 1]
        attempts.failed(AttemptFailedError("a", worker=life), frozenset({life, other}))
        assert (attempts.excluded, attempts.avoided) == (frozenset({life}), frozenset())
        attempts.failed(AttemptFailedError("b"), frozenset({other}))
        assert (attempts.excluded, attempts.avoided) == (frozenset({life}), frozenset({other}))
        with pytest.raises(UnavailableError, match="3 attempts, the last failed with: c"):
            attempts.failed(AttemptFailedError("c"), frozenset())

    run(scenario())


@pytest.mark.parametrize("gone", ["prefill", "decode"])
def test_one_role_serves_alone_where_that_is_allowed(model: Path, gone: str) -> None:
    """A stream goes on, new requests are served, and both roles share the work again once both are there."""

    async def scenario() -> None:
        async with cluster(model, behaviour=Behaviour(step_s=0.005), serve_alone=True) as made:
            (lost,) = [worker for worker in made.workers.values() if worker.role == gone]
            (left,) = [worker for worker in made.workers.values() if worker.role != gone]
            answer = await stream_across(made, lambda _: lost.kill())
            assert answer.token_ids == expected_answer(PROMPT, 60)
            request = ask("r2", num=5)
            request.explain = True
            alone = await made.ask(request)
            assert alone.token_ids == expected_answer(PROMPT, 5)
            assert alone.finished is not None
            assert alone.finished.prefill_worker == alone.finished.decode_worker == f"{left.worker_id}/1"
            assert alone.finished.route == "kv_aware: there is no worker of the other role"
            await made.add_worker("back", lost.role)
            await made.ready(2)
            both = await made.ask(ask("r3", num=5))
            assert both.finished is not None
            assert "back/1" in (both.finished.prefill_worker, both.finished.decode_worker)

    run(scenario())
