"""An asyncio loop on a thread of its own, for actors whose methods are called from other threads.

The loop is uvloop's where that is installed: what a router and a front do is mostly turns of the loop, one or two for
each message that gRPC has written (benchmarks/RESULTS.md has both loops' figures). Its clock, `loop.time()`, counts
whole milliseconds: what is shown or added up is timed by `time.monotonic()`.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

try:
    import uvloop
except ImportError:
    uvloop = None  # type: ignore[assignment]

T = TypeVar("T")


def new_event_loop() -> asyncio.AbstractEventLoop:
    """A loop for a process whose work is gRPC's messages."""
    return uvloop.new_event_loop() if uvloop is not None else asyncio.new_event_loop()


class LoopThread:
    """Runs coroutines for whoever calls `run`."""

    def __init__(self, name: str) -> None:
        self.loop = new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T], timeout_s: float) -> T:
        """Run a coroutine to its end and return what it returns; TimeoutError (and it is cancelled) after timeout_s."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        try:
            return future.result(timeout_s)
        except TimeoutError:
            future.cancel()
            raise
