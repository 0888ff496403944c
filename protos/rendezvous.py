"""Where processes that join a process group find each other: torch's key-value store over sockets they have already.

What one of them sets reaches the others through these sockets, so a rendezvous is open to nobody else and needs no
port. The only module here that needs torch: `engine` and `kv_transfer` make theirs from it, with errors of their own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta

from torch._C._distributed_c10d import Store


def first_line(error: Exception) -> str:
    """What torch says in the first line of an error; stack traces follow it."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


class Rendezvous(Store):
    """One process's view of the store; every wait is bounded."""

    def __init__(
        self,
        publish: Callable[[str, bytes], None],
        timeout_s: float,
        *,
        error: Callable[[str], Exception],
        others: str,
        max_keys: int | None = None,
    ) -> None:
        """`publish` carries a value to all others, where `put` takes it in; `error` makes what is raised.

        `others` are called so in errors; with `max_keys` they may set no more than that.
        """
        super().__init__()
        self._publish = publish
        self._timeout_s = timeout_s
        self._error = error
        self._others = others
        self._max_keys = max_keys
        self._changed = threading.Condition()
        self._values: dict[str, bytes] = {}
        self._closed: str | None = None
        self._on_close: Callable[[], None] = lambda: None

    def set(self, key: str, value: str | bytes) -> None:
        """Set a value here and at all others."""
        data = value.encode() if isinstance(value, str) else bytes(value)
        self.put(key, data)
        self._publish(key, data)

    def put(self, key: str, value: bytes) -> None:
        """Keep a value that another one set."""
        with self._changed:
            if self._max_keys is not None and len(self._values) >= self._max_keys and key not in self._values:
                raise self._error(f"the rendezvous holds {self._max_keys} keys already: {self._others} misbehaves")
            self._values[key] = value
            self._changed.notify_all()

    def close(self, reason: str) -> None:
        """Fail every wait, now and later, and wake who asked for it; the first reason is kept."""
        with self._changed:
            if self._closed is None:
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
        """The value of a key, as soon as anybody has set it."""
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
                    raise self._error(f"the rendezvous with {self._others} ended: {self._closed}")
                if left <= 0:
                    raise self._error(f"waited {timeout_s:g} s for {self._others} to set {', '.join(missing)}")
                self._changed.wait(left)
