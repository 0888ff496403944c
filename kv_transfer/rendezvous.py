"""The key-value store through which the two ends of a data channel find each other.

It rides on the pair's control connection: `set` keeps the value and sends it to the other end, and
what the other end set arrives through `put`. So the rendezvous is as authenticated as the pair.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta

from torch._C._distributed_c10d import Store

from kv_transfer.errors import TransportError

MAX_KEYS = 256


class PairStore(Store):
    """A torch.distributed store shared by exactly two ends; every wait is bounded by timeout_s."""

    def __init__(self, publish: Callable[[str, bytes], None], timeout_s: float) -> None:
        super().__init__()
        self._publish = publish
        self._timeout_s = timeout_s
        self._changed = threading.Condition()
        self._values: dict[str, bytes] = {}
        self._closed: str | None = None
        self._on_close: Callable[[], None] = lambda: None

    def set(self, key: str, value: str | bytes) -> None:
        """Keep a value here and at the other end."""
        data = value.encode() if isinstance(value, str) else bytes(value)
        self.put(key, data)
        self._publish(key, data)

    def put(self, key: str, value: bytes) -> None:
        """Keep a value that the other end set."""
        with self._changed:
            if len(self._values) >= MAX_KEYS and key not in self._values:
                raise TransportError(f"the rendezvous holds {MAX_KEYS} keys already: the other end misbehaves")
            self._values[key] = value
            self._changed.notify_all()

    def close(self, reason: str) -> None:
        """Fail every wait, now and later."""
        with self._changed:
            self._closed = reason
            self._changed.notify_all()
            on_close = self._on_close
        on_close()

    def when_closed(self, call: Callable[[], None]) -> None:
        """Have a wait that is not the store's own woken when the store is closed; at once if it is."""
        with self._changed:
            self._on_close = call
            is_closed = self._closed is not None
        if is_closed:
            call()

    def get(self, key: str) -> bytes:
        """The value of a key, as soon as either end has set it."""
        self._await([key], self._timeout_s)
        return self._values[key]

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Return when all keys are set."""
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
                    raise TransportError(f"the rendezvous ended: {self._closed}")
                if left <= 0:
                    raise TransportError(f"waited {timeout_s:g} s for the other end to set {', '.join(missing)}")
                self._changed.wait(left)
