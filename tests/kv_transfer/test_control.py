from __future__ import annotations

import socket
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat

import pytest

from kv_transfer.control import MAX_STRANGER_BYTES, ControlConnection, dial
from kv_transfer.errors import PeerLostError, ProtocolError
from protos import framing
from protos.transfer_pb2 import ControlMessage, PairRefused, StoreSet

Ends = tuple[ControlConnection, ControlConnection]


def message(size: int = 3) -> ControlMessage:
    return ControlMessage(store_set=StoreSet(key="k", value=b"x" * size))


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        here = dial(f"127.0.0.1:{listener.getsockname()[1]}", timeout_s=5)
        there, _ = listener.accept()
    yield here, there
    here.close()
    there.close()


@pytest.fixture
def ends(sockets: tuple[socket.socket, socket.socket]) -> Ends:
    here, there = (
        ControlConnection(sock, peer=name, send_timeout_s=1.0) for sock, name in zip(sockets, "ab", strict=True)
    )
    return here, there


def test_messages_arrive_whole_in_order(ends: Ends) -> None:
    here, there = ends
    bodies = [here.send(message(size)) for size in (0, 60_000, 1)]
    assert [there.read(5) for _ in bodies] == bodies
    assert there.read(0.01) is None


def test_a_message_that_drips_in_is_put_together(sockets: tuple[socket.socket, socket.socket], ends: Ends) -> None:
    data = framing.pack(message(20))
    for byte in data[:-1]:
        sockets[0].send(bytes([byte]))
        assert ends[1].read(0.001) is None
    sockets[0].send(data[-1:])
    assert ends[1].parse(ends[1].read(5) or b"") == message(20)


def test_the_time_to_read_is_bounded_however_slow_the_peer_drips(
    sockets: tuple[socket.socket, socket.socket], ends: Ends
) -> None:
    data = framing.pack(message(200))
    stop = threading.Event()

    def drip() -> None:
        for byte in data:
            if stop.wait(0.05):
                return
            sockets[0].send(bytes([byte]))

    with ThreadPoolExecutor(1) as pool:
        dripping = pool.submit(drip)
        start = time.monotonic()
        assert ends[1].read(0.3) is None
        assert time.monotonic() - start < 1.5
        stop.set()
        dripping.result(5)


def test_a_stranger_cannot_announce_a_large_message(sockets: tuple[socket.socket, socket.socket], ends: Ends) -> None:
    sockets[0].sendall((MAX_STRANGER_BYTES + 1).to_bytes(4, "big"))
    with pytest.raises(ProtocolError, match="65537 bytes"):
        ends[1].read(5)


def test_bytes_that_are_no_message_are_an_error(ends: Ends) -> None:
    with pytest.raises(ProtocolError, match="not a ControlMessage"):
        ends[1].parse(b"\xff\xff\xff")


def test_the_end_of_the_stream_is_a_lost_peer(ends: Ends) -> None:
    ends[0].close()
    with pytest.raises(PeerLostError, match="closed the connection"):
        ends[1].read(5)


def test_a_peer_that_does_not_read_is_lost_within_the_send_timeout(ends: Ends) -> None:
    start = time.monotonic()
    with pytest.raises(PeerLostError, match="does not take messages"):
        deque(map(ends[0].send, repeat(message(60_000), 10_000)))
    assert time.monotonic() - start < 10


def test_silence_is_a_lost_peer(ends: Ends) -> None:
    start = time.monotonic()
    with pytest.raises(PeerLostError, match=r"silent for 0\.3 s"):
        ends[1].watch(lambda _: None, check=lambda: None, pings=False, heartbeat_s=0.1, timeout_s=0.3)
    assert 0.3 <= time.monotonic() - start < 3


def test_heartbeats_keep_a_quiet_pair_and_messages_pass_between_them(ends: Ends) -> None:
    here, there = ends
    heard: list[str] = []

    def watch(end: ControlConnection, pings: bool) -> None:
        with pytest.raises(PeerLostError, match="closed the connection"):
            end.watch(
                lambda m: heard.append(m.refused.reason),
                check=lambda: None,
                pings=pings,
                heartbeat_s=0.05,
                timeout_s=1.0,
            )

    with ThreadPoolExecutor(2) as pool:
        watching = [pool.submit(watch, here, True), pool.submit(watch, there, False)]
        threading.Event().wait(1.5)
        assert not any(end.done() for end in watching), "a quiet pair outlives the timeout"
        here.send(ControlMessage(refused=PairRefused(reason="news")))
        threading.Event().wait(0.1)
        here.shutdown()
        for end in watching:
            end.result(5)
    assert heard == ["news"]


def test_a_check_that_raises_ends_the_watch_of_a_peer_that_lives(ends: Ends) -> None:
    here, there = ends
    checks = 0

    def check() -> None:
        nonlocal checks
        checks += 1
        if checks > 3:
            raise PeerLostError("waited 2 s for a piece")

    with ThreadPoolExecutor(1) as pool:
        pinging = pool.submit(
            here.watch, lambda _: None, check=lambda: None, pings=True, heartbeat_s=0.05, timeout_s=1.0
        )
        with pytest.raises(PeerLostError, match="waited 2 s for a piece"):
            there.watch(lambda _: None, check=check, pings=False, heartbeat_s=0.05, timeout_s=1.0)
        there.shutdown()
        assert isinstance(pinging.exception(5), PeerLostError)


def test_dialling_nobody_is_a_lost_peer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(PeerLostError, match="nobody answers"):
        dial(f"127.0.0.1:{port}", timeout_s=1)
    with pytest.raises(PeerLostError, match="nobody answers at nonsense"):
        dial("nonsense", timeout_s=1)
