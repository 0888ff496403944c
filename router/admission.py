"""Where requests wait for a place on a worker.

While nobody waits, requests try their workers at once and side by side. One that every worker refused
joins the line, and whoever comes later queues behind it: by priority, then by arrival. Only the head of
the line tries again, when a worker has news; when it gets its place the next one tries. So a large request
is not overtaken for ever by small ones, and no wake-up causes a stampede.

States of a place: FREE (may try) -> WAITING (in the line) -> TRYING (head, woken) -> WAITING or FREE;
-> LEFT at the end of the request, in whatever way.
"""

from __future__ import annotations

import asyncio
import bisect
import enum
from types import TracebackType

from router.errors import OverloadedError


class PlaceState(enum.Enum):
    """Where a request stands."""

    FREE = "free"
    WAITING = "waiting"
    TRYING = "trying"
    LEFT = "left"


class Line:
    """The requests that wait, in the order in which they may try."""

    def __init__(self, max_queued: int, retry_after_s: float) -> None:
        self.max_queued = max_queued
        self._retry_after_s = retry_after_s
        self._places: list[Place] = []
        self._arrivals = 0
        self._news = 0

    def __len__(self) -> int:
        return len(self._places)

    def arrive(self, priority: int) -> Place:
        """A place of one's own; use it as a context manager."""
        self._arrivals += 1
        return Place(self, (priority, self._arrivals))

    def check_open(self) -> None:
        """OverloadedError if no more may wait."""
        if len(self._places) >= self.max_queued:
            raise OverloadedError(
                f"{len(self._places)} requests wait for a worker already, the limit is {self.max_queued}; "
                f"try again in {self._retry_after_s:g} s",
                retry_after_s=self._retry_after_s,
            )

    def news(self) -> None:
        """A worker may have room: the head of the line may try."""
        self._news += 1
        self._wake_head()

    def _wake_head(self) -> None:
        if self._places and self._places[0].state is PlaceState.WAITING:
            self._places[0].wake()

    def head(self) -> Place | None:
        """Who may try next."""
        return self._places[0] if self._places else None

    def news_since(self, seen: int) -> bool:
        """Whether there has been news since that count."""
        return self._news != seen

    @property
    def news_count(self) -> int:
        """News so far."""
        return self._news

    def insert(self, place: Place) -> None:
        """Add to the line, by rank."""
        bisect.insort(self._places, place, key=lambda other: other.rank)

    def remove(self, place: Place) -> None:
        """Take out of the line; the next one may be the head now."""
        self._places.remove(place)
        self._wake_head()


class Place:
    """One request's standing in the line."""

    def __init__(self, line: Line, rank: tuple[int, int]) -> None:
        self.rank = rank
        """Priority, then arrival: lower goes first."""
        self.state = PlaceState.FREE
        self._line = line
        self._seen = 0
        self._woken: asyncio.Future[None] | None = None

    def __enter__(self) -> Place:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave_line()
        self.state = PlaceState.LEFT

    async def turn(self, *, may_refuse: bool) -> None:
        """Return when this request may try: at once, unless others wait ahead of it."""
        head = self._line.head()
        if self.state is PlaceState.FREE and head is not None and head.rank < self.rank:
            await self.wait(may_refuse=may_refuse)
        self._seen = self._line.news_count

    async def wait(self, *, may_refuse: bool) -> None:
        """Every worker refused: wait for news, bounded by the request's scope.

        OverloadedError if the line is full and `may_refuse`: one whose client has tokens is not.
        """
        if self.state is PlaceState.FREE:
            if may_refuse:
                self._line.check_open()
            self._line.insert(self)
        if self._line.head() is self and self._line.news_since(self._seen):
            self.state = PlaceState.TRYING
            return
        self.state = PlaceState.WAITING
        self._woken = asyncio.get_running_loop().create_future()
        await self._woken

    def admitted(self) -> None:
        """A worker took the request: let the next one try."""
        self._leave_line()

    def wake(self) -> None:
        """Called by the line: this place is its head and there is news."""
        self.state = PlaceState.TRYING
        if self._woken is not None and not self._woken.done():
            self._woken.set_result(None)

    def _leave_line(self) -> None:
        if self.state in (PlaceState.WAITING, PlaceState.TRYING):
            self.state = PlaceState.FREE
            self._line.remove(self)
