"""Workers change their roles and leave under load: no request fails, no token is lost, repeated or another one."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace

import pytest

from cluster.client import Client, Endpoint
from cluster.front import FrontState
from engine.config import CacheOptions, EngineOptions, ModelOptions
from engine.engine import Engine, tokens_of
from engine.pace import PaceOptions
from protos import inference_pb2 as pb
from router.config import RouterConfig
from tests.mini_cluster import DEADLINE_S, Answer, MiniCluster, MiniWorker, Shape
from tests.session_pair import make_request

NUM_CLIENTS = 6
MOVE_AFTER_S = 0.1
STEP_MS = 4.0
"""So that something still generates after this time, however fast the machine is."""
LENGTHS = ((20, 150), (150, 40), (333, 80), (5, 250), (64, 120), (200, 8))
"""Of prompts and their answers."""


def prompt_of(length: int) -> list[int]:
    return random.Random(length).choices(range(3, 400), k=length)


@pytest.fixture(scope="module")
def expected(tiny_llama) -> list[list[int]]:
    """What one undisturbed engine says."""
    cache = CacheOptions(block_size=16, num_blocks=256)
    requests = [make_request(f"{length}", prompt_of(length), max_tokens=num) for length, num in LENGTHS]
    with Engine(ModelOptions(path=str(tiny_llama)), cache, EngineOptions(max_step_tokens=64)) as engine:
        return [list(tokens_of(outputs)) for outputs in engine.generate(requests)]


@dataclass
class Load:
    """Clients that ask again and again."""

    served: asyncio.Condition = field(default_factory=asyncio.Condition)
    num_served: int = 0
    tasks: list[asyncio.Task[None]] = field(default_factory=list)
    goes_on: bool = True

    async def more(self, num: int) -> None:
        """Wait until so many more are served; a client that failed says so."""
        until = self.num_served + num
        async with asyncio.timeout(DEADLINE_S), self.served:
            await self.served.wait_for(lambda: self.num_served >= until or any(task.done() for task in self.tasks))
        for task in self.tasks:
            if task.done():
                task.result()


Generate = Callable[[pb.GenerateRequest], Awaitable[Answer]]


@contextlib.asynccontextmanager
async def load_on(generate: Generate, expected: list[list[int]], *, resumable: bool) -> AsyncIterator[Load]:
    """Serve clients meanwhile, whose every token is looked at; at the end they have their last answers.

    Each asks once at least.
    """
    load = Load()
    numbers = itertools.count()

    async def client() -> None:
        while True:
            number = next(numbers)
            (length, num), tokens = LENGTHS[number % len(LENGTHS)], expected[number % len(LENGTHS)]
            sampling = pb.Sampling(max_tokens=num, ignore_eos=True)
            ids = pb.TokenIds(ids=prompt_of(length))
            request = pb.GenerateRequest(token_ids=ids, sampling=sampling, resumable=resumable)
            answer = await generate(request)
            assert answer.token_ids == tokens
            async with load.served:
                load.num_served += 1
                load.served.notify_all()
            if not load.goes_on:
                return

    load.tasks = [asyncio.create_task(client()) for _ in range(NUM_CLIENTS)]
    try:
        yield load
        load.goes_on = False
        async with asyncio.timeout(DEADLINE_S):
            await asyncio.gather(*load.tasks)
    finally:
        for task in load.tasks:
            task.cancel()
        await asyncio.gather(*load.tasks, return_exceptions=True)


def run(tiny_llama, directory, scenario, *, num_decode: int = 2) -> None:
    shape = Shape(
        model=ModelOptions(path=str(tiny_llama)),
        num_prefill=2,
        num_decode=num_decode,
        options=EngineOptions(max_step_tokens=64, max_running=8, pace=PaceOptions(fixed_ms=STEP_MS)),
        move_at_end_after_s=MOVE_AFTER_S,
        router=RouterConfig(port=0, max_attempts=1),
    )

    async def main() -> None:
        async with MiniCluster(shape, directory) as cluster:
            await scenario(cluster)
            await cluster.until_idle()
            cluster.router.check_integrity()
            stats = cluster.router.stats()
            assert stats.failed_attempts == stats.given_back == 0
            assert set(stats.outcomes) <= {"length"}

    asyncio.run(main())


async def until_it_generates(worker: MiniWorker) -> None:
    """Wait until some of the clients' requests run there."""
    async with asyncio.timeout(DEADLINE_S):
        while worker.front.link.stats.num_running < NUM_CLIENTS / 3:  # noqa: ASYNC110 (each step sets it)
            await asyncio.sleep(0.002)


async def until_all_are_routed(cluster: MiniCluster) -> None:
    """Wait until each client's first request has its workers."""
    async with asyncio.timeout(DEADLINE_S):
        while cluster.router.stats().routed_prompts < NUM_CLIENTS:  # noqa: ASYNC110 (a counter)
            await asyncio.sleep(0.002)


async def leave(cluster: MiniCluster, worker_id: str) -> None:
    """Drain one worker; it has left nothing behind."""
    worker = cluster.workers.pop(worker_id)
    both = [asyncio.create_task(worker.front.leave(30.0, MOVE_AFTER_S)) for _ in range(2)]
    answers = await asyncio.gather(*both, worker.front.leave(0.0, 0.0))
    assert answers[0] == answers[1] == answers[2], "whoever asks hears of the same end"
    assert answers[0]["finished"]
    assert worker.front.state is FrontState.STOPPED
    assert worker_id not in [record.worker_id for record in await cluster.store.workers()]
    pool = worker.host.engine.pool
    assert pool.num_free == pool.num_blocks


@pytest.mark.parametrize("resumable", [False, True])
def test_routers_are_restarted_one_after_the_other_under_load(tiny_llama, tmp_path, expected, resumable):
    async def scenario(cluster: MiniCluster) -> None:
        routers = {"router-0": cluster.router, "router-1": (await cluster.add_router("router-1"))[0]}
        addresses = {name: router.address for name, router in routers.items()}
        endpoints = [Endpoint(address=address) for address in addresses.values()]
        async with Client(*endpoints) as client:

            async def generate(request: pb.GenerateRequest) -> Answer:
                answer = Answer()
                async with asyncio.timeout(DEADLINE_S):
                    async for event in client.generate(request):
                        answer.take(event)
                return answer

            async with load_on(generate, expected, resumable=resumable) as load:
                await load.more(6)
                for name, router in routers.items():
                    assert await router.drain(0.05 if resumable else DEADLINE_S) or resumable
                    await router.stop()
                    await load.more(6)
                    port = int(addresses[name].rpartition(":")[2])
                    cluster.shape = replace(cluster.shape, router=replace(cluster.shape.router, port=port))
                    routers[name] = (await cluster.add_router(name))[0]
                    await load.more(6)
        cluster.router = routers["router-1"]

    run(tiny_llama, tmp_path, scenario)


@pytest.mark.parametrize("resumable", [False, True])
def test_roles_change_under_load(tiny_llama, tmp_path, expected, resumable):
    async def scenario(cluster: MiniCluster) -> None:
        async with load_on(cluster.generate, expected, resumable=resumable) as load:
            await load.more(6)
            for worker_id, role in (
                ("decode-1", "prefill"),
                ("prefill-1", "decode"),
                ("prefill-0", "decode"),
                ("decode-0", "prefill"),
                ("prefill-1", "prefill"),
                ("decode-1", "decode"),
            ):
                await cluster.workers[worker_id].front.set_role(role, 10.0, MOVE_AFTER_S)
                await load.more(8)
                await asyncio.sleep(2 * MOVE_AFTER_S)
        roles = {info.worker_id: info.role for info in cluster.router._fleet.workers()}
        assert roles == {"decode-0": "prefill", "decode-1": "decode", "prefill-0": "decode", "prefill-1": "prefill"}
        assert roles == {record.worker_id: record.role for record in await cluster.store.workers()}
        assert cluster.router.stats().moved > 0

    run(tiny_llama, tmp_path, scenario)


def test_workers_of_each_role_drain_under_load(tiny_llama, tmp_path, expected):
    async def scenario(cluster: MiniCluster) -> None:
        async with load_on(cluster.generate, expected, resumable=False) as load:
            await load.more(6)
            await leave(cluster, "decode-0")
            await load.more(6)
            await leave(cluster, "prefill-1")
            await load.more(6)
            await cluster.add_worker("decode-2", "decode")
            await load.more(6)
            await leave(cluster, "decode-1")
            await load.more(6)
        assert cluster.router.stats().moved > 0

    run(tiny_llama, tmp_path, scenario)


@pytest.mark.parametrize("what", ["front", "engine process"])
def test_what_the_only_decode_worker_has_ends_there_before_it_leaves(tiny_llama, tmp_path, expected, what):
    async def scenario(cluster: MiniCluster) -> None:
        worker = cluster.workers.pop("decode-0")
        async with load_on(cluster.generate, expected, resumable=False) as load:
            load.goes_on = False
            await until_all_are_routed(cluster)
            await until_it_generates(worker)
            if what == "front":
                assert (await worker.front.leave(30.0, 0.0))["finished"]
            else:
                assert await asyncio.to_thread(worker.host.drain, 30.0)
        assert load.num_served == NUM_CLIENTS
        assert cluster.router.stats().moved == 0
        pool = worker.host.engine.pool
        assert pool.num_free == pool.num_blocks

    run(tiny_llama, tmp_path, scenario, num_decode=1)


def test_an_engine_process_that_is_to_end_drains_through_its_front(tiny_llama, tmp_path, expected):
    async def scenario(cluster: MiniCluster) -> None:
        async with load_on(cluster.generate, expected, resumable=False) as load:
            await load.more(6)
            for worker_id in ("decode-0", "prefill-0"):
                worker = cluster.workers.pop(worker_id)
                if worker_id == "decode-0":
                    await until_it_generates(worker)
                assert await asyncio.to_thread(worker.host.drain, 30.0)
                assert worker.front.state is FrontState.DRAINING
                await asyncio.to_thread(worker.host.stop)
                pool = worker.host.engine.pool
                assert pool.num_free == pool.num_blocks
                await load.more(6)
        assert cluster.router.stats().moved > 0

    run(tiny_llama, tmp_path, scenario)
