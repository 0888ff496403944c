"""How often a request was tried, and whom it keeps away from."""

from __future__ import annotations

import asyncio

from router.errors import AttemptFailedError, UnavailableError
from router.info import WorkerLife


class Attempts:
    """The attempts of one request.

    `number` grows with every try, so that outputs of an older one can be told; only failures count
    against `max_attempts`, a worker without room is no failure.
    """

    def __init__(self, max_attempts: int, retry_after_s: float, first: int = 0) -> None:
        """`first`: the number of the first attempt."""
        self.number = first - 1
        """Of the present attempt; the one before the first: none yet."""
        self.num_failed = 0
        self.ended_at = 0.0
        """When the last one failed, or was given back, on the loop's clock."""
        self.excluded: frozenset[WorkerLife] = frozenset()
        self.avoided: frozenset[WorkerLife] = frozenset()
        self._max_attempts = max_attempts
        self._retry_after_s = retry_after_s

    def begin(self) -> int:
        """Number the next attempt."""
        self.number += 1
        return self.number

    def given_back(self) -> None:
        """Record that a worker gave the request back: no failure, but another worker may be awaited anew."""
        self.ended_at = asyncio.get_running_loop().time()

    def failed(self, error: AttemptFailedError, took_part: frozenset[WorkerLife]) -> None:
        """Record a failure; UnavailableError when that was the last attempt.

        A worker that the error names is excluded; if it names nobody, all that took part are avoided.
        """
        self.num_failed += 1
        self.ended_at = asyncio.get_running_loop().time()
        if error.worker is not None:
            self.excluded |= {error.worker}
        else:
            self.avoided |= took_part
        if self.num_failed >= self._max_attempts:
            raise UnavailableError(
                f"gave up after {self.num_failed} attempts, the last failed with: {error}",
                retry_after_s=self._retry_after_s,
            ) from error
