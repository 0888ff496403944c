"""Tells the log of refused requests, in a way that does not cost more than to serve them: under overload most are."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

PER_SECOND = 5
"""Refusals of one kind that are logged one by one; of the others in the same second only how many there were."""


class RefusalLog:
    """Counts refusals by outcome, and logs some of them."""

    def __init__(self, logger: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._logger = logger
        self._clock = clock
        self._second_ends = 0.0
        self._num: dict[str, int] = {}

    def note(self, outcome: str, request_id: str, error: str) -> None:
        """A request was refused."""
        now = self._clock()
        if now >= self._second_ends:
            self._second_ends = now + 1.0
            self._tell_rest()
        num = self._num[outcome] = self._num.get(outcome, 0) + 1
        if num <= PER_SECOND:
            extra = {"request_id": request_id, "outcome": outcome, "error": error}
            self._logger.info("request refused", extra=extra)

    def _tell_rest(self) -> None:
        for outcome, num in self._num.items():
            if num > PER_SECOND:
                extra = {"outcome": outcome, "num_requests": num - PER_SECOND}
                self._logger.info("more requests were refused", extra=extra)
        self._num.clear()
