"""Which workers hold the KV of which blocks, as they say themselves: for a prompt, who holds how much of its start.

Each worker's stream brings a snapshot of its keys (`engine/block_log.py`), then what changes. A worker that holds a
block is taken to hold those before it in the chain too: caches give up the ends of chains first. Where that is not so,
or a key stands for another block, a prompt goes to a worker that holds less than was thought.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from protos import worker_pb2
from router.info import WorkerInfo

Holders = WorkerInfo | set[WorkerInfo]
"""Most keys have one holder; a set for each would be most of the memory."""


@dataclass(frozen=True, slots=True)
class KnownPrefix:
    """The blocks from a prompt's start that somebody holds; valid until the index changes."""

    block_size: int = 1
    levels: tuple[Holders, ...] = ()
    """Who holds the first block, the second, ..."""

    def tokens_at(self, worker: WorkerInfo) -> int:
        """Tokens of the prompt that a worker holds."""
        low, high = 0, len(self.levels)  # it holds `low` blocks, and not more than `high`
        while low < high:
            middle = (low + high + 1) // 2
            if _holds(self.levels[middle - 1], worker):
                low = middle
            else:
                high = middle - 1
        return low * self.block_size

    def longest(self, count: int) -> list[WorkerInfo]:
        """Workers that hold most of it, about `count` at most."""
        found: dict[WorkerInfo, None] = {}
        for holders in reversed(self.levels):
            for worker in (holders,) if isinstance(holders, WorkerInfo) else holders:
                found[worker] = None
                if len(found) >= count:
                    return list(found)
        return list(found)


NOTHING_KNOWN = KnownPrefix()


def _holds(holders: Holders, worker: WorkerInfo) -> bool:
    return holders is worker if isinstance(holders, WorkerInfo) else worker in holders


class PrefixIndex:
    """Block keys to workers; the router's event loop calls everything."""

    def __init__(self) -> None:
        self._holders: dict[int, Holders] = {}
        self._keys: dict[WorkerInfo, set[int]] = {}
        self._numbers: dict[WorkerInfo, int] = {}

    def apply(self, worker: WorkerInfo, events: worker_pb2.BlockEvents) -> bool:
        """Take a worker's events in; False if some are missing: ask for a snapshot, until then it counts as empty."""
        if events.is_snapshot:
            self.forget(worker)
        elif self._numbers.get(worker) != events.after:
            self.forget(worker)
            return False
        self._numbers[worker] = events.number
        keys = self._keys.setdefault(worker, set())
        for key in events.evicted:
            if key in keys:
                keys.remove(key)
                self._remove(key, worker)
        for key in events.stored:
            if key not in keys:
                keys.add(key)
                self._add(key, worker)
        return True

    def forget(self, worker: WorkerInfo) -> None:
        """A worker is gone, or starts anew."""
        self._numbers.pop(worker, None)
        for key in self._keys.pop(worker, ()):
            self._remove(key, worker)

    def find(self, keys: Iterable[int], block_size: int) -> KnownPrefix:
        """Who holds how much of a chain; of the keys no more are asked for than the first that nobody holds."""
        levels: list[Holders] = []
        for key in keys:
            holders = self._holders.get(key)
            if holders is None:
                break
            levels.append(holders)
        return KnownPrefix(block_size, tuple(levels))

    @property
    def num_keys(self) -> int:
        """Different blocks that are held somewhere."""
        return len(self._holders)

    def num_held(self, worker: WorkerInfo) -> int:
        """Blocks that a worker holds."""
        return len(self._keys.get(worker, ()))

    def _add(self, key: int, worker: WorkerInfo) -> None:
        holders = self._holders.get(key)
        if holders is None:
            self._holders[key] = worker
        elif isinstance(holders, WorkerInfo):
            self._holders[key] = {holders, worker}
        else:
            holders.add(worker)

    def _remove(self, key: int, worker: WorkerInfo) -> None:
        holders = self._holders[key]
        if isinstance(holders, WorkerInfo):
            del self._holders[key]
            return
        holders.discard(worker)
        if len(holders) == 1:
            (self._holders[key],) = holders
