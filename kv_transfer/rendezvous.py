"""The key-value store through which the two ends of a data channel find each other.

It rides on the pair's control connection: `set` keeps the value and sends it to the other end, and
what the other end set arrives through `put`. So the rendezvous is as authenticated as the pair.
"""

from __future__ import annotations

from collections.abc import Callable

from kv_transfer.errors import TransportError
from protos.rendezvous import Rendezvous

MAX_KEYS = 256


def pair_store(publish: Callable[[str, bytes], None], timeout_s: float) -> Rendezvous:
    """One end's view; a wait that cannot end well raises TransportError."""
    return Rendezvous(publish, timeout_s, error=TransportError, others="the other end", max_keys=MAX_KEYS)
