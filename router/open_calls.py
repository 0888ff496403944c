"""Calls to a worker that are open before there is a request for them.

Half of what a unary call costs is to open it, on both sides. So a router keeps a few open, each for one request:

    OPEN --request written--> ASKED --reply or status--> (gone; another one is opened soon)
      '--the worker ended it--> (gone)

Where none is open a unary call is made, which means the same. Closing the channel ends them all.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar, cast

import grpc
from google.protobuf.message import Message

Q = TypeVar("Q", bound=Message)
A = TypeVar("A")

NUM_OPEN = 4
REFILL_AFTER_S = 0.01
"""Opening a call takes both ends time that the request just answered needs first."""


class OpenCalls(Generic[Q, A]):
    """Open calls of one method at one worker."""

    def __init__(
        self, open_call: Callable[[], grpc.aio.StreamStreamCall[Q, A]], call: Callable[[Q, float], Awaitable[A]]
    ) -> None:
        """`call(request, timeout_s)` makes a unary one."""
        self._open_call = open_call
        self._call = call
        self._open: deque[grpc.aio.StreamStreamCall[Q, A]] = deque()
        self._asked: set[grpc.aio.StreamStreamCall[Q, A]] = set()
        """Held until they are done: one that is forgotten before is cancelled."""
        self._refill: asyncio.TimerHandle | None = None
        self._closed = False

    def fill(self) -> None:
        """Open as many as there should be."""
        self._refill = None
        while not self._closed and len(self._open) < NUM_OPEN:
            self._open.append(self._open_call())

    def close(self) -> None:
        """Open no more; those that are open end with their channel."""
        self._closed = True
        if self._refill is not None:
            self._refill.cancel()

    async def ask(self, request: Q, timeout_s: float, rest: asyncio.Future[Q] | None = None) -> A:
        """The reply; TimeoutError, AioRpcError and, if the channel is closed under it, CancelledError.

        `rest` has what of the request is still to come: it is written when it is there, into a message of its own.
        """
        async with asyncio.timeout(timeout_s):
            if (call := self._take()) is not None:
                try:
                    reply = await self._ask(call, request, rest)
                finally:
                    if not self._closed and self._refill is None:
                        self._refill = asyncio.get_running_loop().call_later(REFILL_AFTER_S, self.fill)
                if reply is not None:
                    return reply
            if rest is not None:
                request.MergeFrom(await rest)
            return await self._call(request, timeout_s)

    @staticmethod
    async def _ask(call: grpc.aio.StreamStreamCall[Q, A], request: Q, rest: asyncio.Future[Q] | None) -> A | None:
        """The reply; None if the call ended well without one: then nobody was asked.

        The worker may have what the rest says from elsewhere, and answer before it is there.
        """
        with contextlib.suppress(asyncio.InvalidStateError):  # it has just ended: reading says why
            await call.write(request)
        if rest is None:
            return cast(A | None, await call.read() or None)
        reading = asyncio.ensure_future(call.read())
        try:
            await asyncio.wait((reading, rest), return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                with contextlib.suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):
                    await call.write(rest.result())
            return cast(A | None, await reading or None)
        finally:
            if not reading.done():
                reading.cancel()  # and the call with it

    def _take(self) -> grpc.aio.StreamStreamCall[Q, A] | None:
        while self._open:
            call = self._open.popleft()
            if not call.done():
                self._asked.add(call)
                call.add_done_callback(self._asked.discard)
                return call
        return None
