"""Where the ranks of a worker find each other: what one rank sets reaches every other one, through rank 0."""

from __future__ import annotations

from engine.errors import RankLostError
from protos.rendezvous import Rendezvous


class RankStore(Rendezvous):
    """One rank's view; a wait that cannot end well raises RankLostError."""

    def _ended(self, reason: str) -> RankLostError:
        return RankLostError(f"the ranks' rendezvous ended: {reason}")

    def _late(self, keys: str, timeout_s: float) -> RankLostError:
        return RankLostError(f"no rank has set {keys} for {timeout_s:g} s")
