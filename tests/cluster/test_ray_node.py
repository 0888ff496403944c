"""Joining a Ray that another started: waited for within a bound, and this machine's address on the way to it."""

from __future__ import annotations

import asyncio
import socket

import pytest

from cluster.ray_node import RayError, address_towards, wait_for_ray
from tests.real_valkey import free_port


def test_a_ray_head_that_comes_late_is_waited_for() -> None:
    async def main() -> None:
        port = free_port()
        waiting = asyncio.create_task(wait_for_ray(f"127.0.0.1:{port}", 30.0))
        await asyncio.sleep(0.2)
        assert not waiting.done()
        with socket.create_server(("127.0.0.1", port)):
            await waiting

    asyncio.run(main())


def test_one_that_never_comes_is_named() -> None:
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(RayError, match=f"no Ray head answers at {address} after 0.1 s .*mend ray.address"):
        asyncio.run(wait_for_ray(address, 0.1))


def test_this_machines_address_towards_a_head() -> None:
    assert address_towards(None) == "127.0.0.1"
    assert address_towards("127.0.0.1:6379") == "127.0.0.1"
