"""The READY workers of a fleet by role, and which of many a request looks at."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

from engine.block_hash import root_hash
from router.info import WorkerInfo, WorkerState
from router.prefix_index import KnownPrefix

MANY = 32
"""A fleet of up to so many is looked at as a whole."""
NUM_DRAWN = 8
"""Of a larger one a request looks at so many of each role, drawn at random, and at so many that hold its prefix."""


class Roster:
    """Made anew whenever a worker comes, goes or changes its state."""

    def __init__(self, workers: Iterable[WorkerInfo]) -> None:
        self._ready = [info for info in workers if info.state is WorkerState.READY]
        self._prefillers = [info for info in self._ready if info.can_prefill]
        self._decoders = [info for info in self._ready if info.can_decode]
        self.lacks_a_role = not (self._prefillers and self._decoders)
        """Whether a split request finds nobody for one of its parts."""
        layouts = {(at.model_hash, at.dtype, at.block_size) for at in (info.description.layout for info in self._ready)}
        self.chains = [(root_hash(*layout), layout[2]) for layout in layouts if layout[2]]
        """Root and block size of each way to name blocks in this fleet: one, but while it is being renewed."""

    def candidates(self, prefix: KnownPrefix) -> list[WorkerInfo]:
        """Workers to choose among.

        The best of a few drawn at random keeps lines almost as short as the best of all (Mitzenmacher, "The power of
        two choices in randomized load balancing", 2001), at a cost that does not grow with the fleet.
        """
        if len(self._ready) <= MANY:
            return self._ready
        drawn = [*_draw(self._prefillers), *_draw(self._decoders), *prefix.longest(NUM_DRAWN)]
        return list(dict.fromkeys(drawn))


def _draw(workers: Sequence[WorkerInfo]) -> Sequence[WorkerInfo]:
    return workers if len(workers) <= NUM_DRAWN else random.sample(workers, NUM_DRAWN)
