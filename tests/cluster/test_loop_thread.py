"""A loop that other threads have work done on."""

from __future__ import annotations

import asyncio
import threading

import pytest

from cluster.loop_thread import LoopThread


@pytest.fixture
def thread():
    made = LoopThread("a-loop")
    yield made
    made.loop.call_soon_threadsafe(made.loop.stop)


def test_coroutines_run_on_its_thread_and_their_results_come_back(thread):
    async def name() -> str:
        await asyncio.sleep(0.001)
        return threading.current_thread().name

    assert thread.run(name(), 10.0) == "a-loop"


def test_what_they_raise_is_raised_where_they_were_asked_for(thread):
    async def fail() -> None:
        raise KeyError("lost")

    with pytest.raises(KeyError, match="lost"):
        thread.run(fail(), 10.0)


def test_one_that_is_late_is_cancelled(thread):
    cancelled = threading.Event()

    async def stay() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    with pytest.raises(TimeoutError):
        thread.run(stay(), 0.01)
    assert cancelled.wait(10.0)


def test_the_loop_is_the_fast_one(thread):
    assert type(thread.loop).__module__.partition(".")[0] == "uvloop"
