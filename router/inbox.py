"""Everything that happens to one attempt, in the order in which it happens.

The readers of the Attach streams and the end of a Prefill call put events in; the task that serves
the request takes them out, all that wait at once, so that a client that lags gets fewer, longer messages.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from protos import worker_pb2

Event = worker_pb2.TokenOutput | worker_pb2.PrefillReply | Exception


class Inbox:
    """A queue for one reader, bounded in tokens."""

    def __init__(self, request_id: str, attempt: int, max_tokens: int, on_overflow: Callable[[], object]) -> None:
        self.request_id = request_id
        self.attempt = attempt
        self._max_tokens = max_tokens
        self._on_overflow = on_overflow
        self._events: list[Event] = []
        self._num_tokens = 0
        self._waiter: asyncio.Future[None] | None = None

    def put_output(self, output: worker_pb2.TokenOutput) -> None:
        """Tokens from a worker; those of another attempt are dropped."""
        if output.attempt != self.attempt:
            return
        self._num_tokens += len(output.token_ids)
        self.put(output)
        if self._num_tokens > self._max_tokens:
            self._on_overflow()

    def put(self, event: Event) -> None:
        """Anything else: the prefill's reply, or the error that ends the attempt."""
        self._events.append(event)
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def take(self) -> list[Event]:
        """All events since the last call; waits for one if there is none (the scope's deadline bounds that)."""
        if not self._events:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        events, self._events = self._events, []
        self._num_tokens = 0
        return events
