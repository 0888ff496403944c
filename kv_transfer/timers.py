"""The node's janitor: one thread that runs deadlines and callbacks that must not run under a caller's locks.

It sleeps until the next deadline, however far that is; without work it never wakes.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable

_log = logging.getLogger(__name__)
Call = Callable[[], None]


def run_safely(call: Call, what: str) -> None:
    """Run a callback of somebody else; an error in it is logged and ends nothing of ours."""
    try:
        call()
    except Exception:
        _log.exception("%s raised", what)


class Janitor:
    """Runs calls soon or at a time, in order, on one thread."""

    def __init__(self, name: str) -> None:
        self._wake = threading.Condition()
        self._soon: deque[Call] = deque()
        self._later: list[tuple[float, int, Call]] = []
        self._order = itertools.count()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def call_soon(self, call: Call) -> None:
        """Run `call` as soon as the thread gets to it; never blocks."""
        with self._wake:
            self._soon.append(call)
            self._wake.notify()

    def call_at(self, when: float, call: Call) -> None:
        """Run `call` at a time of time.monotonic(); never blocks."""
        with self._wake:
            heapq.heappush(self._later, (when, next(self._order), call))
            self._wake.notify()

    def stop(self, timeout_s: float) -> bool:
        """Run what is due, forget later deadlines, end the thread; whether it ended in time."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (call := self._next()) is not None:
            run_safely(call, "a transfer callback")
            del call

    def _next(self) -> Call | None:
        """The next call that is due; None once stopped and nothing is left to run soon."""
        with self._wake:
            while True:
                if self._soon:
                    return self._soon.popleft()
                if self._stopping:
                    return None
                now = time.monotonic()
                if self._later and self._later[0][0] <= now:
                    return heapq.heappop(self._later)[2]
                self._wake.wait(self._later[0][0] - now if self._later else None)
