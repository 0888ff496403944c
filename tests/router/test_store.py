"""The registry in memory and in a real Valkey server."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from router.errors import StaleEpochError, StoreUnavailableError
from router.store import FleetStore, MemoryStore, RedisStore, RouterRecord, WorkerRecord
from tests.real_valkey import RealValkey
from tests.router.harness import ask, cluster, eventually, run


@pytest.fixture(params=["memory", "redis"])
def make_store(request: pytest.FixtureRequest) -> Callable[[], FleetStore]:
    if request.param == "memory":
        return lambda: MemoryStore(refresh_s=0.2)
    url = request.getfixturevalue("valkey").url
    return lambda: RedisStore(url, refresh_s=0.2)


def record(worker_id: str, epoch: int) -> WorkerRecord:
    return WorkerRecord(
        worker_id=worker_id, epoch=epoch, role="both", address="127.0.0.1:1", pool="gpu", started_at=2.5
    )


@contextlib.asynccontextmanager
async def opened(make: Callable[[], FleetStore]) -> AsyncIterator[FleetStore]:
    store = make()
    try:
        yield store
    finally:
        await store.close()


def test_a_role_that_was_given_stays(make_store: Callable[[], FleetStore]) -> None:
    async def scenario() -> None:
        async with opened(make_store) as store:
            assert await store.role_of("a-role") is None
            await store.set_role("a-role", "prefill")
            await store.set_role("a-role", "decode")
            assert await store.role_of("a-role") == "decode"
            assert await store.role_of("another-role") is None

    run(scenario())


def test_records_come_back_until_their_lease_ends(make_store: Callable[[], FleetStore]) -> None:
    async def scenario() -> None:
        async with opened(make_store) as store:
            assert await store.workers() == []
            for name in ("b", "a"):
                assert await store.next_epoch(name) == 1
                await store.register(record(name, 1), 30.0)
            assert await store.workers() == [record("a", 1), record("b", 1)]
            await store.register(record("b", 1), 0.05)
            await store.register_router(RouterRecord(router_id="r", address="x:1"), 30.0)
            await asyncio.sleep(0.1)
            assert await store.workers() == [record("a", 1)]
            assert await store.workers() == [record("a", 1)]
            await store.register(record("b", 1), 30.0)
            assert len(await store.workers()) == 2
            assert await store.routers() == [RouterRecord(router_id="r", address="x:1")]
            await store.deregister_router("r")
            assert await store.routers() == []

    run(scenario())


def test_older_life_can_neither_renew_nor_remove(make_store: Callable[[], FleetStore]) -> None:
    async def scenario() -> None:
        async with opened(make_store) as store:
            first = await store.next_epoch("w")
            await store.register(record("w", first), 30.0)
            second = await store.next_epoch("w")
            assert second > first
            with pytest.raises(StaleEpochError):
                await store.register(record("w", first), 30.0)
            await store.register(record("w", second), 30.0)
            await store.deregister("w", first)
            assert await store.workers() == [record("w", second)]
            await store.deregister("w", second)
            await store.deregister("w", second)
            assert await store.workers() == []

    run(scenario())


def test_watch_tells_of_changes_soon(make_store: Callable[[], FleetStore]) -> None:
    async def scenario() -> None:
        async with opened(make_store) as store:
            seen: list[int] = []

            async def follow() -> None:
                async for _ in store.watch():
                    seen.append(len(await store.workers()))

            task = asyncio.create_task(follow())
            await eventually(lambda: len(seen) >= 2)
            await store.register(record("w", 1), 30.0)
            await eventually(lambda: seen[-1] == 1, timeout_s=1.0)
            await store.deregister("w", 1)
            await eventually(lambda: seen[-1] == 0, timeout_s=1.0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    run(scenario())


def test_dead_server_is_unavailable_within_the_bound_and_comes_back(valkey: RealValkey) -> None:
    async def scenario() -> None:
        store = RedisStore(valkey.url, timeout_s=0.5, refresh_s=0.2)
        await store.register(record("w", await store.next_epoch("w")), 3600.0)
        yields: list[float] = []

        async def follow() -> None:
            async for _ in store.watch():
                yields.append(time.monotonic())

        task = asyncio.create_task(follow())
        valkey.kill()
        started = time.monotonic()
        with pytest.raises(StoreUnavailableError):
            await store.workers()
        assert time.monotonic() - started < 1.0
        before = len(yields)
        await eventually(lambda: len(yields) > before + 1)
        valkey.start()
        await asyncio.sleep(0.3)
        assert await store.workers() == [record("w", 1)]
        assert await store.next_epoch("w") == 2
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await store.close()

    run(scenario())


def test_silent_server_is_unavailable_within_the_bound() -> None:
    async def scenario() -> None:
        async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()
            writer.close()

        server = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        store = RedisStore(f"redis://127.0.0.1:{port}/0", timeout_s=0.3)
        started = time.monotonic()
        with pytest.raises(StoreUnavailableError, match="workers"):
            await store.workers()
        assert time.monotonic() - started < 1.0
        await store.close()
        server.close()
        await server.wait_closed()

    run(scenario())


def test_wrong_password_is_said(valkey: RealValkey) -> None:
    async def scenario() -> None:
        store = RedisStore(valkey.url.replace("sesame", "wrong"), timeout_s=1.0)
        with pytest.raises(StoreUnavailableError, match=r"(?i)password|auth"):
            await store.workers()
        await store.close()

    run(scenario())


def test_streams_and_new_requests_survive_the_store(model: Path, valkey: RealValkey) -> None:
    async def scenario() -> None:
        store = RedisStore(valkey.url, timeout_s=0.5, refresh_s=0.2)
        async with cluster(model, store=store) as made:
            made.workers["d0"].behaviour.step_s = 0.01
            streaming = asyncio.create_task(made.ask(ask("r1", num=60)))
            await eventually(lambda: made.workers["d0"].running)
            valkey.kill()
            assert (await made.ask(ask("r2", num=5))).reason == "LENGTH"
            assert (await streaming).reason == "LENGTH"
            valkey.start()
            await eventually(lambda: made.app.stats().workers == {"ready": 2})
            await made.add_worker("d1", "decode")
            await made.ready(3)
        await store.close()

    run(scenario())
