"""The embedded Valkey, for real: starts, keeps data through kill -9, says why it cannot start."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import pytest
import redis

from cluster.children import Children
from cluster.run_dir import RunDir
from cluster.valkey import Valkey, ValkeyError
from tests.cluster.reaping import with_children


def client(url: str) -> redis.Redis:
    return redis.Redis.from_url(url, socket_timeout=5.0, decode_responses=True)


def test_data_outlives_kill_9_on_the_same_port(run_dir: RunDir) -> None:
    async def body(children: Children) -> None:
        valkey = Valkey(run_dir, children)
        first = await valkey.start()
        with client(valkey.url) as redis_client:
            redis_client.set("epoch", 41)
            redis_client.config_get("appendonly")
            redis_client.execute_command("WAITAOF", 1, 0, 2000)
        first.kill(signal.SIGKILL)
        await first.exited
        second = await valkey.start()
        assert second.ref.pid != first.ref.pid
        with client(valkey.url) as redis_client:
            assert redis_client.incr("epoch") == 42
        await valkey.stop()
        assert second.exited.done()

    with_children(body)


def test_password_is_asked_and_shown_nowhere(run_dir: RunDir) -> None:
    async def body(children: Children) -> None:
        valkey = Valkey(run_dir, children)
        child = await valkey.start()
        with client(valkey.public_url) as redis_client, pytest.raises(redis.AuthenticationError):
            redis_client.ping()
        secret = run_dir.secret("valkey")
        assert secret not in valkey.public_url
        assert secret not in visible(child.ref.pid)
        assert (run_dir.path / "valkey" / "valkey.conf").stat().st_mode & 0o077 == 0
        await valkey.stop()
        assert secret not in (run_dir.logs / "valkey.log").read_text()

    with_children(body)


def test_a_port_in_use_is_told_with_the_servers_own_words(run_dir: RunDir) -> None:
    async def body(children: Children) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            valkey = Valkey(run_dir, children, port=taken.getsockname()[1])
            with pytest.raises(ValkeyError, match=r"(?s)did not start \(exit code 1\).*Address already in use"):
                await valkey.start()
            await valkey.stop()

    with_children(body)


def test_listens_on_loopback_alone(run_dir: RunDir) -> None:
    async def body(children: Children) -> None:
        valkey = Valkey(run_dir, children)
        await valkey.start()
        assert listening(valkey.port) == {f"0100007F:{valkey.port:04X}"}
        await valkey.stop()

    with_children(body)


def listening(port: int) -> set[str]:
    """Local addresses that listen on a port, as /proc writes them."""
    lines = (Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()).splitlines()
    sockets = [line.split() for line in lines]
    return {fields[1] for fields in sockets if fields[3] == "0A" and fields[1].endswith(f":{port:04X}")}


def visible(pid: int) -> str:
    """A process's arguments and environment."""
    return "".join(Path(f"/proc/{pid}/{source}").read_bytes().decode() for source in ("cmdline", "environ"))


def test_a_child_that_was_adopted_is_seen_to_end() -> None:
    async def body(children: Children) -> None:
        read_end, write_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(write_end)
            os.read(read_end, 1)
            os._exit(3)
        os.close(read_end)
        child = children.adopt("adopted", pid)
        assert not child.exited.done()
        os.close(write_end)
        await child.exited
        assert children.try_adopt(child.ref) is None

    with_children(body)
