from __future__ import annotations

import threading
import time

import pytest

from kv_transfer import event_waiter
from kv_transfer.errors import PeerLostError
from kv_transfer.event_waiter import EventWaiter
from tests.kv_transfer.conftest import BOUND_S


class Event:
    """An event of a GPU that a test lets come."""

    def __init__(self) -> None:
        self.come = threading.Event()

    def query(self) -> bool:
        return self.come.is_set()

    def synchronize(self) -> None:
        assert self.come.wait(BOUND_S)


def test_it_tells_of_one_event_after_another() -> None:
    told = threading.Semaphore(0)
    waiter = EventWaiter("test", told.release)
    for _ in range(3):
        event = Event()
        waiter.wait_for(event)
        waiter.wait_for(Event())  # ignored: one is waited for
        assert not told.acquire(timeout=0.02)
        event.come.set()
        assert told.acquire(timeout=BOUND_S)
    assert waiter.close(BOUND_S)


def test_without_an_event_there_is_no_thread() -> None:
    before = threading.active_count()
    waiter = EventWaiter("test", lambda: None)
    assert threading.active_count() == before
    assert waiter.close(0.0)


def test_an_engine_that_never_comes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_waiter, "COMPUTE_BOUND_S", 0.01)
    event, waiter = Event(), EventWaiter("test", lambda: None)
    waiter.wait_for(event)
    time.sleep(0.05)
    with pytest.raises(PeerLostError, match=r"waited 0\.01 s for the engine to write KV"):
        waiter.watch.check()
    assert not waiter.close(0.01)
    event.come.set()
    assert waiter.close(BOUND_S)
