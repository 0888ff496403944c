"""A wake-up call that many tasks can wait for, without polling and without missing one."""

from __future__ import annotations

import asyncio


class Signal:
    """Counts notifications; a waiter names the count it has seen, so none between look and wait is lost."""

    def __init__(self) -> None:
        self.version = 0
        """Notifications so far."""
        self._event = asyncio.Event()

    def notify(self) -> None:
        """Wake everybody who waits."""
        self.version += 1
        event, self._event = self._event, asyncio.Event()
        event.set()

    async def wait(self, seen: int, *, timeout_s: float) -> bool:
        """Wait until the version is no longer `seen`; False if that did not happen in time."""
        try:
            async with asyncio.timeout(timeout_s):
                while self.version == seen:
                    await self._event.wait()
        except TimeoutError:
            return self.version != seen
        return True
