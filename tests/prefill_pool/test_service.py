"""Meet: the pair is begun, for the life of the worker that the router means."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc
import pytest

from engine.config import ModelOptions
from protos import worker_pb2 as pb
from protos import worker_pb2_grpc
from protos.auth import WORKER_METADATA_KEY, worker_key
from tests.mini_cluster import DEADLINE_S, SECRET, MiniCluster, MiniWorker, Shape

METADATA = ((WORKER_METADATA_KEY, worker_key(SECRET)),)
Meet = Callable[[pb.MeetRequest], Awaitable[pb.MeetReply]]


@pytest.fixture
def scene(tiny_llama: Path, tmp_path: Path) -> Callable[..., None]:
    """Runs a scenario with a prefill and a decode worker, and no router to introduce them."""

    def run(scenario: Callable[[MiniWorker, MiniWorker, Meet], Awaitable[None]]) -> None:
        async def main() -> None:
            cluster = MiniCluster(Shape(model=ModelOptions(path=str(tiny_llama))), tmp_path)
            try:
                prefill = await cluster.add_worker("p", "prefill")
                decode = await cluster.add_worker("d", "decode")
                async with grpc.aio.insecure_channel(prefill.front.address) as channel:
                    stub = worker_pb2_grpc.PrefillWorkerStub(channel)
                    await scenario(prefill, decode, lambda request: stub.Meet(request, metadata=METADATA))
            finally:
                await cluster.__aexit__(None, None, None)

        asyncio.run(main())

    return run


def request_for(prefill: MiniWorker, decode: MiniWorker) -> pb.MeetRequest:
    met = decode.front.link.description
    return pb.MeetRequest(
        epoch=prefill.front.link.epoch,
        worker=met.identity,
        control_addresses=met.control_addresses,
        layout=met.layout,
    )


def test_a_meeting_makes_the_pair_and_may_be_repeated(scene: Callable[..., None]) -> None:
    async def scenario(prefill: MiniWorker, decode: MiniWorker, meet: Meet) -> None:
        for _ in range(2):
            await meet(request_for(prefill, decode))
        for worker, peer in ((prefill, "d/1"), (decode, "p/1")):
            link = worker.front.link
            async with asyncio.timeout(DEADLINE_S), link.news:
                await link.news.wait_for(
                    lambda link=link, peer=peer: [(pair.peer, pair.state) for pair in link.pairs] == [(peer, "ready")]
                )

    scene(scenario)


def test_a_call_for_another_life_or_a_draining_worker_is_refused(scene: Callable[..., None]) -> None:
    async def scenario(prefill: MiniWorker, decode: MiniWorker, meet: Meet) -> None:
        stale = request_for(prefill, decode)
        stale.epoch += 1
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await meet(stale)
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        broken = request_for(prefill, decode)
        broken.layout.num_layers = 0
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await meet(broken)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert await prefill.front.drain(DEADLINE_S)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await meet(request_for(prefill, decode))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert prefill.front.link.stats.num_pairs == 0

    scene(scenario)
