"""The same request once more, by an id that its client chose, while it runs: the new call takes it over."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest

from protos import inference_pb2
from tests.router.fake_worker import Behaviour, expected_answer
from tests.router.harness import PROMPT, Answer, Cluster, ask, cluster, eventually, run

NUM = 40
STEP_S = 0.01


async def heard(made: Cluster, request: inference_pb2.GenerateRequest, num: int) -> tuple[object, Answer]:
    """A call that has heard some tokens, and goes on."""
    call, answer = made.stub.Generate(request), Answer()
    while len(answer.token_ids) < num:
        answer.add(await call.read())
    return call, answer


async def code_of(call: grpc.aio.UnaryStreamCall) -> grpc.StatusCode:
    while not call.done():
        try:
            if await call.read() is grpc.aio.EOF:
                break
        except grpc.aio.AioRpcError as error:
            return error.code()
    return await call.code()


@pytest.mark.parametrize("split", [True, False])
def test_it_hears_the_whole_answer_and_nothing_is_generated_twice(model: Path, split: bool) -> None:
    async def scenario() -> None:
        async with cluster(model, split=split, behaviour=Behaviour(step_s=STEP_S)) as made:
            first, answer = await heard(made, ask("same", num=NUM), 10)
            again = await made.ask(ask("same", num=NUM))
            assert await code_of(first) is grpc.StatusCode.ABORTED
            assert again.token_ids == expected_answer(PROMPT, NUM)
            assert again.accepted == answer.accepted
            assert again.reason == "LENGTH"
            assert again.finished.usage.completion_tokens == NUM
            stats = made.app.stats()
            assert stats.generated_tokens == NUM
            assert stats.outcomes == {"aborted": 1, "length": 1}
            resumed = [list(request.resume_from) for request in made.workers["d0"].received]
            assert resumed[0] == []
            assert expected_answer(PROMPT, NUM)[:10] == resumed[-1][:10]
            await made.idle()

    run(scenario())


def test_a_third_call_takes_it_over_from_the_second(model: Path) -> None:
    async def scenario() -> None:
        async with cluster(model, behaviour=Behaviour(step_s=STEP_S)) as made:
            first, _ = await heard(made, ask("same", num=NUM), 5)
            second, _ = await heard(made, ask("same", num=NUM), 15)
            third = await made.ask(ask("same", num=NUM))
            assert third.token_ids == expected_answer(PROMPT, NUM)
            for call in (first, second):
                assert await code_of(call) is grpc.StatusCode.ABORTED
            await made.idle()

    run(scenario())


def test_calls_that_come_at_once_leave_one_that_hears_it_all(model: Path) -> None:
    async def scenario() -> None:
        async with cluster(model, behaviour=Behaviour(step_s=STEP_S)) as made:
            asked = [made.ask(ask("same", num=NUM)) for _ in range(8)]
            ends = await asyncio.gather(*asked, return_exceptions=True)
            answers = [end for end in ends if isinstance(end, Answer)]
            codes = [end.code() for end in ends if isinstance(end, grpc.aio.AioRpcError)]
            assert len(answers) == 1
            assert answers[0].token_ids == expected_answer(PROMPT, NUM)
            assert codes == [grpc.StatusCode.ABORTED] * 7
            await made.idle()

    run(scenario())


def test_the_seed_that_was_drawn_stays(model: Path) -> None:
    async def scenario() -> None:
        async with cluster(model, behaviour=Behaviour(step_s=STEP_S)) as made:
            request = ask("same", num=NUM)
            request.sampling.temperature = 1.0
            _, first = await heard(made, request, 3)
            again = await made.ask(request)
            assert first.accepted is not None
            assert again.accepted == first.accepted
            assert len({received.params.seed for received in made.workers["d0"].received}) == 1
            await made.idle()

    run(scenario())


def test_with_log_probabilities_it_begins_anew(model: Path) -> None:
    async def scenario() -> None:
        async with cluster(model, behaviour=Behaviour(step_s=STEP_S)) as made:
            request = ask("same", num=NUM)
            request.sampling.logprobs = 0
            await heard(made, request, 5)
            again = await made.ask(request)
            assert again.token_ids == expected_answer(PROMPT, NUM)
            assert not any(received.resume_from for received in made.workers["d0"].received)
            await made.idle()

    run(scenario())


@pytest.mark.parametrize("what", ["body", "tenant's key", "resumable"])
def test_what_is_not_the_same_is_refused_and_disturbs_nobody(model: Path, tmp_path: Path, what: str) -> None:
    keys = tmp_path / "keys"
    keys.write_text("one\nother\n")

    async def scenario() -> None:
        async with cluster(model, api_keys_file=str(keys), behaviour=Behaviour(step_s=STEP_S)) as made:
            call = made.stub.Generate(ask("same", num=NUM), metadata=(("authorization", "Bearer one"),))
            answer = Answer()
            answer.add(await call.read())
            request = ask("same", num=NUM + (what == "body"))
            request.resumable = what == "resumable"
            key = "other" if what == "tenant's key" else "one"
            refused = made.stub.Generate(request, metadata=(("authorization", f"Bearer {key}"),))
            assert await code_of(refused) is grpc.StatusCode.ALREADY_EXISTS
            while (event := await call.read()) is not grpc.aio.EOF:
                answer.add(event)
            assert answer.token_ids == expected_answer(PROMPT, NUM)
            await made.idle()

    run(scenario())


def test_one_that_waits_in_line_is_taken_over_too(model: Path) -> None:
    async def scenario() -> None:
        async with cluster(model, behaviour=Behaviour(step_s=STEP_S, capacity=0)) as made:
            first = made.stub.Generate(ask("same", num=NUM))
            await first.read()
            await eventually(lambda: made.app.stats().queued == 1)
            again = asyncio.create_task(made.ask(ask("same", num=NUM)))
            assert await code_of(first) is grpc.StatusCode.ABORTED
            await eventually(lambda: made.app.stats().queued == 1)
            for worker in made.workers.values():
                worker.behaviour.capacity = 10
            assert (await again).token_ids == expected_answer(PROMPT, NUM)
            await made.idle()

    run(scenario())
