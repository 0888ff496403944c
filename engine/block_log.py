"""What an engine's pool can give out, as others are told of it: a snapshot at first, then what changed.

A content goes by the first 8 bytes of its hash (its key): enough to choose a worker by, for one that is taken for
another costs a computation, never a wrong answer.
"""

from __future__ import annotations

from collections.abc import Iterable

from protos import worker_pb2 as pb

KEY_BYTES = 8


def key_of(content: bytes) -> int:
    """The key of a block's hash."""
    return int.from_bytes(content[:KEY_BYTES], "little")


class BlockLog:
    """Changes since they were last taken; the engine loop's thread calls everything."""

    def __init__(self, contents: Iterable[bytes]) -> None:
        """`contents` are there already."""
        self._changed = dict.fromkeys(map(key_of, contents), True)
        """Key to whether it is there now."""
        self._number = 0

    def stored(self, content: bytes) -> None:
        """It can be found from now on."""
        self._changed[key_of(content)] = True

    def evicted(self, content: bytes) -> None:
        """It cannot be found any more."""
        self._changed[key_of(content)] = False

    def take(self) -> pb.BlockEvents | None:
        """What changed, numbered; the first time all there is, later None if nothing changed."""
        if not self._changed and self._number:
            return None
        changed, self._changed = self._changed, {}
        self._number += 1
        return _events(changed, self._number - 1, self._number, is_snapshot=self._number == 1)


class BlockChanges:
    """Events on their way to one listener, added up: however long it does not listen, each key counts once."""

    def __init__(self) -> None:
        self._changed: dict[int, bool] = {}
        self._after: int | None = None
        """None: nothing is on its way."""
        self._number = 0
        self._is_snapshot = False

    def __len__(self) -> int:
        return len(self._changed)

    def add(self, events: pb.BlockEvents) -> None:
        """Take events in that follow on the last ones, or a snapshot, which replaces them."""
        if events.is_snapshot:
            self._changed.clear()
            self._after, self._is_snapshot = events.after, True
        elif self._after is None:
            self._after = events.after
        self._changed.update(dict.fromkeys(events.evicted, False))
        self._changed.update(dict.fromkeys(events.stored, True))
        self._number = events.number

    def take(self) -> pb.BlockEvents | None:
        """All of them as one; None if there are none."""
        if self._after is None:
            return None
        events = _events(self._changed, self._after, self._number, is_snapshot=self._is_snapshot)
        self._changed, self._after, self._is_snapshot = {}, None, False
        return events


class BlockMirror:
    """The keys of a worker's blocks, kept by its events: in a front, for routers that come later."""

    def __init__(self) -> None:
        self._keys: set[int] = set()
        self._number = 0

    def __len__(self) -> int:
        return len(self._keys)

    def apply(self, events: pb.BlockEvents) -> None:
        """Take events in; they come in order and without a gap."""
        if events.is_snapshot:
            self._keys.clear()
        self._keys.difference_update(events.evicted)
        self._keys.update(events.stored)
        self._number = events.number

    def snapshot(self) -> pb.BlockEvents:
        """All keys, as of the last event."""
        return pb.BlockEvents(after=self._number, number=self._number, stored=self._keys, is_snapshot=True)


def _events(changed: dict[int, bool], after: int, number: int, *, is_snapshot: bool) -> pb.BlockEvents:
    return pb.BlockEvents(
        after=after,
        number=number,
        is_snapshot=is_snapshot,
        stored=[key for key, is_there in changed.items() if is_there],
        evicted=[key for key, is_there in changed.items() if not is_there],
    )
