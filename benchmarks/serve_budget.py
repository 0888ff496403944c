"""How much time a run may take, and how much of it is left."""

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

    def spent(self) -> float:
        """Seconds since the beginning."""
        return self._clock() - self._began

    def left(self) -> float:
        """Seconds until the bound; below 0 behind it."""
        return self._seconds - self.spent()

    def fits(self, need_s: float) -> bool:
        """Whether so much is left."""
        return need_s <= self.left()
