"""Workers are introduced once per life, and nothing depends on how that goes."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from tests.router.fake_worker import FakeWorker
from tests.router.harness import Behaviour, cluster, eventually, run

SETTLED_S = 0.2


def met(worker: FakeWorker) -> list[str]:
    return sorted(f"{request.worker.worker_id}/{request.worker.epoch}" for request in worker.met)


def test_each_prefill_worker_meets_each_decode_worker_once(model: Path) -> None:
    async def scenario() -> None:
        async with cluster(model, prefill=2, decode=2) as made:
            workers = made.workers
            await eventually(lambda: all(met(workers[name]) == ["d0/1", "d1/1"] for name in ("p0", "p1")))
            request = workers["p1"].met[0]
            assert request.epoch == workers["p1"].epoch
            assert request.control_addresses == [f"control of {request.worker.worker_id}"]
            assert request.layout == workers["d0"].description().layout
            await made.add_worker("d2", "decode")
            await eventually(lambda: all(met(workers[name]) == ["d0/1", "d1/1", "d2/1"] for name in ("p0", "p1")))
            await asyncio.sleep(SETTLED_S)
            assert [len(workers[name].met) for name in ("p0", "p1", "d0", "d1", "d2")] == [3, 3, 0, 0, 0]

    run(scenario())


def test_a_new_life_is_another_introduction_a_new_connection_is_not(model: Path) -> None:
    async def scenario() -> None:
        async with cluster(model, worker_silence_s=0.5, heartbeat_s=0.1) as made:
            prefill, decode = made.workers["p0"], made.workers["d0"]
            await eventually(lambda: met(prefill) == ["d0/1"])
            decode.behaviour.silent = True
            await eventually(lambda: made.app.stats().workers.get("lost") == 1)
            decode.behaviour.silent = False
            await made.ready(2)
            await asyncio.sleep(SETTLED_S)
            assert met(prefill) == ["d0/1"]
            await decode.kill()
            await made.add_worker("d0", "decode")
            await eventually(lambda: met(prefill) == ["d0/1", "d0/2"])
            await prefill.kill()
            newer = await made.add_worker("p0", "prefill")
            await eventually(lambda: met(newer) == ["d0/2"])

    run(scenario())


def test_a_role_that_was_given_up_is_another_introduction(model: Path) -> None:
    async def scenario() -> None:
        async with cluster(model, prefill=1, decode=2) as made:
            prefill, first, second = (made.workers[name] for name in ("p0", "d0", "d1"))
            await eventually(lambda: met(prefill) == ["d0/1", "d1/1"])
            first.set_role("prefill")
            await eventually(lambda: met(first) == ["d1/1"])
            first.set_role("decode")
            await eventually(lambda: met(prefill) == ["d0/1", "d0/1", "d1/1"])
            await asyncio.sleep(SETTLED_S)
            assert [len(worker.met) for worker in (prefill, first, second)] == [3, 1, 0]

    run(scenario())


def test_workers_of_both_roles_meet_each_other_and_not_themselves(model: Path) -> None:
    async def scenario() -> None:
        async with cluster(model, prefill=0, decode=0) as made:
            for name in ("b0", "b1"):
                await made.add_worker(name, "both")
            await eventually(lambda: met(made.workers["b0"]) == ["b1/1"] and met(made.workers["b1"]) == ["b0/1"])

    run(scenario())


def test_nobody_is_introduced_who_could_not_use_it(model: Path) -> None:
    async def scenario() -> None:
        async with cluster(model) as made:
            await made.add_worker("stranger", "decode", model_hash="another")
            await made.ready(3)
            await asyncio.sleep(SETTLED_S)
            assert met(made.workers["p0"]) == ["d0/1"]
        async with cluster(model, prefill=0, decode=0, split=False) as made:
            for name in ("b0", "b1"):
                await made.add_worker(name, "both")
            await made.ready(2)
            await asyncio.sleep(SETTLED_S)
            assert not any(worker.met for worker in made.workers.values())

    run(scenario())


def test_a_failure_is_logged_not_repeated_and_costs_no_request(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with cluster(model, behaviour=Behaviour(refuses_to_meet=True)) as made:
            await eventually(lambda: met(made.workers["p0"]) == ["d0/1"])
            assert len((await made.ask(num=4)).token_ids) == 4
            await made.add_worker("d1", "decode")
            await eventually(lambda: met(made.workers["p0"]) == ["d0/1", "d1/1"])
            await asyncio.sleep(SETTLED_S)
            assert met(made.workers["p0"]) == ["d0/1", "d1/1"]

    with caplog.at_level(logging.WARNING, "router.introductions"):
        run(scenario())
    assert "p0/1 was not introduced to d0/1: worker p0/1 answered Meet with INTERNAL: told to" in caplog.messages


def test_a_worker_that_does_not_answer_holds_no_other_up_and_no_stop(model: Path) -> None:
    async def scenario() -> None:
        async with cluster(model, prefill=2, decode=1) as made:
            await eventually(lambda: all(met(made.workers[name]) for name in ("p0", "p1")))
            made.workers["p0"].behaviour.silent = True
            await made.add_worker("d1", "decode")
            await eventually(lambda: met(made.workers["p1"]) == ["d0/1", "d1/1"], timeout_s=1.0)

    run(scenario(), timeout_s=10.0)
