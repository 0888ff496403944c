"""What a router may still ask of a worker: the share that the worker told it of, less what it has asked for since.

Under overload every router would ask for each place that gets free, and all but one be refused. So the worker shares
out what it can promise, and a router takes it for full beyond that. Its answer to Reserve decides all the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from protos import worker_pb2


class Credit:
    """One worker's towards this router."""

    def __init__(self) -> None:
        self._told: worker_pb2.Credits | None = None
        """None: it shares nothing out, and is asked until it refuses."""
        self._open = (0, 0)
        """Requests and blocks that were asked for and not answered yet."""
        self._promised = (0, 0)
        """Those that were promised since it told of credits: it counts them itself when it tells next."""

    def tell(self, credits: worker_pb2.Credits | None) -> None:
        """The worker says anew what may be asked for, or (None) is gone."""
        self._told = credits
        self._promised = (0, 0)

    def covers(self, num_blocks: int, *, is_first: bool) -> bool:
        """Whether a request of so many blocks may be asked for; `is_first`: this router has nothing there.

        The first one may be of any size: on a worker that is empty, whatever fits is taken in.
        """
        if self._told is None:
            return True
        if self._open[0] + self._promised[0] >= self._told.requests:
            return False
        return is_first or self._open[1] + self._promised[1] + num_blocks <= self._told.blocks

    @contextlib.contextmanager
    def asking(self, num_blocks: int) -> Iterator[None]:
        """Around a Reserve: one that is refused or lost takes nothing."""
        self._open = (self._open[0] + 1, self._open[1] + num_blocks)
        try:
            yield
            self._promised = (self._promised[0] + 1, self._promised[1] + num_blocks)
        finally:
            self._open = (self._open[0] - 1, self._open[1] - num_blocks)


def blocks_needed(num_tokens: int, answer_tokens: int, expected_answer_tokens: int, held: int, block_size: int) -> int:
    """Blocks that a worker would have to promise for a request.

    It has `num_tokens` and may generate `answer_tokens` more; the worker expects so many of an answer, and holds so
    many of the request's tokens already.
    """
    final = num_tokens + min(answer_tokens, expected_answer_tokens)
    return max(0, -(-final // block_size) - held // block_size)
