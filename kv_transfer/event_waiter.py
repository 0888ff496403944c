"""Waits for the engine to write KV, so that a pair's data thread need not: that one sends meanwhile what is there.

One thread a pair, begun with the first event that has not come (never on a CPU). It waits for one event at a time; the
engine works in order, so the event pushed first comes first.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from kv_transfer.watch import Watch

COMPUTE_BOUND_S = 60.0
"""Most time from a push to the moment when the engine has written its KV: two steps, however long."""


class EventWaiter:
    """Calls `on_come` when the event that is waited for has come."""

    def __init__(self, name: str, on_come: Callable[[], None]) -> None:
        self.watch = Watch()
        self._name = name
        self._on_come = on_come
        self._changed = threading.Condition()
        self._event: Any = None
        self._closed = False
        self._thread: threading.Thread | None = None

    def wait_for(self, event: Any) -> None:
        """Begin to wait for an event, if none is waited for; returns at once."""
        with self._changed:
            if self._event is not None or self._closed:
                return
            self._event = event
            self._changed.notify()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()

    def close(self, timeout_s: float) -> bool:
        """End the thread; whether it has ended in time. An engine that works ends it within a step."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(timeout_s)
        return self._thread is None or not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._changed:
                while self._event is None and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                event = self._event
            with self.watch.waiting("the engine to write KV that is to be sent", COMPUTE_BOUND_S):
                event.synchronize()
            with self._changed:
                self._event = None
            self._on_come()
