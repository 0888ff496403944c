"""Bounds the waits of a pair's data thread: the control thread, which never waits for data, ends what takes too long.

A thread that waits for a GPU or for a transport cannot look at the clock; the pair's control thread comes
by at least once a heartbeat and asks `check`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from kv_transfer.errors import PeerLostError


class Watch:
    """What one thread waits for, and until when."""

    def __init__(self) -> None:
        self._wait: tuple[float, float, str] | None = None

    @contextlib.contextmanager
    def waiting(self, what: str, bound_s: float) -> Iterator[None]:
        """The calling thread waits within; only one wait at a time."""
        self._wait = (time.monotonic(), bound_s, what)
        try:
            yield
        finally:
            self._wait = None

    def check(self) -> None:
        """Raise PeerLostError if the wait has lasted too long."""
        wait = self._wait
        if wait is not None and time.monotonic() - wait[0] > wait[1]:
            raise PeerLostError(f"waited {wait[1]:g} s for {wait[2]}")
