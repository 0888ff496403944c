"""The prompt is at the prefill worker while blocks are being reserved, and leaves if there are none."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest

from engine.block_hash import each_block_hash
from engine.block_log import key_of
from protos import inference_pb2
from protos.worker_pb2 import BlockEvents
from tests.router.fake_worker import Behaviour, expected_answer
from tests.router.harness import PROMPT, ask, cluster, eventually, run


def test_the_prompt_waits_for_its_ticket(model: Path) -> None:
    async def scenario() -> None:
        async with cluster(model, behaviour=Behaviour(reserve_s=0.3)) as made:
            decode, prefill = made.workers["d0"], made.workers["p0"]
            asking = asyncio.create_task(made.ask(ask("r1", num=20)))
            await eventually(lambda: "r1" in prefill.waiting)
            assert not decode.reserved
            answer = await asking
            assert answer.token_ids == expected_answer(PROMPT, 20)
            assert prefill.prefilled == ["r1"]
            assert not prefill.waiting
            await made.idle()

    run(scenario())


@pytest.mark.parametrize("end", ["cancel", "refused"])
def test_a_prompt_that_gets_no_ticket_goes_away(model: Path, end: str) -> None:
    async def scenario() -> None:
        behaviour = Behaviour(reserve_s=0.3, capacity=1000 if end == "cancel" else 0)
        async with cluster(model, behaviour=behaviour) as made:
            prefill = made.workers["p0"]
            asking = asyncio.create_task(made.ask(ask("r1", num=20)))
            await eventually(lambda: "r1" in prefill.waiting)
            if end == "cancel":
                assert (await made.stub.Cancel(inference_pb2.CancelRequest(request_id="r1"))).found
                await asking
                await eventually(lambda: ("prefill", "r1", 0) in prefill.aborts)
            else:
                await eventually(lambda: made.app.stats().queued == 1)
            await eventually(lambda: not prefill.waiting)
            assert not prefill.prefilled
            if end == "refused":
                made.workers["d0"].behaviour.capacity = 1
                assert (await asking).token_ids == expected_answer(PROMPT, 20)
            await made.idle()

    run(scenario())


@pytest.mark.parametrize("answer_s", [0.0, 0.05])
def test_the_first_token_may_come_before_word_of_the_reservation(model: Path, answer_s: float) -> None:
    async def scenario() -> None:
        behaviour = Behaviour(answer_s=answer_s, has_ticket_before=True)
        async with cluster(model, behaviour=behaviour) as made:
            answers = await asyncio.gather(*(made.ask(ask(f"r{n}", num=20)) for n in range(30)))
            assert all(answer.token_ids == expected_answer(PROMPT, 20) for answer in answers)
            assert made.app.stats().failed_attempts == 0
            await made.idle()

    run(scenario())


def test_a_prefill_worker_that_refuses_the_prompt_early(model: Path) -> None:
    """Its word comes before the reservation; the reservation does not outlive the attempt."""

    async def scenario() -> None:
        async with cluster(model, behaviour=Behaviour(reserve_s=0.1, has_ticket_before=True)) as made:
            made.workers["p0"].behaviour.unavailable = True
            refusal = await made.refused(ask("r1", num=5))
            assert refusal.code is grpc.StatusCode.UNAVAILABLE
            assert ("decode", "r1", 0) in made.workers["d0"].aborts
            await made.idle()

    run(scenario())


def test_the_choice_is_explained_to_who_asks(model: Path) -> None:
    async def scenario() -> None:
        async with cluster(model) as made:
            request = ask("r1", num=3)
            plain = await made.ask(request)
            request.request_id, request.explain = "r2", True
            told = await made.ask(request)
            assert plain.finished is not None
            assert told.finished is not None
            assert (plain.finished.route, told.finished.route) == ("", "kv_aware: split")

    run(scenario())


def test_only_what_a_prefill_worker_must_compute_is_its_load(model: Path) -> None:
    async def scenario() -> None:
        async with cluster(model, behaviour=Behaviour(reserve_s=0.3)) as made:
            fleet = made.app._fleet
            (info,) = (each for each in fleet.workers() if each.worker_id == "p0")
            ((root, size),) = fleet.roster.chains
            prompt = [7 + index % 50 for index in range(4 * size + 3)]
            keys = map(key_of, each_block_hash(prompt[: 3 * size], size, root))
            assert fleet.prefixes.apply(info, BlockEvents(number=1, stored=keys, is_snapshot=True))
            asking = asyncio.create_task(made.ask(ask("r1", num=5, prompt=prompt)))
            await eventually(lambda: "r1" in made.workers["p0"].waiting)
            assert info.prefill_tokens == size + 3 + 1, "and room for the first new one"
            await asking
            assert info.prefill_tokens == 0
            await made.idle()

    run(scenario())
