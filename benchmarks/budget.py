"""How much time a run, or a section of it, may take, and how much of it is left."""

from __future__ import annotations

import math
import time
from collections.abc import Callable


class Budget:
    """Seconds from its making on; None: no bound."""

    def __init__(self, seconds: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self._seconds = math.inf if seconds is None else seconds
        self.skipped: list[str] = []
        """What `allows` found no time for."""

    def spent(self) -> float:
        """Seconds since the beginning."""
        return self._clock() - self._began

    def left(self) -> float:
        """Seconds until the bound; below 0 behind it."""
        return self._seconds - self.spent()

    def fits(self, need_s: float) -> bool:
        """Whether so much is left."""
        return need_s <= self.left()

    def allows(self, what: str) -> bool:
        """Whether there is any time left to begin `what`, however long it takes."""
        if self.left() > 0:
            return True
        self.skipped.append(what)
        return False
