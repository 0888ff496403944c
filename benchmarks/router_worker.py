"""Workers without a model, one process: they speak pdserve.v1 DecodeWorker and PrefillWorker and answer at once.

Each worker listens on a port of its own. A step's event has one token for each of its running streams, as of a real
worker. How steps follow each other is set by a `Pace`.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import grpc

from protos import worker_pb2 as pb
from protos import worker_pb2_grpc

FIRST_TOKEN_ID, NUM_TOKEN_IDS = 64, 26
"""Letters of the benchmark's tokenizer."""
STATS_PERIOD_S = 0.5
Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How steps follow each other at each worker."""

    num_streams: int = 0
    """No step before so many run, at all of them; 0: each request has steps of its own, at once."""
    step_s: float = 0.0
    """Between two steps; 0: as soon as the clients have the tokens of the step `window` before."""
    window: int = 2
    hold: bool = False
    """One token each, then nothing."""


@dataclass(slots=True)
class Running:
    """A request in the decode craft."""

    asked: pb.EngineRequest
    router_id: str
    known: int = 0
    """Tokens generated so far."""


@dataclass
class Attached:
    """A router's stream: what is to be said, and when each step's event was."""

    queue: asyncio.Queue[pb.AttachEvent] = field(default_factory=asyncio.Queue)
    sent_at: list[float] = field(default_factory=list)
    """Of each event with tokens since the pace was set, on the system's monotonic clock."""


class Worker:
    """One of them; `peers` are all, by id, and `came` is set when one of them has a new request."""

    def __init__(self, worker_id: str, role: str, peers: dict[str, Worker], came: asyncio.Event) -> None:
        self.worker_id = worker_id
        self.role = role
        self.pace = Pace()
        self.routers: dict[str, Attached] = {}
        self.running: dict[str, Running] = {}
        self.peers = peers
        self.credit = asyncio.Semaphore(0)
        """Steps that may be taken, where the clients set the pace."""
        self._came = came
        peers[worker_id] = self

    async def start(self) -> str:
        """Listen; gives host:port."""
        self._server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
        worker_pb2_grpc.add_DecodeWorkerServicer_to_server(Decode(self), self._server)  # type: ignore[no-untyped-call]
        worker_pb2_grpc.add_PrefillWorkerServicer_to_server(Prefill(self), self._server)  # type: ignore[no-untyped-call]
        port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        return f"127.0.0.1:{port}"

    def set_pace(self, pace: Pace) -> None:
        """Begin anew at this pace; nothing may run."""
        assert not self.running, f"{len(self.running)} requests run at {self.worker_id}"
        self.pace, self.credit = pace, asyncio.Semaphore(pace.window)
        for attached in self.routers.values():
            attached.sent_at.clear()

    async def steps(self, phase: float) -> None:
        """All steps of what runs; the first is due after so much of a step."""
        due = time.monotonic() + (phase - 1) * self.pace.step_s
        while self.running:
            due += self.pace.step_s
            if not self.pace.step_s:
                await self.credit.acquire()
            elif (left_s := due - time.monotonic()) > 0:
                await asyncio.sleep(left_s)
            self._step()

    async def stop(self) -> None:
        """Give the port back."""
        await self._server.stop(None)

    def begin(self, running: Running) -> None:
        """The prompt is computed: generate."""
        self.running[running.asked.request_id] = running
        self._came.set()
        if not self.pace.num_streams:
            while self.running.get(running.asked.request_id) is running:
                self._say(running.router_id, [self._next(running)])
                if self.pace.hold:
                    break

    def _step(self) -> None:
        outputs: dict[str, list[pb.TokenOutput]] = {}
        for running in list(self.running.values()):
            outputs.setdefault(running.router_id, []).append(self._next(running))
        for router_id, of_router in outputs.items():
            self._say(router_id, of_router)

    def _next(self, running: Running) -> pb.TokenOutput:
        asked, offset = running.asked, running.known
        running.known += 1
        is_last = running.known >= asked.params.max_tokens
        if is_last:
            del self.running[asked.request_id]
        return pb.TokenOutput(
            request_id=asked.request_id,
            attempt=asked.attempt,
            offset=offset,
            token_ids=(FIRST_TOKEN_ID + offset % NUM_TOKEN_IDS,),
            finish=pb.ENGINE_FINISH_LENGTH if is_last else pb.ENGINE_FINISH_NONE,
        )

    def _say(self, router_id: str, outputs: list[pb.TokenOutput]) -> None:
        if (attached := self.routers.get(router_id)) is not None:
            attached.queue.put_nowait(pb.AttachEvent(outputs=outputs, stats=self.stats()))

    def stats(self) -> pb.WorkerStats:
        """What it says of itself: there is always room."""
        num = len(self.running)
        return pb.WorkerStats(num_running=num, num_blocks=1 << 20, free_blocks=(1 << 20) - num)

    def description(self) -> pb.WorkerDescription:
        """Of a worker that holds whatever it is asked to."""
        layout = pb.Layout(model_hash="m", num_layers=2, block_size=16, num_kv_heads=1, head_dim=8, dtype="float32")
        return pb.WorkerDescription(
            identity=pb.WorkerIdentity(worker_id=self.worker_id, epoch=1),
            role=self.role,
            layout=layout,
            num_blocks=1 << 20,
            max_model_len=1 << 20,
            max_running=1 << 12,
        )


class Decode(worker_pb2_grpc.DecodeWorkerServicer):
    """The decode craft of a worker."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    async def Attach(self, request_iterator: AsyncIterator[pb.AttachRequest], context: Context) -> None:
        """A router's stream."""
        worker = self._worker
        router_id = (await anext(request_iterator)).hello.router_id
        attached = worker.routers[router_id] = Attached()
        await context.write(pb.AttachEvent(description=worker.description(), stats=worker.stats()))
        while True:
            try:
                async with asyncio.timeout(STATS_PERIOD_S):
                    event = await attached.queue.get()
            except TimeoutError:
                event = pb.AttachEvent(stats=worker.stats())
            if event.outputs and worker.pace.num_streams:
                attached.sent_at.append(time.monotonic())
            await context.write(event)

    async def Reserve(self, request: pb.ReserveRequest, context: Context) -> pb.ReserveReply:
        """Always granted."""
        asked, worker = request.request, self._worker
        running = Running(asked, request.router_id)
        if request.local_prefill:
            asyncio.get_running_loop().call_soon(worker.begin, running)
            return pb.ReserveReply()
        running.known = 1  # the prompt's token comes from the prefill worker
        worker.running[asked.request_id] = running
        receiver = pb.WorkerIdentity(worker_id=worker.worker_id, epoch=1)
        ticket = pb.KVTicket(ticket_id=asked.request_id, request_id=asked.request_id, receiver=receiver)
        return pb.ReserveReply(ticket=ticket)

    async def OpenReserve(
        self, request_iterator: AsyncIterator[pb.ReserveRequest], context: Context
    ) -> AsyncIterator[pb.ReserveReply]:
        """The same, in a call opened before."""
        async for request in request_iterator:
            yield await self.Reserve(request, context)
            return

    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortReply:
        """End a request."""
        return pb.AbortReply(found=self._worker.running.pop(request.request_id, None) is not None)


class Prefill(worker_pb2_grpc.PrefillWorkerServicer):
    """The prefill craft of a worker: a prompt takes no time, and its KV is home at once."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    async def Meet(self, request: pb.MeetRequest, context: Context) -> pb.MeetReply:
        """They have met."""
        return pb.MeetReply()

    async def Prefill(self, request: pb.PrefillRequest, context: Context) -> pb.PrefillReply:
        """The first token, at once."""
        asked = request.request
        decode = self._worker.peers[request.ticket.receiver.worker_id]
        if (running := decode.running.get(asked.request_id)) is not None:
            asyncio.get_running_loop().call_soon(decode.begin, running)
        first = pb.TokenOutput(request_id=asked.request_id, attempt=asked.attempt, token_ids=(FIRST_TOKEN_ID,))
        return pb.PrefillReply(first=first)

    async def OpenPrefill(
        self, request_iterator: AsyncIterator[pb.PrefillRequest], context: Context
    ) -> AsyncIterator[pb.PrefillReply]:
        """The same, in a call opened before."""
        async for request in request_iterator:
            if not request.HasField("ticket"):
                rest = await anext(request_iterator, None)
                if rest is None:
                    return
                request.MergeFrom(rest)
            yield await self.Prefill(request, context)
            return

    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortReply:
        """Nothing is computed."""
        return pb.AbortReply()


class WorkersSide:
    """All workers of a measurement, in one process."""

    def __init__(self, roles: dict[str, str], credits: Connection) -> None:
        """Each byte of `credits` lets every worker take a step."""
        self._roles = roles
        self._credits = credits
        self._peers: dict[str, Worker] = {}
        self._came = asyncio.Event()
        self._stepping: asyncio.Task[None] | None = None

    async def start(self) -> dict[str, str]:
        """Have all listen; gives addresses by id."""
        asyncio.get_running_loop().add_reader(self._credits.fileno(), self._hear)
        os.set_blocking(self._credits.fileno(), True)  # which uvloop ends: a message is read whole
        return {name: await Worker(name, role, self._peers, self._came).start() for name, role in self._roles.items()}

    async def set_pace(self, pace: Pace) -> None:
        """Begin anew; nothing may run."""
        await self._rest()
        for worker in self._peers.values():
            worker.set_pace(pace)
        if pace.num_streams:
            self._stepping = asyncio.create_task(self._steps(pace.num_streams))

    async def sent_at(self) -> dict[tuple[str, str], list[float]]:
        """By (worker, router): when each step's event was sent."""
        return {
            (name, router_id): attached.sent_at
            for name, worker in self._peers.items()
            for router_id, attached in worker.routers.items()
        }

    async def stop(self) -> None:
        """Give all ports back."""
        await self._rest()
        for worker in self._peers.values():
            await worker.stop()

    async def _steps(self, num_streams: int) -> None:
        workers = list(self._peers.values())
        while sum(len(worker.running) for worker in workers) < num_streams:
            self._came.clear()
            await self._came.wait()
        await asyncio.gather(*(worker.steps(index / len(workers)) for index, worker in enumerate(workers)))

    async def _rest(self) -> None:
        if self._stepping is not None:
            self._stepping.cancel()
            await asyncio.gather(self._stepping, return_exceptions=True)

    def _hear(self) -> None:
        for _ in self._credits.recv_bytes():
            for worker in self._peers.values():
                worker.credit.release()
