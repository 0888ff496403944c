"""The decode craft's gRPC service, in a worker's front process: translates and streams, decides nothing.

An attached router: ATTACHED --stream ends, router silent, attached anew, or queue over its cap--> GONE,
and the engine ends everything it asked for. When the engine's epoch ends, all streams end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import grpc

from decode_pool.credits import share_out
from engine.block_log import BlockChanges, BlockMirror
from engine.ipc import EngineGoneError
from engine.link import EngineLink
from protos import worker_pb2 as pb
from protos import worker_pb2_grpc
from protos.status import refuse

log = logging.getLogger(__name__)

STATS_PERIOD_S = 1.0
"""A router hears at least this often from its worker."""
STATS_LAG_S = 0.1
"""A router hears this soon of statistics that have changed, if not with tokens before."""
ROUTER_SILENCE_S = 10.0
"""A router that sends no heartbeat for so long is gone."""
TURN_S = 0.05
"""So long a router has the places that cannot be shared out evenly, before they are the next one's."""
MIN_KEPT_KEYS = 4096
"""Of a router that does not read, no more block events are kept than twice what a snapshot has, and so many."""
MAX_QUEUED_EVENTS = 10_000
"""Step messages kept for a router that does not read."""
DRAINING = "this worker is draining"
"""Said with RESOURCE_EXHAUSTED: for the router it is one more worker without room, and no failure."""
CALL_TIMEOUT_S = 30.0
ABORT_TIMEOUT_S = 5.0

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(slots=True)
class _Attached:
    """One router's stream."""

    router_id: str
    queue: asyncio.Queue[pb.AttachEvent | None] = field(default_factory=asyncio.Queue)
    """None ends the stream."""
    telling: asyncio.TimerHandle | None = None
    """Statistics that are about to be sent."""
    blocks: BlockChanges = field(default_factory=BlockChanges)
    """Block events that are to be sent with the next message."""

    def forget(self) -> None:
        """Drop what is queued."""
        while not self.queue.empty():
            self.queue.get_nowait()


class DecodeService(worker_pb2_grpc.DecodeWorkerServicer):
    """`pdserve.v1.DecodeWorker` over the worker's engine link."""

    def __init__(self, link: EngineLink) -> None:
        self.draining = False
        """Whether new reservations are refused."""
        self._link = link
        self._attached: dict[str, _Attached] = {}
        self._mirror = BlockMirror()
        self._num_promised = 0
        """Requests that were promised room since the statistics were taken."""

    def on_step(self, step: pb.StepEvent) -> None:
        """Pass one engine step's tokens on, one message per router; the others hear of its statistics soon."""
        if step.HasField("blocks"):
            self._mirror.apply(step.blocks)
            for attached in self._attached.values():
                attached.blocks.add(step.blocks)
                if len(attached.blocks) > 2 * len(self._mirror) + MIN_KEPT_KEYS:
                    attached.blocks.add(self._mirror.snapshot())
        self._num_promised = 0
        shares = self._shares()
        behind = dict(self._attached)
        for outputs in step.outputs:
            router = behind.pop(outputs.router_id, None)
            if router is None:
                continue
            if router.queue.qsize() >= MAX_QUEUED_EVENTS:
                log.error("router %s does not read its stream: detaching it", router.router_id)
                router.forget()
                self._detach(router)
            else:
                event = pb.AttachEvent(outputs=outputs.outputs, stats=step.stats, draining=self.draining)
                event.credits.CopyFrom(shares[router.router_id])
                event.MergeFrom(pb.AttachEvent(blocks=router.blocks.take()))
                router.queue.put_nowait(event)
        for attached in behind.values():
            if attached.telling is None:
                loop = asyncio.get_running_loop()
                attached.telling = loop.call_later(STATS_LAG_S, self._tell_stats, attached)

    def tell_all(self) -> None:
        """Have every router hear at once what has changed of the worker itself: its role, or that it drains."""
        for attached in self._attached.values():
            attached.queue.put_nowait(self._news_for(attached))

    async def Attach(
        self, request_iterator: AsyncIterator[pb.AttachRequest], context: Context
    ) -> AsyncIterator[pb.AttachEvent]:
        """Stream this worker's tokens and stats to one router until either side is gone."""
        if not self._link.started.is_set():
            await context.abort(grpc.StatusCode.UNAVAILABLE, "this worker's engine is starting")
        first = await anext(request_iterator, None)
        if first is None or not first.hello.router_id:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first message must be a hello with a router_id")
            raise AssertionError("abort returned")
        router = _Attached(first.hello.router_id)
        replaced = self._attached.get(router.router_id)
        if replaced is not None:
            self._detach(replaced)
        self._attached[router.router_id] = router
        watchers = [
            asyncio.create_task(self._hear(request_iterator, router), name="attach-hear"),
            asyncio.create_task(self._end_with_epoch(router), name="attach-epoch"),
        ]
        log.info("router %s attached", router.router_id)
        try:
            yield pb.AttachEvent(
                description=self._link.description,
                stats=self._link.stats,
                draining=self.draining,
                blocks=self._mirror.snapshot(),
                credits=self._shares().get(router.router_id),
            )
            while (event := await self._next_event(router)) is not None:
                yield event
        finally:
            for watcher in watchers:
                watcher.cancel()
            if router.telling is not None:
                router.telling.cancel()
            self._detach(router)
            log.info("router %s detached", router.router_id)

    async def Reserve(self, request: pb.ReserveRequest, context: Context) -> pb.ReserveReply:
        """Promise blocks; refused while draining and for another epoch."""
        if self.draining:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, DRAINING)
        if refusal := self._link.stale(request.epoch):
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, refusal)
        if request.router_id not in self._attached:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"router {request.router_id} is not attached")
        try:
            reply = await self._link.call(pb.EngineCommand(reserve=request), CALL_TIMEOUT_S)
        except EngineGoneError as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        except asyncio.CancelledError:
            asked = request.request
            abort = pb.AbortRequest(request_id=asked.request_id, attempt=asked.attempt, reason="the router cancelled")
            self._link.send(pb.EngineCommand(abort_decode=abort))
            raise
        if reply.WhichOneof("result") == "error":
            await refuse(context, reply.error)
        self._num_promised += 1
        asyncio.get_running_loop().call_soon(_log_reserved, request, reply.reserve)  # once it is on its way
        return reply.reserve

    async def OpenReserve(
        self, request_iterator: AsyncIterator[pb.ReserveRequest], context: Context
    ) -> AsyncIterator[pb.ReserveReply]:
        """Reserve for the one request that is still to come."""
        async for request in request_iterator:
            yield await self.Reserve(request, context)
            return

    async def Adopt(self, request: pb.AdoptRequest, context: Context) -> pb.AdoptReply:
        """Make a router, which is attached, the owner of a resumable request."""
        if refusal := self._link.stale(request.epoch):
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, refusal)
        if request.router_id not in self._attached:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"router {request.router_id} is not attached")
        try:
            reply = await self._link.call(pb.EngineCommand(adopt=request), CALL_TIMEOUT_S)
        except EngineGoneError as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        if reply.WhichOneof("result") == "error":
            await refuse(context, reply.error)
        return reply.adopt

    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortReply:
        """End a request or reservation in any phase."""
        try:
            reply = await self._link.call(pb.EngineCommand(abort_decode=request), ABORT_TIMEOUT_S)
        except EngineGoneError:
            return pb.AbortReply(found=False)
        return reply.abort

    def _detach(self, router: _Attached) -> None:
        """End everything that was asked for by a stream, and the stream behind what is queued."""
        if self._attached.get(router.router_id) is router:
            del self._attached[router.router_id]
            self._link.send(pb.EngineCommand(router_gone=pb.RouterGone(router_id=router.router_id)))
            router.queue.put_nowait(None)

    def _tell_stats(self, router: _Attached) -> None:
        router.telling = None
        if router.queue.empty():  # else it does not read just now, and will hear with what it reads last
            router.queue.put_nowait(self._news_for(router))

    def _news_for(self, router: _Attached) -> pb.AttachEvent:
        return pb.AttachEvent(
            stats=self._link.stats,
            draining=self.draining,
            blocks=router.blocks.take(),
            pair_bytes_per_s=self._link.pair_bytes_per_s,
            role=self._link.description.role,
            credits=self._shares().get(router.router_id),
        )

    def _shares(self) -> dict[str, pb.Credits]:
        """What each router may ask for; whose turn it is to get what is left over changes now and then."""
        stats, num_routers = self._link.stats, len(self._attached)
        if not num_routers:
            return {}
        num_open = self._link.description.max_running - stats.free_places
        usual = (stats.num_blocks - stats.unpromised_blocks) / num_open if num_open > 0 else 1.0
        turn = int(time.monotonic() / TURN_S)
        places = max(0, stats.free_places - self._num_promised)
        shares = share_out(places, stats.unpromised_blocks, usual, num_routers, turn)
        return {
            name: pb.Credits(requests=share.requests, blocks=share.blocks)
            for name, share in zip(self._attached, shares, strict=True)
        }

    async def _next_event(self, router: _Attached) -> pb.AttachEvent | None:
        """The next step's tokens, or the stats when there are none for a while; None at the end."""
        try:
            async with asyncio.timeout(STATS_PERIOD_S):
                return await router.queue.get()
        except TimeoutError:
            return self._news_for(router)

    async def _hear(self, requests: AsyncIterator[pb.AttachRequest], router: _Attached) -> None:
        """Renew the router's leases with each heartbeat, tell it anew what it missed; end the stream when they stop."""
        renew = pb.EngineCommand(renew=pb.RenewLeases(router_id=router.router_id))
        with contextlib.suppress(TimeoutError, StopAsyncIteration, grpc.aio.AioRpcError):
            while True:
                async with asyncio.timeout(ROUTER_SILENCE_S):
                    heartbeat = (await anext(requests)).heartbeat
                self._link.send(renew)
                if heartbeat.wants_blocks:
                    router.blocks.add(self._mirror.snapshot())
        self._detach(router)

    async def _end_with_epoch(self, router: _Attached) -> None:
        await self._link.lost.wait()
        self._detach(router)


def _log_reserved(asked: pb.ReserveRequest, reply: pb.ReserveReply) -> None:
    log.info(
        "reserved",
        extra={
            "request_id": asked.request.request_id,
            "attempt": asked.request.attempt,
            "local_prefill": asked.local_prefill,
            "cached_tokens": reply.cached_tokens,
        },
    )
