"""What routers may ask workers for: the arithmetic, and two routers that share an overloaded worker."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from decode_pool.credits import share_out
from engine.config import ModelOptions
from protos import inference_pb2_grpc, worker_pb2
from router.app import RouterApp
from router.config import RouterConfig
from router.credit import Credit, blocks_needed
from router.errors import WorkerFullError
from router.info import WorkerInfo
from router.policies import Demand, has_room
from router.store import FleetStore, MemoryStore
from tests.router.fake_worker import SECRET, Behaviour, FakeWorker
from tests.router.harness import Answer, Cluster, ask, cluster, eventually, run


def credits(requests: int, blocks: int) -> worker_pb2.Credits:
    return worker_pb2.Credits(requests=requests, blocks=blocks)


def test_a_worker_that_says_nothing_of_credits_is_asked_for_all() -> None:
    credit = Credit()
    with credit.asking(10):
        assert credit.covers(10**9, is_first=False)
    assert credit.covers(10**9, is_first=False)


def test_what_was_asked_for_since_counts_until_the_worker_counts_it() -> None:
    credit = Credit()
    credit.tell(credits(2, 100))
    with credit.asking(60):
        assert not credit.covers(50, is_first=False)
        assert credit.covers(40, is_first=False)
    assert not credit.covers(50, is_first=False)
    with credit.asking(10):
        assert not credit.covers(1, is_first=False)  # no third one
        credit.tell(credits(1, 100))
        assert not credit.covers(1, is_first=False)  # the worker has not counted the one that is on its way
    credit.tell(credits(1, 100))
    assert credit.covers(100, is_first=False)


def test_what_was_refused_takes_nothing() -> None:
    credit = Credit()
    credit.tell(credits(1, 100))
    with pytest.raises(WorkerFullError), credit.asking(100):
        raise WorkerFullError("no room")
    assert credit.covers(100, is_first=False)


def test_the_first_request_may_be_of_any_size() -> None:
    credit = Credit()
    credit.tell(credits(1, 10))
    assert credit.covers(1000, is_first=True)
    credit.tell(credits(0, 0))
    assert not credit.covers(1, is_first=True)


def test_a_request_takes_what_the_worker_expects_of_its_answer() -> None:
    assert blocks_needed(100, 1000, 60, 0, 16) == 10
    assert blocks_needed(100, 20, 60, 0, 16) == 8
    assert blocks_needed(100, 20, 60, 47, 16) == 6
    info = WorkerInfo("d0", 1, "decode", "here")
    info.description.layout.block_size = 16
    info.stats.expected_answer_tokens = 60
    info.credit.tell(credits(4, 9))
    info.num_decoding = 1
    demand = Demand(100, answer_tokens=1000)
    assert not has_room(info, demand)
    assert has_room(info, Demand(100, answer_tokens=20))
    assert has_room(info, Demand(100, answer_tokens=1000, insists=True))


@contextlib.asynccontextmanager
async def second_router(model: Path, store: FleetStore) -> AsyncIterator[inference_pb2_grpc.InferenceStub]:
    app = RouterApp(
        config=RouterConfig(port=0),
        model=ModelOptions(path=str(model)),
        mode="split",
        store=store,
        secret=SECRET,
        router_id="router-1",
    )
    channel = grpc.aio.insecure_channel(await app.start())
    try:
        await eventually(lambda: app.stats().workers.get("ready", 0) == 2)
        yield inference_pb2_grpc.InferenceStub(channel)
    finally:
        await channel.close()
        await app.stop()


def sharing(worker: FakeWorker, turns: list[int]) -> None:
    """Have a fake worker share out its places as a real one does."""

    def share(router_id: str) -> worker_pb2.Credits | None:
        names = list(worker.routers)
        if router_id not in names:
            return None
        turns[0] += 1
        free = worker.behaviour.capacity - len(worker.running)
        found = share_out(free, 1000, 1.0, len(names), turns[0] // 8)[names.index(router_id)]
        return worker_pb2.Credits(requests=found.requests, blocks=found.blocks)

    worker.behaviour.credits = share


async def share_refused(model: Path, *, with_credits: bool) -> float:
    """Of the Reserves of two routers with three times as many requests as a worker takes, the share it refused."""
    store = MemoryStore(refresh_s=0.1)
    async with cluster(model, behaviour=Behaviour(capacity=8, step_s=0.005), store=store) as made:
        worker = made.workers["d0"]
        if with_credits:
            sharing(worker, [0])
        async with second_router(model, store) as stub:
            await asyncio.gather(*(flood(made, one, name) for one, name in ((made.stub, "a"), (stub, "b"))))
        await made.idle()
        return worker.num_refused / worker.num_asked


async def flood(made: Cluster, stub: inference_pb2_grpc.InferenceStub, name: str) -> None:
    """Twelve clients, each of which asks again as soon as it was served."""

    async def client(number: int) -> None:
        for turn in range(5):
            answer = Answer()
            async for event in stub.Generate(ask(f"{name}-{number}-{turn}", num=4 + (number + turn) % 5)):
                answer.add(event)
            assert answer.reason == "LENGTH"

    await asyncio.gather(*(client(number) for number in range(12)))


def test_two_routers_are_hardly_refused_under_overload(model: Path) -> None:
    async def scenario() -> None:
        without, shared = await share_refused(model, with_credits=False), await share_refused(model, with_credits=True)
        print(f"refused Reserves: {without:.0%} without credits, {shared:.0%} with")
        assert without > 0.1
        assert shared < without / 3

    run(scenario(), timeout_s=60.0)


def test_a_request_larger_than_any_share_is_served_in_the_end(model: Path) -> None:
    async def scenario() -> None:
        async with cluster(model, behaviour=Behaviour(credits=lambda router_id: credits(1, 1))) as made:
            long = asyncio.create_task(made.ask(ask("long", num=300)))
            await eventually(lambda: "long" in made.workers["d0"].running)
            made.workers["d0"].behaviour.step_s = 0.02
            answer = await made.ask(ask("larger", num=4, prompt=[41] * 60))
            assert answer.reason == "LENGTH"
            long.cancel()
            await asyncio.gather(long, return_exceptions=True)
            await made.idle()

    run(scenario())
