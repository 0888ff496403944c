"""Records of resumable requests, in memory and in a real Valkey server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

from router.request_store import RequestRecord
from router.store import FleetStore
from tests.router.harness import run
from tests.router.test_store import make_store, opened

__all__ = ["make_store"]

RECORD = RequestRecord(
    request_id="r 1", owner="somebody", body="digest", request=b"\x00\xff prompt", router_id="router-0"
)


def test_one_claims_and_the_next_finds(make_store: Callable[[], FleetStore]) -> None:
    async def scenario() -> None:
        async with opened(make_store) as store:
            requests = store.requests
            assert await requests.find("r 1") is None
            assert await requests.claim(RECORD, 30.0)
            assert not await requests.claim(replace(RECORD, body="another"), 30.0)
            found = await requests.find("r 1")
            assert found is not None
            assert found[0] == RECORD
            assert 25.0 < found[1] <= 30.0

    run(scenario())


def test_an_older_router_can_no_longer_write(make_store: Callable[[], FleetStore]) -> None:
    async def scenario() -> None:
        async with opened(make_store) as store:
            requests = store.requests
            await requests.claim(RECORD, 30.0)
            at_worker = replace(RECORD, worker_id="decode-0", epoch=4, attempt=2)
            assert await requests.runs_at(at_worker)
            taken = await requests.take_over("r 1", "router-1")
            assert taken == replace(at_worker, router_id="router-1", generation=1)
            assert not await requests.runs_at(replace(at_worker, worker_id="decode-9"))
            await requests.ended("r 1", 0, 0.001)
            await asyncio.sleep(0.01)
            found = await requests.find("r 1")
            assert found is not None
            assert found[0] == taken

    run(scenario())


def test_an_ended_request_is_kept_for_a_while(make_store: Callable[[], FleetStore]) -> None:
    async def scenario() -> None:
        async with opened(make_store) as store:
            requests = store.requests
            await requests.claim(RECORD, 30.0)
            await requests.ended("r 1", 0, 0.2)
            found = await requests.find("r 1")
            assert found is not None
            assert found[0].has_ended
            await asyncio.sleep(0.3)
            assert await requests.find("r 1") is None
            assert await requests.take_over("r 1", "router-1") is None
            assert await requests.runs_at(RECORD), "a record that is gone forbids nothing"

    run(scenario())
