"""A router's choices of workers, one after the other: what it knows of the fleet, and what it sent where."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from engine.block_hash import each_block_hash
from engine.block_log import key_of
from router.config import RouterConfig
from router.info import WorkerInfo
from router.local_prefill import LocalShare
from router.policies import Demand, Route, choose
from router.prefix_index import NOTHING_KNOWN, KnownPrefix, PrefixIndex
from router.roster import Roster


class Known(Protocol):
    """What is known of a fleet."""

    @property
    def prefixes(self) -> PrefixIndex:
        """Who holds the KV of what."""

    @property
    def roster(self) -> Roster:
        """The READY workers."""

    def workers(self) -> list[WorkerInfo]:
        """All workers."""


class Chooser:
    """Chooses for one router."""

    def __init__(self, fleet: Known, config: RouterConfig, *, split: bool) -> None:
        self._fleet = fleet
        self._config = config
        self._split = split
        self._turn = 0
        self._share = LocalShare(config.local_prefill.max_share)

    def find_prefix(self, token_ids: Sequence[int]) -> KnownPrefix:
        """Who holds how much of these tokens."""
        found = [
            self._fleet.prefixes.find(map(key_of, each_block_hash(token_ids, size, root)), size)
            for root, size in self._fleet.roster.chains
        ]
        return max(found, key=lambda prefix: len(prefix.levels), default=NOTHING_KNOWN)

    def choose(self, demand: Demand) -> Route | None:
        """A route; None if some role has no worker left."""
        self._turn += 1
        some = self._fleet.roster.candidates(demand.prefix)
        route = self._choose_among(some, demand)
        if route is None and len(some) < len(everybody := self._fleet.workers()):
            route = self._choose_among(everybody, demand)
        return route

    def took(self, route: Route, num_tokens: int, now: float) -> None:
        """A prompt is sent there."""
        self._share.count(num_tokens, route.local_tokens, now)

    def took_back(self, route: Route, num_tokens: int) -> None:
        """It was not taken in there."""
        self._share.take_back(num_tokens, route.local_tokens)

    def _choose_among(self, workers: Sequence[WorkerInfo], demand: Demand) -> Route | None:
        config = self._config
        return choose(
            workers,
            demand,
            split=self._split,
            policy=config.policy,
            turn=self._turn,
            alone=self._split and config.serve_alone and self._fleet.roster.lacks_a_role,
            weights=config.kv_aware,
            local=config.local_prefill,
            allows=self._share.allows,
        )
