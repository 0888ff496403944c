"""The prefill craft's gRPC service, in a worker's front process: translates, decides nothing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any, NoReturn

import grpc

from engine.ipc import EngineGoneError
from engine.link import EngineLink
from protos import worker_pb2 as pb
from protos import worker_pb2_grpc
from protos.status import refuse

log = logging.getLogger(__name__)

MAX_PREFILL_S = 3600.0
"""Bound of the wait for a first token where the request has no deadline."""
DRAINING = "this worker is draining"
"""Said with RESOURCE_EXHAUSTED: for the router it is one more worker without room, and no failure."""
MEET_TIMEOUT_S = 5.0
ABORT_TIMEOUT_S = 5.0
REST_TIMEOUT_S = 10.0
"""Longest that a refusal waits for what the router has still to write."""

Context = grpc.aio.ServicerContext[Any, Any]


class PrefillService(worker_pb2_grpc.PrefillWorkerServicer):
    """`pdserve.v1.PrefillWorker` over the worker's engine link."""

    def __init__(self, link: EngineLink) -> None:
        self.draining = False
        """Whether new prefills are refused."""
        self._link = link

    async def Prefill(self, request: pb.PrefillRequest, context: Context | _RefusingLater) -> pb.PrefillReply:
        """Have the engine compute a prompt; ends with the caller if the caller goes away."""
        if self.draining:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, DRAINING)
        if refusal := self._link.stale(request.epoch):
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, refusal)
        timeout_s = request.request.deadline_s or MAX_PREFILL_S
        try:
            reply = await self._link.call(pb.EngineCommand(prefill=request), timeout_s)
        except EngineGoneError as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        except asyncio.CancelledError:
            self._abort(request.request, "the router cancelled the call")
            raise
        if reply.WhichOneof("result") == "error":
            await refuse(context, reply.error)
        asyncio.get_running_loop().call_soon(_log_prefilled, request.request, reply.prefill)  # once it is on its way
        return reply.prefill

    async def OpenPrefill(
        self, request_iterator: AsyncIterator[pb.PrefillRequest], context: Context
    ) -> AsyncIterator[pb.PrefillReply]:
        """Prefill for the one request that is still to come; its ticket may follow."""
        async for request in request_iterator:
            following = asyncio.create_task(self._hear_ticket(request.request, request_iterator), name="prefill-ticket")
            try:
                yield await self.Prefill(request, _RefusingLater(context, following))
            finally:
                following.cancel()
            return

    async def Meet(self, request: pb.MeetRequest, context: Context) -> pb.MeetReply:
        """Have the engine begin the pair to a worker; says nothing of how that ends."""
        if self.draining:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, DRAINING)
        if refusal := self._link.stale(request.epoch):
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, refusal)
        try:
            reply = await self._link.call(pb.EngineCommand(meet=request), MEET_TIMEOUT_S)
        except EngineGoneError as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        if reply.WhichOneof("result") == "error":
            await refuse(context, reply.error)
        return reply.meet

    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortReply:
        """End a prefill in any phase."""
        try:
            reply = await self._link.call(pb.EngineCommand(abort_prefill=request), ABORT_TIMEOUT_S)
        except EngineGoneError:
            return pb.AbortReply(found=False)
        return reply.abort

    async def _hear_ticket(self, asked: pb.EngineRequest, following: AsyncIterator[pb.PrefillRequest]) -> None:
        """Pass on the ticket that comes behind its request."""
        async for message in following:
            if (message.ticket.request_id, message.ticket.attempt) == (asked.request_id, asked.attempt):
                self._link.send(pb.EngineCommand(ticket=message.ticket))
            return

    def _abort(self, request: pb.EngineRequest, reason: str) -> None:
        abort = pb.AbortRequest(request_id=request.request_id, attempt=request.attempt, reason=reason)
        self._link.send(pb.EngineCommand(abort_prefill=abort))


class _RefusingLater:
    """A call's context that refuses once all of the request is there.

    What a router writes into a call that has ended takes the place of the status, and it would not know why.
    """

    def __init__(self, context: Context, rest: asyncio.Task[None]) -> None:
        self._context = context
        self._rest = rest

    async def abort(self, code: grpc.StatusCode, details: str) -> NoReturn:
        """End the call with that status."""
        await asyncio.wait((self._rest,), timeout=REST_TIMEOUT_S)
        await self._context.abort(code, details)
        raise AssertionError("abort returned")


def _log_prefilled(asked: pb.EngineRequest, done: pb.PrefillReply) -> None:
    log.info(
        "prefilled",
        extra={
            "request_id": asked.request_id,
            "attempt": asked.attempt,
            "queue_s": round(done.queue_s, 6),
            "prefill_s": round(done.prefill_s, 6),
        },
    )
