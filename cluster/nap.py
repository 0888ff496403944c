"""Keeps the main thread of a Ray worker from waking a hundred times a second.

An idle actor's main thread wakes every 10 ms to let Python see signals (fixed in Ray's core worker), which
burns about 1 % of a core in each process. Here a timer's signal handler naps on that thread instead. The
price is that a Ray call to the actor may start `NAP_S` later; no token depends on one. Signals are noted
at once all the same (`cluster.sigterm` reads them from a descriptor), and other threads do not notice.
"""

from __future__ import annotations

import functools
import signal
import threading
from typing import Any

NAP_S = 0.5
AWAKE_S = 0.01
"""Long enough for the main thread to return to Ray's loop and start what waits there."""


def napping(kind: Any) -> Any:
    """The actor class, whose main thread naps from the end of its `__init__` on."""

    class Napping(kind):  # type: ignore[misc]
        @functools.wraps(kind.__init__)  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            start_napping()

    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        setattr(Napping, name, getattr(kind, name))
    return Napping


def start_napping() -> None:
    """Nap and wake in turns from now on; main thread only (ValueError elsewhere)."""
    never = threading.Event()

    def nap(_number: int, _frame: object) -> None:
        never.wait(NAP_S)
        signal.setitimer(signal.ITIMER_REAL, AWAKE_S)

    signal.signal(signal.SIGALRM, nap)
    signal.setitimer(signal.ITIMER_REAL, AWAKE_S)
