from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from queue import SimpleQueue

import pytest

from kv_transfer.timers import Janitor

BOUND_S = 5.0


@pytest.fixture
def janitor() -> Iterator[Janitor]:
    janitor = Janitor("test-janitor")
    janitor.start()
    yield janitor
    assert janitor.stop(BOUND_S)


def test_calls_run_in_order_on_its_thread(janitor: Janitor) -> None:
    ran: SimpleQueue[tuple[int, str]] = SimpleQueue()
    for number in range(50):
        janitor.call_soon(lambda number=number: ran.put((number, threading.current_thread().name)))
    assert [ran.get(timeout=BOUND_S) for _ in range(50)] == [(number, "test-janitor") for number in range(50)]


def test_deadlines_run_in_order_of_time_and_not_early(janitor: Janitor) -> None:
    ran: SimpleQueue[tuple[str, float]] = SimpleQueue()
    start = time.monotonic()
    janitor.call_at(start + 0.2, lambda: ran.put(("late", time.monotonic())))
    janitor.call_at(start + 0.05, lambda: ran.put(("early", time.monotonic())))
    first, second = ran.get(timeout=BOUND_S), ran.get(timeout=BOUND_S)
    assert [first[0], second[0]] == ["early", "late"]
    assert first[1] >= start + 0.05
    assert second[1] >= start + 0.2


def test_a_callback_that_raises_ends_nothing(janitor: Janitor, caplog: pytest.LogCaptureFixture) -> None:
    done = threading.Event()
    with caplog.at_level(logging.ERROR):
        janitor.call_soon(lambda: 1 // 0)
        janitor.call_soon(done.set)
        assert done.wait(BOUND_S)
    assert "ZeroDivisionError" in caplog.text


def test_stop_runs_what_is_due_and_forgets_the_rest() -> None:
    janitor = Janitor("test-janitor")
    ran: list[str] = []
    janitor.call_at(time.monotonic() + 60, lambda: ran.append("later"))
    janitor.call_soon(lambda: ran.append("soon"))
    janitor.start()
    assert janitor.stop(BOUND_S)
    assert ran == ["soon"]


def test_an_idle_janitor_sleeps(janitor: Janitor) -> None:
    started = threading.Event()
    janitor.call_soon(started.set)
    assert started.wait(BOUND_S)
    before = time.process_time()
    threading.Event().wait(0.3)
    assert time.process_time() - before < 0.05
