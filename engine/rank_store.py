"""Where the ranks of a worker find each other: what one rank sets reaches every other one, through rank 0."""

from __future__ import annotations

from collections.abc import Callable

from engine.errors import RankLostError
from protos.rendezvous import Rendezvous


def rank_store(publish: Callable[[str, bytes], None], timeout_s: float) -> Rendezvous:
    """One rank's view; a wait that cannot end well raises RankLostError."""
    return Rendezvous(publish, timeout_s, error=RankLostError, others="the other ranks")
