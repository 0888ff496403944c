"""Under a stream of small requests that never ends, whoever needs much, or lost what it had, is served all the same."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from decode_pool.config import DecodeOptions
from engine.config import CacheOptions, EngineOptions, ModelOptions
from protos import inference_pb2 as pb
from router.config import RouterConfig
from router.local_prefill import LocalPrefillConfig
from tests.mini_cluster import Answer, MiniCluster, Shape

WITHIN_S = 60.0


def request(length: int, num: int, seed: int = 0, priority: int = 0) -> pb.GenerateRequest:
    ids = [3 + (seed * 7919 + index * 31) % 390 for index in range(length)]
    sampling = pb.Sampling(max_tokens=num, ignore_eos=True)
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=ids), sampling=sampling, priority=priority)


@dataclass
class Stream:
    """Clients that ask for little, again and again."""

    num_served: int = 0
    tasks: list[asyncio.Task[None]] = field(default_factory=list)


@contextlib.asynccontextmanager
async def small_ones(cluster: MiniCluster, num_clients: int, length: int, num: int) -> AsyncIterator[Stream]:
    stream = Stream()

    async def client(number: int) -> None:
        turn = 0
        while True:
            await cluster.generate(request(length, num, seed=number * 1000 + turn))
            stream.num_served, turn = stream.num_served + 1, turn + 1

    stream.tasks = [asyncio.create_task(client(number)) for number in range(num_clients)]
    try:
        yield stream
    finally:
        for task in stream.tasks:
            task.cancel()
        await asyncio.gather(*stream.tasks, return_exceptions=True)
        async with asyncio.timeout(WITHIN_S):
            while cluster.router.stats().in_flight:  # noqa: ASYNC110 (what was cancelled is on its way there)
                await asyncio.sleep(0.01)
        await cluster.router._dispatcher.aborts.settle(WITHIN_S)


def shape(model: Path, num_blocks: int, decode: DecodeOptions, *, colocated: bool) -> Shape:
    return Shape(
        model=ModelOptions(path=str(model)),
        colocated=colocated,
        cache=CacheOptions(block_size=16, num_blocks=num_blocks),
        options=EngineOptions(max_step_tokens=64, max_running=8),
        decode=decode,
    )


@pytest.mark.parametrize("colocated", [True, False])
def test_a_long_prompt_is_served_under_a_stream_of_small_ones(
    tiny_llama: Path, tmp_path: Path, colocated: bool
) -> None:
    """It needs most of the blocks, which the small ones would never leave free at a time."""

    async def main() -> None:
        async with MiniCluster(shape(tiny_llama, 24, DecodeOptions(), colocated=colocated), tmp_path) as cluster:
            async with small_ones(cluster, 16, 30, 16) as stream:
                while stream.num_served < 16:  # noqa: ASYNC110 (the clients go on)
                    await asyncio.sleep(0.01)
                served = stream.num_served
                async with asyncio.timeout(WITHIN_S):
                    answer = await cluster.generate(request(330, 8))
                assert len(answer.token_ids) == 8
                assert stream.num_served - served < 200
            await cluster.until_idle()

    asyncio.run(main())


def test_preempted_requests_are_computed_again_by_the_prefill_pool(tiny_llama: Path, tmp_path: Path) -> None:
    """Under a stream of small ones, and with the answers of an engine that had room for all."""
    decode = DecodeOptions(predicted_answer_tokens=0, answer_margin=0.0, give_back_tokens=48)
    asked = [request(30, 120, seed=9 + number) for number in range(2)]

    async def answers(cluster: MiniCluster) -> list[list[int]]:
        async with asyncio.timeout(WITHIN_S):
            return [answer.token_ids for answer in await asyncio.gather(*map(cluster.generate, asked))]

    async def main() -> None:
        async with MiniCluster(shape(tiny_llama, 200, DecodeOptions(), colocated=True), tmp_path) as roomy:
            expected = await answers(roomy)
        (tmp_path / "tight").mkdir()
        tight = shape(tiny_llama, 20, decode, colocated=False)
        tight.router = RouterConfig(port=0, local_prefill=LocalPrefillConfig(max_share=0.0))
        async with MiniCluster(tight, tmp_path / "tight") as cluster:
            async with small_ones(cluster, 10, 30, 40) as stream:
                while stream.num_served < 4:  # noqa: ASYNC110 (the clients go on)
                    await asyncio.sleep(0.01)
                assert await answers(cluster) == expected
            await cluster.until_idle()
            stats = cluster.router.stats()
            print(
                f"{stats.given_back} given back, {cluster.workers['decode-0'].front.link.stats.preemptions} preempted"
            )
            assert stats.given_back > 0
            assert stats.failed_attempts == 0

    asyncio.run(main())


def test_a_preempted_request_is_served_under_a_stream_of_small_ones(tiny_llama: Path, tmp_path: Path) -> None:
    """Nothing is kept in hand for growth, so that sequences are preempted all the time; the long answer comes out."""
    decode = DecodeOptions(predicted_answer_tokens=0, answer_margin=0.0)

    async def main() -> None:
        async with MiniCluster(shape(tiny_llama, 20, decode, colocated=True), tmp_path) as cluster:
            async with small_ones(cluster, 12, 30, 40) as stream:
                while stream.num_served < 4:  # noqa: ASYNC110 (the clients go on)
                    await asyncio.sleep(0.01)
                async with asyncio.timeout(WITHIN_S):
                    answers: list[Answer] = await asyncio.gather(
                        *(cluster.generate(request(30, 200, seed=9 + number)) for number in range(2))
                    )
                assert [len(answer.token_ids) for answer in answers] == [200, 200]
            await cluster.until_idle()
            stats = cluster.workers["decode-0"].front.link.stats
            assert stats.preemptions > 0

    asyncio.run(main())
