"""A worker without a model: both gRPC services for real, tokens from a formula, misbehaviour on demand."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc

from protos import worker_pb2, worker_pb2_grpc
from protos.auth import WORKER_METADATA_KEY, same_key, worker_key
from router.store import FleetStore, Role, WorkerRecord

SECRET = b"a secret of the tests"
BLOCK_SIZE = 16
VOCAB_SIZE = 300
FIRST_TOKEN_ID = 40


def expected_token(prompt: list[int], position: int) -> int:
    """The token at a position of the answer to a prompt: printable letters of the tests' tokenizer."""
    return FIRST_TOKEN_ID + (sum(prompt) * 7 + position * position * 5 + position) % 26


def expected_answer(prompt: list[int], num: int) -> list[int]:
    return [expected_token(prompt, position) for position in range(num)]


@dataclass(kw_only=True)
class Behaviour:
    """What a fake worker does; may be changed while it runs."""

    step_s: float = 0.002
    prefill_s: float = 0.0
    reserve_s: float = 0.0
    answer_s: float = 0.0
    """From the reservation to the answer that tells of it."""
    capacity: int = 1000
    """Requests at a time; more get RESOURCE_EXHAUSTED."""
    prefill_capacity: int = 1000
    refuses_to_meet: bool = False
    eos_at: int | None = None
    """The answer's token at this position ends it."""
    fail_at: int | None = None
    """Answers FAILED instead of the token at this position, once."""
    preempt_at: set[int] = field(default_factory=set)
    """Gives the request back instead of the token at one of these positions, once each."""
    hand_back_at: set[int] = field(default_factory=set)
    """The same, for it leaves."""
    refuses_as_draining: bool = False
    """Takes nothing, and says why, although it has not told that it drains."""
    unavailable: bool = False
    silent: bool = False
    """Like a stopped process: connections stay, nothing is said."""
    has_ticket_before: bool = False
    """The decode worker brings the ticket as soon as it has reserved: nothing waits for the router's."""
    prompt_tokens_per_s: float = 0.0
    """What it says of itself."""
    credits: Callable[[str], worker_pb2.Credits | None] = lambda router_id: None
    """What it says it can take of a router; None: nothing."""
    repeat: bool = False
    """Says each token twice."""


@dataclass
class Running:
    """A request in the decode craft."""

    request: worker_pb2.EngineRequest
    router_id: str
    local: bool
    known: int
    """Tokens generated so far, by earlier attempts too."""
    ready: bool
    first_output: bool = True


@dataclass
class FakeWorker:
    """One life of a worker; `peers` stands for the control connections of pairs."""

    worker_id: str
    role: Role
    store: FleetStore
    peers: dict[str, FakeWorker]
    behaviour: Behaviour = field(default_factory=Behaviour)
    num_blocks: int = 1000
    max_model_len: int = 4096
    epoch: int = 0
    aborts: list[tuple[str, str, int]] = field(default_factory=list)
    """(craft, request_id, attempt)."""
    reserved: list[str] = field(default_factory=list)
    prefilled: list[str] = field(default_factory=list)
    waiting: set[str] = field(default_factory=set)
    """Prompts whose ticket is to follow."""
    received: list[worker_pb2.EngineRequest] = field(default_factory=list)
    met: list[worker_pb2.MeetRequest] = field(default_factory=list)
    model_hash: str = "tiny"
    num_asked: int = 0
    num_refused: int = 0
    """Reserves."""

    async def start(self) -> None:
        self.epoch = await self.store.next_epoch(self.worker_id)
        self.running: dict[str, Running] = {}
        self.prefilling: set[str] = set()
        self.routers: dict[str, asyncio.Queue[worker_pb2.AttachEvent]] = {}
        self.server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
        worker_pb2_grpc.add_DecodeWorkerServicer_to_server(_DecodeService(self), self.server)
        worker_pb2_grpc.add_PrefillWorkerServicer_to_server(_PrefillService(self), self.server)
        port = self.server.add_insecure_port("127.0.0.1:0")
        await self.server.start()
        self.stepper = asyncio.create_task(self._steps())
        self.address = f"127.0.0.1:{port}"
        self.peers[self.worker_id] = self
        record = WorkerRecord(worker_id=self.worker_id, epoch=self.epoch, role=self.role, address=self.address)
        await self.store.register(record, 3600.0)

    async def kill(self) -> None:
        """Like kill -9: connections end, the store still lists it."""
        self.stepper.cancel()
        await asyncio.gather(self.stepper, return_exceptions=True)
        self.running.clear()
        await self.server.stop(None)

    async def stop(self) -> None:
        await self.kill()
        await self.store.deregister(self.worker_id, self.epoch)

    def description(self) -> worker_pb2.WorkerDescription:
        layout = worker_pb2.Layout(
            model_hash=self.model_hash,
            num_layers=2,
            block_size=BLOCK_SIZE,
            num_kv_heads=1,
            head_dim=8,
            dtype="float32",
            tp_size=1,
        )
        return worker_pb2.WorkerDescription(
            identity=worker_pb2.WorkerIdentity(worker_id=self.worker_id, epoch=self.epoch),
            role=self.role,
            layout=layout,
            num_blocks=self.num_blocks,
            max_model_len=self.max_model_len,
            max_running=64,
            vocab_size=VOCAB_SIZE,
            control_addresses=[f"control of {self.worker_id}"],
        )

    def stats(self) -> worker_pb2.WorkerStats:
        return worker_pb2.WorkerStats(
            num_running=len(self.running),
            num_blocks=self.num_blocks,
            free_blocks=self.num_blocks - len(self.running),
            prompt_tokens_per_s=self.behaviour.prompt_tokens_per_s,
        )

    def say(self, router_id: str, event: worker_pb2.AttachEvent) -> None:
        if (credits := self.behaviour.credits(router_id)) is not None:
            event.credits.CopyFrom(credits)
        if not self.behaviour.silent and router_id in self.routers:
            self.routers[router_id].put_nowait(event)

    def drain(self) -> None:
        for router_id in self.routers:
            self.say(router_id, worker_pb2.AttachEvent(draining=True))

    def set_role(self, role: Role) -> None:
        self.role = role
        for router_id in self.routers:
            self.say(router_id, worker_pb2.AttachEvent(role=role))

    def first_token_came(self, request_id: str, attempt: int) -> None:
        """What the last announcement on the control connection brings."""
        running = self.running.get(request_id)
        if running is not None and running.request.attempt == attempt and not self.behaviour.silent:
            running.known += 1
            running.ready = True

    def output(self, request: worker_pb2.EngineRequest, offset: int) -> worker_pb2.TokenOutput:
        """The token at an offset, with its end if it is the last."""
        token_id = expected_token(list(request.prompt_token_ids), offset)
        finish = worker_pb2.ENGINE_FINISH_NONE
        if self.behaviour.eos_at == offset and not request.params.ignore_eos:
            finish = worker_pb2.ENGINE_FINISH_EOS
        elif token_id in request.params.stop_token_ids:
            finish = worker_pb2.ENGINE_FINISH_STOP
        elif offset + 1 >= request.params.max_tokens:
            finish = worker_pb2.ENGINE_FINISH_LENGTH
        return worker_pb2.TokenOutput(
            request_id=request.request_id, attempt=request.attempt, offset=offset, token_ids=[token_id], finish=finish
        )

    async def _steps(self) -> None:
        """One message per step and router, with a token of each running request."""
        while True:
            await asyncio.sleep(self.behaviour.step_s)
            if self.behaviour.silent:
                continue
            outputs: dict[str, list[worker_pb2.TokenOutput]] = {}
            for running in list(self.running.values()):
                if running.ready:
                    outputs.setdefault(running.router_id, []).extend(self._step(running))
            for router_id, said in outputs.items():
                self.say(router_id, worker_pb2.AttachEvent(outputs=said, stats=self.stats()))

    def _step(self, running: Running) -> list[worker_pb2.TokenOutput]:
        request = running.request
        if self.behaviour.fail_at == running.known:
            self.behaviour.fail_at = None
            del self.running[request.request_id]
            failed = worker_pb2.ENGINE_FINISH_FAILED
            return [
                worker_pb2.TokenOutput(
                    request_id=request.request_id,
                    attempt=request.attempt,
                    finish=failed,
                    reason="told to",
                    offset=running.known,
                )
            ]
        for positions, finish in (
            (self.behaviour.preempt_at, worker_pb2.ENGINE_FINISH_PREEMPTED),
            (self.behaviour.hand_back_at, worker_pb2.ENGINE_FINISH_HANDED_BACK),
        ):
            if running.known in positions:
                positions.discard(running.known)
                del self.running[request.request_id]
                return [
                    worker_pb2.TokenOutput(
                        request_id=request.request_id, attempt=request.attempt, finish=finish, offset=running.known
                    )
                ]
        output = self.output(request, running.known)
        if running.first_output:
            running.first_output = False
            timing = worker_pb2.DecodeTiming(transfer_busy_s=0.001, transfer_bytes=512, first_step_s=0.001)
            if running.local:
                timing = worker_pb2.DecodeTiming(queue_s=0.001, prefill_s=self.behaviour.prefill_s)
            output.timing.CopyFrom(timing)
        running.known += 1
        if output.finish:
            del self.running[request.request_id]
        return [output, output] if self.behaviour.repeat else [output]


class _Service:
    def __init__(self, worker: FakeWorker) -> None:
        self.worker = worker

    async def enter(self, context, epoch: int | None = None) -> None:
        shown = dict(context.invocation_metadata()).get(WORKER_METADATA_KEY, "")
        if not same_key(shown, worker_key(SECRET)):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "wrong worker key")
        if self.worker.behaviour.silent:
            await asyncio.Event().wait()
        if self.worker.behaviour.unavailable:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "told to")
        if epoch is not None and self.worker.behaviour.refuses_as_draining:
            self.worker.num_refused += 1
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "this worker is draining")
        if epoch is not None and epoch != self.worker.epoch:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"this is epoch {self.worker.epoch}")


class _DecodeService(_Service, worker_pb2_grpc.DecodeWorkerServicer):
    async def Attach(self, request_iterator, context):
        await self.enter(context)
        worker = self.worker
        hello = await anext(aiter(request_iterator))
        router_id = hello.hello.router_id
        queue = worker.routers[router_id] = asyncio.Queue()
        try:
            await context.write(worker_pb2.AttachEvent(description=worker.description(), stats=worker.stats()))
            while True:
                try:
                    async with asyncio.timeout(0.2):
                        event = await queue.get()
                except TimeoutError:
                    event = worker_pb2.AttachEvent(stats=worker.stats(), credits=worker.behaviour.credits(router_id))
                if not worker.behaviour.silent:
                    await context.write(event)
        finally:
            if worker.routers.get(router_id) is queue:
                del worker.routers[router_id]
                for request_id, running in list(worker.running.items()):
                    if running.router_id == router_id:
                        del worker.running[request_id]

    async def OpenReserve(self, request_iterator, context):
        async for request in request_iterator:
            yield await self.Reserve(request, context)
            return

    async def Reserve(self, request, context):
        await self.enter(context, request.epoch)
        worker, asked = self.worker, request.request
        await asyncio.sleep(worker.behaviour.reserve_s)
        worker.num_asked += 1
        if len(worker.running) >= worker.behaviour.capacity:
            worker.num_refused += 1
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "no room")
        worker.reserved.append(asked.request_id)
        worker.received.append(asked)
        running = Running(asked, request.router_id, request.local_prefill, len(asked.resume_from), False)
        worker.running[asked.request_id] = running
        await asyncio.sleep(worker.behaviour.answer_s)
        if request.local_prefill:
            asyncio.get_running_loop().call_later(worker.behaviour.prefill_s, setattr, running, "ready", True)
            return worker_pb2.ReserveReply()
        identity = worker_pb2.WorkerIdentity(worker_id=worker.worker_id, epoch=worker.epoch)
        ticket = worker_pb2.KVTicket(
            ticket_id=f"{asked.request_id}:{asked.attempt}",
            request_id=asked.request_id,
            attempt=asked.attempt,
            receiver=identity,
        )
        return worker_pb2.ReserveReply(ticket=ticket)

    async def Abort(self, request, context):
        await self.enter(context)
        self.worker.aborts.append(("decode", request.request_id, request.attempt))
        running = self.worker.running.get(request.request_id)
        found = running is not None and running.request.attempt <= request.attempt
        if found:
            del self.worker.running[request.request_id]
        return worker_pb2.AbortReply(found=found)


class _PrefillService(_Service, worker_pb2_grpc.PrefillWorkerServicer):
    async def Meet(self, request, context):
        self.worker.met.append(request)
        await self.enter(context, request.epoch)
        if self.worker.behaviour.refuses_to_meet:
            await context.abort(grpc.StatusCode.INTERNAL, "told to")
        return worker_pb2.MeetReply()

    async def OpenPrefill(self, request_iterator, context):
        async for request in request_iterator:
            if self.worker.behaviour.has_ticket_before:
                request.ticket.receiver.CopyFrom(request.receiver)
                decode = self.worker.peers[request.receiver.worker_id]
                name, behaviour = request.request.request_id, self.worker.behaviour
                while not (name in decode.running or behaviour.unavailable):  # noqa: ASYNC110
                    await asyncio.sleep(0.001)
                yield await self.Prefill(request, context)
                return
            self.worker.waiting.add(request.request.request_id)
            try:
                rest = None if request.HasField("ticket") else await anext(request_iterator, None)
            finally:
                self.worker.waiting.discard(request.request.request_id)
            if rest is not None:
                request.MergeFrom(rest)
            if not request.HasField("ticket"):
                return
            yield await self.Prefill(request, context)
            return

    async def Prefill(self, request, context):
        await self.enter(context, request.epoch)
        worker, asked = self.worker, request.request
        if len(worker.prefilling) >= worker.behaviour.prefill_capacity:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "no room")
        worker.prefilling.add(asked.request_id)
        worker.prefilled.append(asked.request_id)
        worker.received.append(asked)
        try:
            await asyncio.sleep(worker.behaviour.prefill_s)
            if worker.behaviour.silent:
                await asyncio.Event().wait()
        finally:
            worker.prefilling.discard(asked.request_id)
        first = worker.output(asked, len(asked.resume_from))
        receiver = worker.peers.get(request.ticket.receiver.worker_id)
        if receiver is not None and not first.finish:
            receiver.first_token_came(asked.request_id, asked.attempt)
        return worker_pb2.PrefillReply(first=first, prefill_s=worker.behaviour.prefill_s, cached_tokens=3)

    async def Abort(self, request, context):
        await self.enter(context)
        self.worker.aborts.append(("prefill", request.request_id, request.attempt))
        return worker_pb2.AbortReply(found=request.request_id in self.worker.prefilling)
