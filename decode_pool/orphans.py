"""Resumable requests whose router is gone: they run on for a while, so that another router may adopt them.

    (running for a router) --router gone--> ORPHANED --adopted--> (running for another router)
                                              |   '--last token--> ENDED --adopted--> (gone)
                                              '--grace over--> (aborted)            '--grace over--> (gone)

The engine loop's thread calls everything here.
"""

from __future__ import annotations

from dataclasses import dataclass

from protos import worker_pb2 as pb

Key = tuple[str, int]
"""request_id, attempt."""


@dataclass(slots=True)
class _Orphan:
    since: float
    """When its router was gone, on the caller's clock."""
    ending: pb.TokenOutput | None = None
    """All its tokens, once the last one is there."""


class Orphans:
    """Who waits for a new owner, and what is kept of those that have ended meanwhile."""

    def __init__(self, grace_s: float) -> None:
        """`grace_s`: how long one waits, in seconds."""
        self.grace_s = grace_s
        self._orphans: dict[Key, _Orphan] = {}

    def __contains__(self, key: Key) -> bool:
        return key in self._orphans

    def __len__(self) -> int:
        return len(self._orphans)

    def add(self, key: Key, now: float) -> None:
        """Its router is gone."""
        self._orphans[key] = _Orphan(now)

    def ended(self, key: Key, output: pb.TokenOutput) -> None:
        """It is done: `output` has all its tokens from offset 0 and how it ended."""
        self._orphans[key].ending = output

    def adopt(self, key: Key) -> pb.TokenOutput | None:
        """It has an owner again; its whole output, if it has ended meanwhile."""
        orphan = self._orphans.pop(key, None)
        return None if orphan is None else orphan.ending

    def expired(self, now: float) -> list[Key]:
        """Those whose time is over: they are forgotten here, and whatever still runs of them is the caller's to end."""
        keys = [key for key, orphan in self._orphans.items() if now - orphan.since >= self.grace_s]
        for key in keys:
            del self._orphans[key]
        return keys

    def forget(self, key: Key) -> None:
        """It ended otherwise."""
        self._orphans.pop(key, None)

    def clear(self) -> None:
        """Forget all."""
        self._orphans.clear()
