"""One connection between ranks, and the rendezvous that travels on it."""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import pytest

from engine import rank_link
from engine.errors import RankLostError
from engine.rank_link import RankLink
from engine.rank_store import rank_store
from protos import framing
from protos import ranks_pb2 as pb
from protos.rendezvous import Rendezvous

BOUND_S = 10.0
ORDER = pb.RankMessage(order=b"x")


class End:
    """A link, what it heard, and how it ended."""

    def __init__(self, connection: socket.socket, timeout_s: float) -> None:
        self.heard: queue.SimpleQueue[pb.RankMessage] = queue.SimpleQueue()
        self.ends: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.link = RankLink(connection, "rank 5", timeout_s=timeout_s, handle=self.heard.put, on_end=self.ends.put)
        self.link.start()


@pytest.fixture
def pair() -> Iterator[tuple[End, socket.socket]]:
    """A link of half a second's patience, and a bare socket at its other end."""
    ours, theirs = socket.socketpair()
    end = End(ours, 0.5)
    yield end, theirs
    end.link.close()
    theirs.close()
    assert end.ends.empty(), "an end was told twice, or after it was closed here"


def test_messages_arrive_without_the_heartbeats_between_them(pair: tuple[End, socket.socket]) -> None:
    end, theirs = pair
    beat = framing.pack(pb.RankMessage(heartbeat=pb.RankHeartbeat()))
    theirs.sendall(beat + framing.pack(ORDER) + beat)
    assert end.heard.get(timeout=BOUND_S) == ORDER
    end.link.send(ORDER)
    kinds = set()
    while kinds != {"order", "heartbeat"}:
        message = framing.read_message(theirs, pb.RankMessage)
        assert message is not None
        kinds.add(message.WhichOneof("message"))
    assert end.heard.empty()


def test_silence_ends_it_only_once_it_has_settled(
    pair: tuple[End, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[int] = []
    monkeypatch.setattr(rank_link.os, "kill", lambda pid, _signal: killed.append(pid))
    end, _theirs = pair
    with pytest.raises(queue.Empty):
        end.ends.get(timeout=1.0)
    end.link.settle()
    assert end.ends.get(timeout=BOUND_S) == "rank 5 has said nothing for 0.5 s"
    with pytest.raises(RankLostError, match="the connection to rank 5 has ended"):
        end.link.send(ORDER)
    assert killed == [], "the other end is this very process"


def test_one_that_is_held_up_itself_finds_nobody_silent(pair: tuple[End, socket.socket]) -> None:
    """Its reader is busy while the other end speaks."""
    end, theirs = pair
    release = threading.Event()
    end.link._handle = lambda _message: release.wait(BOUND_S)
    end.link.settle()
    theirs.sendall(framing.pack(ORDER))
    with pytest.raises(queue.Empty):
        end.ends.get(timeout=1.2)
    release.set()
    assert end.ends.get(timeout=BOUND_S) == "rank 5 has said nothing for 0.5 s"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "rank 5 has hung up"),
        (b"\xff\xff\xff\xff", "was announced, the limit is"),
        (b"\x00\x00\x00\x02\xff\xff", "are not a RankMessage"),
        (b"\x00\x00\x00\x09abc", "the stream ended after 3 of 9 bytes"),
    ],
)
def test_the_end_is_told_with_its_reason(pair: tuple[End, socket.socket], data: bytes, reason: str) -> None:
    end, theirs = pair
    theirs.sendall(data)
    theirs.shutdown(socket.SHUT_RDWR)
    assert reason in end.ends.get(timeout=BOUND_S)


def test_what_was_sent_before_a_close_arrives() -> None:
    first, second = socket.socketpair()
    ours, theirs = End(first, 5.0), End(second, 5.0)
    for _ in range(100):
        ours.link.send(ORDER)
    ours.link.close()
    assert "rank 5" in theirs.ends.get(timeout=BOUND_S)
    assert theirs.heard.qsize() == 100
    theirs.link.close()
    assert ours.ends.empty()


# ---- the rendezvous ----


def test_what_one_rank_sets_all_find() -> None:
    stores: list[Rendezvous] = []
    first = rank_store(lambda key, value: stores[1].put(key, value), 5.0)
    stores += [first, rank_store(lambda key, value: first.put(key, value), 5.0)]
    first.set("a", "1")
    stores[1].set("b", b"2")
    assert (stores[1].get("a"), first.get("b"), first.get("a")) == (b"1", b"2", b"1")
    assert first.check(["a", "b"])
    assert not first.check(["a", "c"])


def test_a_wait_for_a_value_has_a_bound_and_a_name() -> None:
    store = rank_store(lambda _key, _value: None, 0.05)
    with pytest.raises(RankLostError, match=r"waited 0\.05 s for the other ranks to set x"):
        store.get("x")
    with pytest.raises(RankLostError, match=r"waited 0\.02 s for the other ranks to set x, y"):
        store.wait(["x", "y"], timedelta(seconds=0.02))


def test_a_wait_ends_with_the_ranks() -> None:
    store = rank_store(lambda _key, _value: None, 60.0)
    began = time.monotonic()
    threading.Timer(0.1, lambda: store.close("rank 1 is lost")).start()
    with pytest.raises(RankLostError, match="the rendezvous with the other ranks ended: rank 1 is lost"):
        store.get("x")
    assert time.monotonic() - began < BOUND_S
