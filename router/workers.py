"""The connection to one life of one worker: a channel, a long-lived Attach stream, and its calls.

The stream starts with the worker's description (STARTING or LOST -> READY); heartbeats go up, tokens and
statistics come down. When it ends, or the worker is silent for `worker_silence_s`, everything this router
has there is over: each inbox gets a WorkerLostError, the channel is closed (which ends the calls in
flight), and a new connection is tried with growing pauses until `stop`.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

import grpc

from protos import worker_pb2, worker_pb2_grpc
from protos.auth import WORKER_METADATA_KEY
from router.background import cancel
from router.config import RouterConfig
from router.errors import AttemptFailedError, InvalidArgumentError, WorkerFullError, WorkerLostError
from router.inbox import Inbox
from router.info import WorkerInfo, WorkerState
from router.open_calls import OpenCalls
from router.prefix_index import PrefixIndex
from router.store import WorkerRecord

logger = logging.getLogger(__name__)
R = TypeVar("R")

AttachCall = grpc.aio.StreamStreamCall[worker_pb2.AttachRequest, worker_pb2.AttachEvent]

FIRST_PAUSE_S = 0.05
"""Before the second attempt to connect; it doubles from there."""
NEWS_INTERVAL_S = 0.5
"""Those who wait for room try this often even if a worker's statistics show none."""
CHANNEL_OPTIONS = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
    ("grpc.max_send_message_length", 64 * 1024 * 1024),
)


class WorkerLink:
    """Follows one worker; `info` is what the policies see."""

    def __init__(
        self,
        record: WorkerRecord,
        config: RouterConfig,
        *,
        router_id: str,
        worker_key: str,
        on_change: Callable[[], None],
        on_room: Callable[[], None],
        prefixes: PrefixIndex,
    ) -> None:
        self.info = WorkerInfo(record.worker_id, record.epoch, record.role, record.address, record.pool)
        self._config = config
        self._router_id = router_id
        self._metadata = ((WORKER_METADATA_KEY, worker_key),)
        self._on_change = on_change
        self._on_room = on_room
        self._prefixes = prefixes
        self._wants_blocks = False
        """Whether block events were missed."""
        self._inboxes: dict[str, Inbox] = {}
        self._next_news_at = 0.0
        self._task: asyncio.Task[None] | None = None
        self._leaving = False
        self._decode: worker_pb2_grpc.DecodeWorkerStub | None = None
        self._prefill: worker_pb2_grpc.PrefillWorkerStub | None = None
        self._reserves: OpenCalls[worker_pb2.ReserveRequest, worker_pb2.ReserveReply] | None = None
        self._prefills: OpenCalls[worker_pb2.PrefillRequest, worker_pb2.PrefillReply] | None = None

    def start(self) -> None:
        """Begin to connect."""
        self._task = asyncio.get_running_loop().create_task(self._run(), name=f"worker {self.info.label}")

    async def stop(self) -> None:
        """Close the connection for good; whatever runs there is lost."""
        self._leaving = True
        if self._task is not None:
            await cancel([self._task])

    @property
    def num_inboxes(self) -> int:
        """Requests that are followed here."""
        return len(self._inboxes)

    # What a dispatcher calls.

    def register(self, inbox: Inbox) -> None:
        """Deliver this request's outputs, and the loss of the worker, to its inbox."""
        if not self.info.connected:
            raise WorkerLostError(f"worker {self.info.label} is {self.info.state.value}", worker=self.info.life)
        self._inboxes[inbox.request_id] = inbox

    def unregister(self, inbox: Inbox) -> None:
        """Deliver nothing more."""
        if self._inboxes.get(inbox.request_id) is inbox:
            del self._inboxes[inbox.request_id]

    async def reserve(self, request: worker_pb2.ReserveRequest) -> worker_pb2.ReserveReply:
        """Ask for blocks; WorkerFullError, AttemptFailedError or InvalidArgumentError if there are none to be had."""
        asked = request.request
        num_tokens, had = len(asked.prompt_token_ids) + len(asked.resume_from) + 1, len(asked.resume_from)
        with self.info.credit.asking(self.info.blocks_for(num_tokens, asked.params.max_tokens - had)):
            asking = self._connected(self._reserves).ask(request, self._config.reserve_timeout_s)
            return await self._answer("Reserve", asking)

    async def prefill(
        self, request: worker_pb2.PrefillRequest, ticket: asyncio.Future[worker_pb2.PrefillRequest]
    ) -> worker_pb2.PrefillReply:
        """Have the prompt computed; errors as for `reserve`. Bounded by the request's own deadline.

        `ticket` has the rest of the request, its ticket, once there is one.
        """
        asking = self._connected(self._prefills).ask(request, request.request.deadline_s + 1.0, ticket)
        return await self._answer("Prefill", asking)

    async def meet(self, request: worker_pb2.MeetRequest) -> None:
        """Have it begin the pair to a worker; errors as for `reserve`."""
        stub = self._connected(self._prefill)
        await self._answer("Meet", stub.Meet(request, timeout=self._config.connect_timeout_s, metadata=self._metadata))

    async def adopt(self, request: worker_pb2.AdoptRequest) -> bool:
        """Become the owner of a resumable request there, if it is there; errors as for `reserve`."""
        stub = self._connected(self._decode)
        calling = stub.Adopt(request, timeout=self._config.reserve_timeout_s, metadata=self._metadata)
        return bool((await self._answer("Adopt", calling)).found)

    async def abort(self, request: worker_pb2.AbortRequest, *, decode: bool) -> None:
        """End a request in one craft. A worker that cannot be reached ends it by itself: its stream is down."""
        stub = self._decode if decode else self._prefill
        if stub is None:
            return
        try:
            await self._answer(
                "Abort", stub.Abort(request, timeout=self._config.abort_timeout_s, metadata=self._metadata)
            )
        except (AttemptFailedError, WorkerFullError, InvalidArgumentError) as error:
            logger.warning("abort was not confirmed: %s", error, extra={"request_id": request.request_id})
        self._on_room()

    # The life of the connection.

    async def _run(self) -> None:
        pause_s = FIRST_PAUSE_S
        while True:
            made_before = self.info.connection
            async with grpc.aio.insecure_channel(self.info.address, options=CHANNEL_OPTIONS) as channel:
                await self._attach(channel)
            came = self.info.connection > made_before
            pause_s = FIRST_PAUSE_S if came else min(2 * pause_s, self._config.reconnect_max_s)
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))

    async def _attach(self, channel: grpc.aio.Channel) -> None:
        """One connection from hello to loss."""
        self._decode = decode = worker_pb2_grpc.DecodeWorkerStub(channel)  # type: ignore[no-untyped-call]
        self._prefill = prefill = worker_pb2_grpc.PrefillWorkerStub(channel)  # type: ignore[no-untyped-call]
        self._reserves = reserves = OpenCalls(
            lambda: decode.OpenReserve(metadata=self._metadata),
            lambda request, limit_s: decode.Reserve(request, timeout=limit_s, metadata=self._metadata),
        )
        self._prefills = prefills = OpenCalls(
            lambda: prefill.OpenPrefill(metadata=self._metadata),
            lambda request, limit_s: prefill.Prefill(request, timeout=limit_s, metadata=self._metadata),
        )
        why = "this router left it"
        try:
            await self._converse(self._decode.Attach(metadata=self._metadata))
        except WorkerLostError as error:
            why = str(error)
        except TimeoutError:
            limit_s = self._config.worker_silence_s if self.info.connected else self._config.connect_timeout_s
            why = f"it said nothing for {limit_s:g} s"
        except grpc.aio.AioRpcError as error:
            why = f"its stream ended with {error.code().name}: {error.details()}"
        finally:
            reserves.close()
            prefills.close()
            self._decode = self._prefill = self._reserves = self._prefills = None
            self._lose(why)

    async def _converse(self, stream: AttachCall) -> None:
        """Read what the worker says, and send heartbeats, until either ends."""
        loop = asyncio.get_running_loop()
        hello = worker_pb2.AttachHello(router_id=self._router_id)
        async with asyncio.timeout(self._config.connect_timeout_s) as limit:
            await stream.write(worker_pb2.AttachRequest(hello=hello))
            self._describe(await stream.read())
            self._connected(self._reserves).fill()
            self._connected(self._prefills).fill()
            heart = loop.create_task(self._beat(stream), name=f"heartbeat to {self.info.label}")
            try:
                while True:
                    limit.reschedule(loop.time() + self._config.worker_silence_s)
                    self._deliver(await stream.read())
            finally:
                heart.cancel()

    async def _beat(self, stream: AttachCall) -> None:
        """Send heartbeats until the stream ends, which its reader notices."""
        while not stream.done():
            await asyncio.sleep(self._config.heartbeat_s)
            wants_blocks, self._wants_blocks = self._wants_blocks, False
            try:
                await stream.write(worker_pb2.AttachRequest(heartbeat=worker_pb2.Heartbeat(wants_blocks=wants_blocks)))
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                return

    def _describe(self, event: object) -> None:
        if not isinstance(event, worker_pb2.AttachEvent) or not event.HasField("description"):
            raise WorkerLostError("its stream did not begin with a description")
        identity = event.description.identity
        if identity.worker_id != self.info.worker_id or identity.epoch != self.info.epoch:
            raise WorkerLostError(
                f"{self.info.address} is {identity.worker_id}/{identity.epoch}, not {self.info.label}"
            )
        self.info.description = event.description
        self.info.role = event.description.role or self.info.role
        self.info.connection += 1
        self.info.state = WorkerState.READY
        logger.info("worker is ready", extra={"worker": self.info.label, "role": self.info.role})
        self._deliver(event)
        self._on_change()

    def _deliver(self, event: object) -> None:
        if not isinstance(event, worker_pb2.AttachEvent):  # grpc.aio.EOF
            raise WorkerLostError("it ended its stream")
        inboxes = self._inboxes
        for output in event.outputs:
            inbox = inboxes.get(output.request_id)
            if inbox is not None:
                inbox.put_output(output)
        if event.HasField("credits"):
            self.info.credit.tell(event.credits)
        if event.HasField("stats"):
            self._learn(event.stats)
        if event.HasField("blocks") and not self._prefixes.apply(self.info, event.blocks):
            if not self._wants_blocks:
                logger.info("block events are missing: asking for all", extra={"worker": self.info.label})
            self._wants_blocks = True
        self.info.pair_bytes_per_s = event.pair_bytes_per_s or self.info.pair_bytes_per_s
        if event.role and event.role != self.info.role:
            logger.info("worker has a new role", extra={"worker": self.info.label, "role": event.role})
            self.info.role = event.role
            self._on_change()
        if event.draining and self.info.state is WorkerState.READY:
            self.info.state = WorkerState.DRAINING
            self._on_change()

    def _learn(self, stats: worker_pb2.WorkerStats) -> None:
        """Keep the statistics; wake those who wait for room if there is more than before, or now and then."""
        old, self.info.stats = self.info.stats, stats
        now = asyncio.get_running_loop().time()
        if stats.free_blocks > old.free_blocks or _num_held(stats) < _num_held(old) or now > self._next_news_at:
            self._next_news_at = now + NEWS_INTERVAL_S
            self._on_room()

    def _lose(self, why: str) -> None:
        """The connection is over: tell everybody who has a request there."""
        if not self.info.connected:
            logger.debug("no connection: %s", why, extra={"worker": self.info.label})
            return
        self.info.state = WorkerState.LOST
        self._prefixes.forget(self.info)
        self.info.stats = worker_pb2.WorkerStats()
        self.info.credit.tell(None)
        inboxes, self._inboxes = self._inboxes, {}
        level = logging.INFO if self._leaving else logging.WARNING
        logger.log(level, "worker lost: %s", why, extra={"worker": self.info.label, "num_requests": len(inboxes)})
        for inbox in inboxes.values():
            inbox.put(WorkerLostError(f"worker {self.info.label} was lost: {why}", worker=self.info.life))
        self._on_change()

    def _connected(self, stub: R | None) -> R:
        if stub is None:
            raise WorkerLostError(f"worker {self.info.label} is not connected", worker=self.info.life)
        return stub

    async def _answer(self, what: str, call: Awaitable[R]) -> R:
        """Await a call; the one place where a worker's status becomes an error of the router."""
        life = self.info.life
        try:
            return await call
        except TimeoutError as error:
            raise AttemptFailedError(f"worker {self.info.label} did not answer {what} in time", worker=life) from error
        except grpc.aio.AioRpcError as error:
            told = _told(self.info.label, what, error)
            if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise WorkerFullError(told, worker=life) from error
            if error.code() is grpc.StatusCode.INVALID_ARGUMENT:
                raise InvalidArgumentError(error.details() or told, field="request") from error
            raise AttemptFailedError(told, worker=life) from error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # Nobody cancelled this task: the channel was closed under the call.
            raise WorkerLostError(f"worker {self.info.label} was lost during {what}", worker=life) from None


def _num_held(stats: worker_pb2.WorkerStats) -> int:
    return stats.num_running + stats.num_waiting + stats.num_reserved


def _told(label: str, what: str, error: grpc.aio.AioRpcError) -> str:
    return f"worker {label} answered {what} with {error.code().name}: {error.details()}"
