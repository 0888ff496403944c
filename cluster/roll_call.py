"""Asks all members how they are, without waiting, and keeps the last answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from cluster.hands import Hands, Pending
from cluster.members import Member

ASK_TIMEOUT_S = 2.0
_WORK = ("num_running", "num_waiting", "num_reserved")


class RollCall:
    """One round at a time; who is silent in it has no answer."""

    def __init__(self, hands: Hands) -> None:
        self._hands = hands
        self._asking: Pending | None = None
        self.asked_at = float("-inf")
        """When the last round began."""
        self._asked: list[str] = []
        self._answers: dict[str, Any] = {}

    @property
    def is_asking(self) -> bool:
        """Whether answers are awaited."""
        return self._asking is not None

    def hear(self, members: Sequence[Member], every_s: float, now: float) -> bool:
        """Begin a round if it is time for one; whether one has just ended."""
        if self._asking is None and now >= self.asked_at + every_s:
            self.asked_at, self._asked = now, [member.member_id for member in members]
            self._asking = self._hands.ask(list(members), ASK_TIMEOUT_S)
        if self._asking is None or (answers := self._asking.poll()) is None:
            return False
        self._asking, self._answers = None, answers
        return True

    def fronts(self, members: Sequence[Member]) -> Iterator[tuple[Member, dict[str, Any]]]:
        """The workers that answered, with their status."""
        for member in members:
            if member.kind == "worker" and member.member_id in self._answers:
                yield member, self._answers[member.member_id]

    def routers(self, members: Sequence[Member]) -> dict[str, dict[str, Any]]:
        """The load of each router that answered."""
        names = [member.member_id for member in members if member.kind == "router"]
        return {name: self._answers[name] for name in names if name in self._answers}

    def load(self) -> dict[str, float]:
        """What each worker that was asked has to do; a silent one has the least to lose."""
        stats = {name: self._answers.get(name, {}).get("stats") for name in self._asked}
        return {
            name: float(sum(told.get(key, 0) for key in _WORK)) if told is not None else -1.0
            for name, told in stats.items()
        }
