"""Where the ranks of a worker find each other: torch's key-value store over the ranks' own sockets.

What one rank sets reaches every other one (through rank 0), so the rendezvous is open to nobody else and needs no port.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta

from torch._C._distributed_c10d import Store

from engine.errors import RankLostError


class RankStore(Store):
    """One rank's view; every wait is bounded."""

    def __init__(self, publish: Callable[[str, bytes], None], timeout_s: float) -> None:
        """`publish` carries a value to all other ranks."""
        super().__init__()
        self._publish = publish
        self._timeout_s = timeout_s
        self._changed = threading.Condition()
        self._values: dict[str, bytes] = {}
        self._closed: str | None = None

    def set(self, key: str, value: str | bytes) -> None:
        """Set a value at every rank."""
        data = value.encode() if isinstance(value, str) else bytes(value)
        self.put(key, data)
        self._publish(key, data)

    def put(self, key: str, value: bytes) -> None:
        """Keep a value that another rank set."""
        with self._changed:
            self._values[key] = value
            self._changed.notify_all()

    def close(self, reason: str) -> None:
        """Fail every wait, now and later."""
        with self._changed:
            self._closed = self._closed or reason
            self._changed.notify_all()

    def get(self, key: str) -> bytes:
        """The value of a key, as soon as any rank has set it."""
        self._await([key], self._timeout_s)
        return self._values[key]

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Return when all keys are set; RankLostError if they are not in time."""
        self._await(keys, self._timeout_s if timeout is None else timeout.total_seconds())

    def check(self, keys: list[str]) -> bool:
        """Whether all keys are set."""
        with self._changed:
            return all(key in self._values for key in keys)

    def _await(self, keys: list[str], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while missing := [key for key in keys if key not in self._values]:
                left = deadline - time.monotonic()
                if self._closed is not None:
                    raise RankLostError(f"the ranks' rendezvous ended: {self._closed}")
                if left <= 0:
                    raise RankLostError(f"no rank has set {', '.join(missing)} for {timeout_s:g} s")
                self._changed.wait(left)
