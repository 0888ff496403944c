"""The process of a rank other than 0: how it ends, and what it says of that."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from cluster.rank_host import FollowerHost
from engine.errors import RankLostError

BOUND_S = 10.0


class FakeFollower:
    """Serves until it is told how to end."""

    num_steps = 7

    def __init__(self) -> None:
        self.endings: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        self.reachable = True
        self.left = False

    def serve(self, runner: object) -> None:
        ending = self.endings.get(timeout=BOUND_S)
        if ending is not None:
            raise ending

    def leave(self) -> None:
        if not self.reachable:
            raise RankLostError("gone")
        self.left = True
        self.endings.put(None)

    def close(self) -> None:
        self.endings.put(None)


class FakeRunner:
    kv_cache = SimpleNamespace(num_blocks=9)
    warm = False

    def warm_up(self) -> None:
        self.warm = True


class FakeTransfers:
    stopped = False

    def obey(self, payload: bytes) -> None:
        """Nothing is ordered here."""

    def hook(self, payload: bytes) -> None:
        """Nothing is pushed here."""

    def stop(self) -> None:
        self.stopped = True


Started = tuple[FollowerHost, FakeFollower, "queue.SimpleQueue[bool]"]


@pytest.fixture
def started() -> Iterator[Started]:
    follower, ends = FakeFollower(), queue.SimpleQueue()
    host = FollowerHost(follower, FakeRunner(), FakeTransfers(), on_end=ends.put)  # type: ignore[arg-type]
    host.start()
    yield host, follower, ends
    host.stop()


def test_it_is_warm_before_it_serves_and_counts_its_steps(started: Started) -> None:
    host, _, _ = started
    assert host.runner.warm
    assert host.numbers() == {"steps": 7, "num_blocks": 9}


@pytest.mark.parametrize(("ending", "well"), [(None, True), (RankLostError("gone"), False), (MemoryError(), False)])
def test_it_tells_how_it_ended(started: Started, ending: Exception | None, well: bool) -> None:
    host, follower, ends = started
    follower.endings.put(ending)
    assert ends.get(timeout=BOUND_S) is well
    assert host._transfers.stopped, "its transfers end with it"  # type: ignore[attr-defined]


def test_a_drain_asks_rank_0_and_waits_for_the_end(started: Started) -> None:
    host, follower, ends = started
    assert host.drain(BOUND_S)
    assert follower.left
    assert ends.get(timeout=BOUND_S)


def test_a_drain_without_rank_0_fails_at_once(started: Started) -> None:
    host, follower, _ = started
    follower.reachable = False
    assert not host.drain(BOUND_S)
