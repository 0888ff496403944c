"""The key-value store through which the two ends of a data channel find each other.

It rides on the pair's control connection: `set` keeps the value and sends it to the other end, and
what the other end set arrives through `put`. So the rendezvous is as authenticated as the pair.
"""

from __future__ import annotations

from collections.abc import Callable

from kv_transfer.errors import TransportError
from protos.rendezvous import Rendezvous

MAX_KEYS = 256


class PairStore(Rendezvous):
    """One end's view; a wait that cannot end well raises TransportError."""

    def __init__(self, publish: Callable[[str, bytes], None], timeout_s: float) -> None:
        super().__init__(publish, timeout_s)
        self._on_close: Callable[[], None] = lambda: None

    def put(self, key: str, value: bytes) -> None:
        """Keep a value that the other end set; TransportError if it sets too many."""
        with self._changed:
            if len(self._values) >= MAX_KEYS and key not in self._values:
                raise TransportError(f"the rendezvous holds {MAX_KEYS} keys already: the other end misbehaves")
            super().put(key, value)

    def close(self, reason: str) -> None:
        """Fail every wait, now and later, and wake who asked for it."""
        with self._changed:
            super().close(reason)
            on_close = self._on_close
        on_close()

    def when_closed(self, call: Callable[[], None]) -> None:
        """Have a wait that is not the store's own woken when the store is closed; at once if it is."""
        with self._changed:
            self._on_close = call
            is_closed = self._closed is not None
        if is_closed:
            call()

    def _ended(self, reason: str) -> TransportError:
        return TransportError(f"the rendezvous ended: {reason}")

    def _late(self, keys: str, timeout_s: float) -> TransportError:
        return TransportError(f"waited {timeout_s:g} s for the other end to set {keys}")
