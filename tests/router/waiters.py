"""Requests that wait at a line, without workers: each tries when it is woken."""

from __future__ import annotations

import asyncio
from typing import Any

from router.admission import Line
from router.config import RouterConfig
from router.errors import OverloadedError
from router.fair_queue import Claim


def line_of(**config: Any) -> Line:
    return Line(RouterConfig(**config))


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Waiters:
    """Requests that wait at a line; each tries when it is woken, and gets its place if `room` has one."""

    def __init__(self, line: Line) -> None:
        self.line = line
        self.order: list[str] = []
        self.refusals: dict[str, OverloadedError] = {}
        self.room = 0
        self.too_large: set[str] = set()
        self._tasks: list[asyncio.Task[None]] = []

    async def add(self, name: str, claim: Claim) -> None:
        self._tasks.append(asyncio.create_task(self._wait(name, claim)))
        await asyncio.sleep(0)

    async def _wait(self, name: str, claim: Claim) -> None:
        with self.line.arrive(claim) as place:
            try:
                await place.turn(may_refuse=True)
                while not self.room or name in self.too_large:
                    await place.wait(may_refuse=True)
                    await place.turn(may_refuse=True)
            except OverloadedError as error:
                self.refusals[name] = error
                return
            self.room -= 1
            self.order.append(name)
            place.admitted()

    async def admit(self, num: int) -> None:
        """There is room for so many, one after the other."""
        for _ in range(num):
            self.room += 1
            self.line.news()
            for _ in range(3):
                await asyncio.sleep(0)

    async def end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        assert not len(self.line)
