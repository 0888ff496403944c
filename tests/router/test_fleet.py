"""The fleet follows the store, and keeps what it knows when the store is gone."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from protos.auth import worker_key
from router.config import RouterConfig
from router.errors import StoreUnavailableError
from router.fleet import Fleet
from router.info import WorkerState
from router.store import MemoryStore, WorkerRecord
from tests.router.fake_worker import SECRET, Behaviour, FakeWorker
from tests.router.harness import eventually, run


class FailingStore(MemoryStore):
    """A store that can be cut off."""

    cut_off = False

    async def workers(self) -> list[WorkerRecord]:
        if self.cut_off:
            raise StoreUnavailableError("cut off by the test")
        return await super().workers()


@contextlib.asynccontextmanager
async def fleet_with(*roles: str) -> AsyncIterator[tuple[Fleet, FailingStore, list[FakeWorker]]]:
    store = FailingStore(refresh_s=0.05)
    config = RouterConfig(reconnect_max_s=0.2, heartbeat_s=0.1, worker_silence_s=0.5)
    fleet = Fleet(store, config, router_id="r", worker_key=worker_key(SECRET), on_room=lambda: None)
    workers = [FakeWorker(f"w{index}", role, store, {}, Behaviour()) for index, role in enumerate(roles)]  # type: ignore[arg-type]
    for worker in workers:
        await worker.start()
    await fleet.start()
    try:
        yield fleet, store, workers
    finally:
        await fleet.stop()
        for worker in workers:
            await worker.stop()


def states(fleet: Fleet) -> dict[str, WorkerState]:
    return {info.label: info.state for info in fleet.workers()}


def test_workers_come_and_go() -> None:
    async def scenario() -> None:
        async with fleet_with("prefill", "decode") as (fleet, _, workers):
            await eventually(lambda: states(fleet) == {"w0/1": WorkerState.READY, "w1/1": WorkerState.READY})
            assert fleet.serves(split=True)
            assert fleet.pool_tokens(split=True) == 4096
            await workers[0].stop()
            await eventually(lambda: states(fleet) == {"w1/1": WorkerState.READY})
            assert not fleet.serves(split=True)
            assert fleet.serves(split=False)
            assert fleet.pool_tokens(split=True) is None

    run(scenario())


def test_a_worker_may_change_its_role_while_it_is_ready() -> None:
    async def scenario() -> None:
        async with fleet_with("prefill", "decode") as (fleet, _, workers):
            await eventually(lambda: fleet.serves(split=True))
            assert not fleet.roster.lacks_a_role
            workers[0].set_role("decode")
            await eventually(lambda: fleet.roster.lacks_a_role)
            assert [info.role for info in fleet.workers()] == ["decode", "decode"]
            assert set(states(fleet).values()) == {WorkerState.READY}
            workers[1].set_role("prefill")
            await eventually(lambda: not fleet.roster.lacks_a_role)
            assert [info.role for info in fleet.workers()] == ["decode", "prefill"]

    run(scenario())


def test_new_epoch_replaces_the_old_life_even_if_that_still_speaks() -> None:
    async def scenario() -> None:
        async with fleet_with("both") as (fleet, store, workers):
            await eventually(lambda: states(fleet) == {"w0/1": WorkerState.READY})
            second = FakeWorker("w0", "both", store, {}, Behaviour())
            await second.start()
            await eventually(lambda: states(fleet) == {"w0/2": WorkerState.READY})
            await eventually(lambda: not workers[0].routers)
            await second.stop()

    run(scenario())


def test_store_that_is_cut_off_or_empty_costs_no_connected_worker() -> None:
    async def scenario() -> None:
        async with fleet_with("both") as (fleet, store, workers):
            await eventually(lambda: states(fleet) == {"w0/1": WorkerState.READY})
            store.cut_off = True
            await asyncio.sleep(0.2)
            assert states(fleet) == {"w0/1": WorkerState.READY}
            await store.deregister("w0", 1)
            store.cut_off = False
            await asyncio.sleep(0.2)
            assert states(fleet) == {"w0/1": WorkerState.READY}
            await workers[0].kill()
            await eventually(lambda: states(fleet) == {})

    run(scenario())


def test_silent_worker_is_lost_and_found_again() -> None:
    async def scenario() -> None:
        async with fleet_with("both") as (fleet, _, workers):
            await eventually(lambda: states(fleet) == {"w0/1": WorkerState.READY})
            workers[0].behaviour.silent = True
            await eventually(lambda: states(fleet) == {"w0/1": WorkerState.LOST}, timeout_s=2.0)
            workers[0].behaviour.silent = False
            await eventually(lambda: states(fleet) == {"w0/1": WorkerState.READY})
            assert fleet.workers()[0].connection == 2

    run(scenario())
