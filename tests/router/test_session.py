"""Every way in which a request ends early: stop strings, Cancel, a client that goes, the deadline, a slow reader."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from engine.model_source import resolve
from engine.tokenizer import Tokenizer
from protos import inference_pb2
from tests.router.fake_worker import expected_answer
from tests.router.harness import PROMPT, Answer, Behaviour, Cluster, ask, cluster, eventually, run


async def rest_of(events: AsyncIterator[inference_pb2.GenerateEvent], answer: Answer) -> None:
    async for event in events:
        answer.add(event)


async def aborted_on_both_sides(made: Cluster, request_id: str) -> None:
    """Both workers hear of the end and hold nothing."""
    sides = [("decode", worker) for worker in made.workers.values() if worker.role == "decode"]
    sides += [("prefill", worker) for worker in made.workers.values() if worker.role == "prefill"]
    for craft, worker in sides:
        await eventually(lambda c=craft, w=worker: (c, request_id) in [entry[:2] for entry in w.aborts])
    await made.idle()


@pytest.mark.parametrize("split", [True, False])
def test_stop_string_across_tokens_ends_the_stream(model: Path, split: bool) -> None:
    async def scenario() -> None:
        async with cluster(model, split=split) as made:
            text = Tokenizer.load(resolve(str(model))).decode(expected_answer(PROMPT, 30))
            stop = text[6:9]
            end = text.index(stop)
            answer = await made.ask(ask("r1", num=1000, stop=["never there", stop]))
            assert answer.reason == "STOP"
            assert answer.text == text[:end]
            assert answer.finished is not None
            assert answer.finished.stop_string == stop
            assert answer.finished.usage.completion_tokens == len(answer.token_ids) == end + len(stop)
            await eventually(lambda: ("decode", "r1", 0) in made.workers["d0"].aborts)
            await made.idle()

    run(scenario())


@pytest.mark.parametrize("eos_at", [0, 1, 5])
@pytest.mark.parametrize("split", [True, False])
def test_the_token_that_ends_the_request(model: Path, split: bool, eos_at: int) -> None:
    async def scenario() -> None:
        async with cluster(model, split=split, behaviour=Behaviour(eos_at=eos_at)) as made:
            answer = await made.ask(ask("r1", num=50))
            assert answer.reason == "EOS"
            assert answer.token_ids == expected_answer(PROMPT, eos_at + 1)
            await made.idle()
            aborts = [("decode", "r1", 0)] if split and eos_at == 0 else []
            await eventually(lambda: made.workers["d0"].aborts == aborts)

    run(scenario())


def test_cancel_while_decoding(model: Path) -> None:
    async def scenario() -> None:
        async with cluster(model, behaviour=Behaviour(step_s=0.01)) as made:
            call = made.stub.Generate(ask("r1", num=1000))
            answer = Answer()
            async for event in call:
                answer.add(event)
                if event.HasField("tokens") and len(answer.token_ids) == 5:
                    assert (await made.stub.Cancel(inference_pb2.CancelRequest(request_id="r1"))).found
            assert answer.reason == "CANCELLED"
            assert answer.finished is not None
            assert answer.finished.usage.completion_tokens == len(answer.token_ids)
            await aborted_on_both_sides(made, "r1")
            assert not (await made.stub.Cancel(inference_pb2.CancelRequest(request_id="r1"))).found
            assert made.app.stats().outcomes == {"cancelled": 1}

    run(scenario())


@pytest.mark.parametrize(
    ("phase", "behaviour"),
    [
        ("queued", Behaviour(capacity=0)),
        ("reserve", Behaviour(reserve_s=1.0)),
        ("prefill", Behaviour(prefill_s=5.0)),
        ("decode", Behaviour(step_s=0.01)),
    ],
)
@pytest.mark.parametrize("by", ["cancel", "disconnect", "deadline", "grpc deadline"])
def test_every_end_in_every_phase_leaves_nothing(model: Path, phase: str, behaviour: Behaviour, by: str) -> None:
    async def scenario() -> None:
        async with cluster(model, behaviour=behaviour) as made:
            request = ask("r1", num=1000)
            if by == "deadline":
                request.deadline_s = 0.2
            started = time.monotonic()
            call = made.stub.Generate(request, timeout=0.2 if by == "grpc deadline" else None)
            answer = Answer()
            events = aiter(call)
            answer.add(await anext(events))
            decode, prefill = made.workers["d0"], made.workers["p0"]
            await eventually(
                {
                    "queued": lambda: made.app.stats().queued == 1,
                    "reserve": lambda: made.app.stats().in_flight == 1,
                    "prefill": lambda: prefill.prefilling,
                    "decode": lambda: "r1" in decode.running and decode.running["r1"].known > 3,
                }[phase]
            )
            if by == "cancel":
                assert (await made.stub.Cancel(inference_pb2.CancelRequest(request_id="r1"))).found
                await rest_of(events, answer)
                assert answer.reason == "CANCELLED"
            elif by == "disconnect":
                call.cancel()
            else:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await rest_of(events, answer)
                assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
                assert 0.15 < time.monotonic() - started < 0.7
            await made.idle()
            if phase in ("prefill", "decode"):
                await aborted_on_both_sides(made, "r1")
            outcome = {"cancel": "cancelled", "disconnect": "client_gone", "deadline": "deadline_exceeded"}
            if by in outcome:
                await eventually(lambda: made.app.stats().outcomes == {outcome[by]: 1})

    run(scenario())


def test_deadline_bounds_a_worker_that_never_answers(model: Path) -> None:
    async def scenario() -> None:
        async with cluster(model) as made:
            made.workers["p0"].behaviour = Behaviour(prefill_s=60.0)
            request = ask("r1")
            request.deadline_s = 0.3
            started = time.monotonic()
            refusal = await made.refused(request)
            assert refusal.code is grpc.StatusCode.DEADLINE_EXCEEDED
            assert "0.3 s; it waited for the first token of worker p0/1" in refusal.message
            assert 0.3 <= time.monotonic() - started < 0.8
            await aborted_on_both_sides(made, "r1")

    run(scenario())


def test_client_that_stops_reading_is_cut_off(model: Path) -> None:
    async def scenario() -> None:
        behaviour = Behaviour(step_s=0.0)
        async with cluster(model, behaviour=behaviour, max_stream_buffer=64) as made:
            # A window of 64 KiB is full after some thousands of events.
            narrow = (("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0))
            async with grpc.aio.insecure_channel(made.app.address, options=narrow) as channel:
                generate = channel.unary_stream(
                    "/pdserve.v1.Inference/Generate",
                    request_serializer=inference_pb2.GenerateRequest.SerializeToString,
                    response_deserializer=inference_pb2.GenerateEvent.FromString,
                )
                call = generate(ask("slow", num=400, logprobs=20))
                await anext(aiter(call))
                await eventually(lambda: made.app.stats().outcomes.get("resource_exhausted") == 1, timeout_s=15)
                for number in range(3):
                    other = await made.ask(ask(f"reads {number}", num=400))
                    assert other.token_ids == expected_answer(PROMPT, 400)
                call.cancel()
            await asyncio.sleep(0)
            await made.idle()

    run(scenario())


def test_cancel_that_races_the_end_gives_one_ending(model: Path) -> None:
    async def scenario() -> None:
        async with cluster(model, behaviour=Behaviour(step_s=0.05)) as made:

            async def race(number: int) -> str:
                answer = Answer()
                cancels = []
                async for event in made.stub.Generate(ask(f"r{number}", num=3)):
                    answer.add(event)
                    if len(answer.token_ids) >= 1 + number % 3:
                        request = inference_pb2.CancelRequest(request_id=f"r{number}")
                        cancels.append(asyncio.ensure_future(made.stub.Cancel(request)))
                await asyncio.gather(*cancels)
                return answer.reason

            endings = await asyncio.gather(*(race(number) for number in range(60)))
            assert set(endings) == {"LENGTH", "CANCELLED"}
            await made.idle()

    run(scenario())
