"""Tasks that nobody awaits, yet that must neither vanish nor fail in silence."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Coroutine, Iterable
from typing import Any

logger = logging.getLogger(__name__)

CANCEL_AGAIN_S = 0.5
CANCEL_BOUND_S = 10.0


class Background:
    """Holds on to running tasks until they end, and logs the ones that fail."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._due: deque[tuple[Coroutine[Any, Any, Any], str]] = deque()

    def __len__(self) -> int:
        return len(self._tasks) + len(self._due)

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Start a task under a name that logs can show."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def spawn_in_turn(self, work: Coroutine[Any, Any, Any], name: str) -> None:
        """Start a task that gives way: of those that come together one begins in each turn of the loop, so that all
        else that is due goes in between."""
        self._due.append((work, name))
        if len(self._due) == 1:
            asyncio.get_running_loop().call_soon(self._begin_next)

    async def settle(self, timeout_s: float) -> None:
        """Wait for all tasks; cancel those that are not done in time."""
        while self._due:
            self.spawn(*self._due.popleft())
        tasks = list(self._tasks)
        if not tasks:
            return
        _, late = await asyncio.wait(tasks, timeout=timeout_s)
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late, timeout=timeout_s)

    async def cancel(self) -> None:
        """Cancel all tasks and wait for their end."""
        while self._due:
            self._due.popleft()[0].close()
        await cancel(self._tasks)

    def _begin_next(self) -> None:
        if self._due:
            self.spawn(*self._due.popleft())
        if self._due:
            asyncio.get_running_loop().call_soon(self._begin_next)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.error("background task %s failed", task.get_name(), exc_info=task.exception())


async def cancel(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks and wait for their end.

    Again and again, within a bound: a cancellation that meets a time-out inside a client library can get lost.
    """
    left = {task for task in tasks if not task.done()}
    loop = asyncio.get_running_loop()
    until = loop.time() + CANCEL_BOUND_S
    while left and loop.time() < until:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=CANCEL_AGAIN_S)
    for task in left:
        logger.error("task %s did not end within %.0f s", task.get_name(), CANCEL_BOUND_S)
