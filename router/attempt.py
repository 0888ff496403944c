"""One try at a request on one route: reserve, prefill, follow the tokens, and leave nothing behind.

States: NEW -> RESERVING (Reserve is sent: the decode worker may hold something) -> PREFILLING (it does) -> DECODING
(the prompt's first token is here) -> DONE (the decode worker said the last token, gave it back, or refused to reserve:
nothing is held). `close` aborts whatever the state says may still be held.

The prompt is sent to the prefill worker together with Reserve, and waits there for its ticket: the decode worker brings
it if the two have a pair, and it follows from here when Reserve is answered.

The order of tokens is by offset. The decode worker may speak before the prefill's reply has come; its
tokens are held back until the first one is here. Tokens that the client already has are dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from protos import inference_pb2, worker_pb2
from router.background import Background
from router.errors import AttemptFailedError, HandedBackError, PreemptedError, RequestMovedError, WorkerFullError
from router.inbox import Event, Inbox
from router.info import WorkerLife
from router.job import Chunk, Ending, Job
from router.policies import Route
from router.timeline import Moment
from router.workers import WorkerLink

Emit = Callable[[Chunk], Awaitable[Ending | None]]
"""Hands a chunk to the client; tells if the stream ends with it."""

_LOST = (worker_pb2.ENGINE_FINISH_FAILED, worker_pb2.ENGINE_FINISH_ABORTED)


class AttemptState(enum.Enum):
    """How far an attempt has come."""

    NEW = "new"
    RESERVING = "reserving"
    PREFILLING = "prefilling"
    DECODING = "decoding"
    DONE = "done"


@dataclass(frozen=True, slots=True)
class AttemptContext:
    """What an attempt needs of its router."""

    router_id: str
    max_stream_buffer: int
    on_overflow: Callable[[], object]
    aborts: Background


class Attempt:
    """One try; the dispatcher opens, follows and closes it."""

    def __init__(
        self,
        job: Job,
        decode: WorkerLink,
        prefill: WorkerLink | None,
        route: Route,
        context: AttemptContext,
        number: int | None = None,
    ) -> None:
        """`route`: why these workers were chosen; `number`: of an attempt of another router, default: the next one."""
        self.state = AttemptState.NEW
        self._job = job
        self._decode = decode
        self._prefill = prefill
        self._route = route
        self._context = context
        self.number = job.attempts.begin() if number is None else number
        """Tells its outputs from those of another attempt."""
        self.num_tokens = job.num_tokens
        """Tokens to compute before the first new one."""
        self._resumed = bool(job.emitted)
        self._inbox = Inbox(job.request_id, self.number, context.max_stream_buffer, context.on_overflow)
        self._decodes = False
        """The decode worker has said something."""
        self._held: deque[worker_pb2.TokenOutput] = deque()
        self._failure: Exception | None = None
        self._first: worker_pb2.TokenOutput | None = None
        self._loads = contextlib.ExitStack()
        self._prefill_load = self._loads.enter_context(contextlib.ExitStack())
        self._sending = self._loads.enter_context(contextlib.ExitStack())
        self._prefilling: asyncio.Task[None] | None = None
        self._ticket: asyncio.Future[worker_pb2.PrefillRequest] = asyncio.get_running_loop().create_future()

    def took_part(self) -> frozenset[WorkerLife]:
        """The workers of this attempt."""
        return frozenset(link.info.life for link in (self._decode, self._prefill) if link is not None)

    async def reserve(self) -> None:
        """Have blocks promised by the decode worker; the prompt is on its way to the prefill worker meanwhile."""
        self._take_places()
        self.state = AttemptState.RESERVING
        self._job.awaited = f"blocks of worker {self._decode.info.label}"
        request = worker_pb2.ReserveRequest(
            router_id=self._context.router_id,
            request=self._job.engine_request(),
            epoch=self._decode.info.epoch,
            local_prefill=self._prefill is None,
        )
        if self._prefill is not None:
            request.prefill.worker_id, request.prefill.epoch = self._prefill.info.worker_id, self._prefill.info.epoch
            self._prefilling = asyncio.get_running_loop().create_task(
                self._run_prefill(self._prefill), name=f"prefill of {self._job.request_id}"
            )
        try:
            reply = await self._decode.reserve(request)
        except WorkerFullError:
            self.state = AttemptState.DONE
            raise
        if not self._ticket.done():
            self._ticket.set_result(worker_pb2.PrefillRequest(ticket=reply.ticket))
        self._job.timeline.mark(Moment.RESERVED)
        self._job.decode_worker = self._decode.info.label
        self._job.prefill_worker = (self._prefill or self._decode).info.label
        self._job.route = self._route.reason
        if not self._resumed:
            self._job.num_cached = reply.cached_tokens

    async def adopt(self) -> bool:
        """Have the decode worker give this router a sequence that it has already; False if it has it no more."""
        self._take_places()
        self.state = AttemptState.RESERVING
        self._job.awaited = f"the adoption by worker {self._decode.info.label}"
        request = worker_pb2.AdoptRequest(
            router_id=self._context.router_id,
            request_id=self._job.request_id,
            attempt=self.number,
            epoch=self._decode.info.epoch,
        )
        if not await self._decode.adopt(request):
            self.state = AttemptState.DONE
            return False
        self._prefill_load.close()
        self._job.timeline.mark(Moment.RESERVED)
        self._job.prefill_worker = self._job.decode_worker = self._decode.info.label
        self._job.route = self._route.reason
        return True

    async def follow(self, emit: Emit) -> Ending:
        """Have the prompt computed and hand on every token; returns when the stream has ended well."""
        if self._prefill is None:
            self.state = AttemptState.DECODING
            self._job.awaited = f"tokens of worker {self._decode.info.label}"
        else:
            self.state = AttemptState.PREFILLING
            self._job.awaited = f"the first token of worker {self._prefill.info.label}"
        take, absorb, next_chunk = self._inbox.take, self._absorb, self._next_chunk
        while True:
            for event in await take():
                absorb(event)
            chunk = next_chunk()
            if chunk is not None and (ending := await emit(chunk)) is not None:
                return ending
            if self._failure is not None:
                raise self._failure

    def close(self, reason: str) -> None:
        """End the attempt on both sides, without waiting for them."""
        self._loads.close()
        if self._prefilling is not None:
            self._prefilling.cancel()
        is_open = self.state in (AttemptState.RESERVING, AttemptState.PREFILLING, AttemptState.DECODING)
        if is_open and not self._job.leaves_it_running:
            self._abort(self._decode, reason, decode=True)
            if self._prefill is not None:
                self._abort(self._prefill, reason, decode=False)
        self.state = AttemptState.DONE

    def _take_places(self) -> None:
        """Receive what the workers say, and count as their load."""
        self._decode.register(self._inbox)
        self._loads.callback(self._decode.unregister, self._inbox)
        self._loads.enter_context(self._decode.info.decoding())
        if self._prefill is not None:
            self._prefill.register(self._inbox)
            self._sending.callback(self._prefill.unregister, self._inbox)
        computes = (self._prefill or self._decode).info
        self._prefill_load.enter_context(computes.prefilling(self._route.missing_tokens))

    def _abort(self, link: WorkerLink, reason: str, *, decode: bool) -> None:
        if link.info.connected:  # a worker that lost its stream aborts by itself
            request = worker_pb2.AbortRequest(request_id=self._job.request_id, attempt=self.number, reason=reason)
            self._context.aborts.spawn_in_turn(link.abort(request, decode=decode), f"abort {self._job.request_id}")

    async def _run_prefill(self, link: WorkerLink) -> None:
        """Puts the reply, or what went wrong, into the inbox."""
        request = worker_pb2.PrefillRequest(
            router_id=self._context.router_id,
            request=self._job.engine_request(),
            epoch=link.info.epoch,
            receiver=worker_pb2.WorkerIdentity(worker_id=self._decode.info.worker_id, epoch=self._decode.info.epoch),
        )
        try:
            self._inbox.put(await link.prefill(request, self._ticket))
        except Exception as error:
            self._inbox.put(error)

    def _absorb(self, event: Event) -> None:
        if isinstance(event, worker_pb2.TokenOutput):
            self._held.append(event)
            if not self._decodes:
                self._begins_to_decode()
        elif isinstance(event, worker_pb2.PrefillReply):
            self._first_token(event)
        elif self._failure is None:
            self._failure = event

    def _begins_to_decode(self) -> None:
        """The KV is home, and the decode worker alone can fail this attempt."""
        self._decodes = True
        self._sending.close()
        if self._prefill is None:
            self._prefill_load.close()

    def _first_token(self, reply: worker_pb2.PrefillReply) -> None:
        self.state = AttemptState.DECODING
        self._job.awaited = f"tokens of worker {self._decode.info.label}"
        self._prefill_load.close()
        self._first = reply.first
        self._job.timeline.prefilled(reply.prefill_s)
        if not self._resumed:
            self._job.num_cached = max(self._job.num_cached, reply.cached_tokens)
        self._held.appendleft(self._first)

    def _next_chunk(self) -> Chunk | None:
        """All held tokens that follow without a gap on those the client has."""
        held, emitted = self._held, self._job.emitted
        before = num_known = len(emitted)
        new: list[int] = []
        logprobs: list[inference_pb2.PositionLogprobs] = []
        finish = worker_pb2.ENGINE_FINISH_NONE
        while held and not finish and self.state is not AttemptState.PREFILLING:
            output = held.popleft()
            num_repeated, token_ids = num_known - output.offset, output.token_ids
            if num_repeated < 0:
                self._fail(f"tokens {num_known} to {output.offset - 1} never came")
                break
            if num_repeated == 0 and len(token_ids) == 1:
                new.append(token_ids[0])  # most are of one token, and to go through a field of a message is slow
            else:
                new += token_ids[num_repeated:]
            if output.logprobs:
                logprobs.extend(output.logprobs[num_repeated:])
            num_known = before + len(new)
            self._note(output)
            finish = output.finish
        emitted += new
        if finish:
            finish = self._ended(output, finish)
        return Chunk(before, new, logprobs, finish) if new or finish else None

    def _ended(self, output: worker_pb2.TokenOutput, finish: worker_pb2.EngineFinish) -> worker_pb2.EngineFinish:
        """The same, or none if the worker gave up or has another owner for it."""
        if finish == worker_pb2.ENGINE_FINISH_MOVED:
            self.state = AttemptState.DONE
            self._failure = RequestMovedError("another router goes on with this request")
            return worker_pb2.ENGINE_FINISH_NONE
        if finish in _LOST:
            self._fail(f"worker {self._decode.info.label} gave up: {output.reason}")
            return worker_pb2.ENGINE_FINISH_NONE
        if finish == worker_pb2.ENGINE_FINISH_PREEMPTED:
            self.state = AttemptState.DONE
            self._failure = self._failure or PreemptedError(f"worker {self._decode.info.label} gave it back")
            return worker_pb2.ENGINE_FINISH_NONE
        if finish == worker_pb2.ENGINE_FINISH_HANDED_BACK:
            self.state = AttemptState.DONE
            self._failure = self._failure or HandedBackError(f"worker {self._decode.info.label} handed it back")
            return worker_pb2.ENGINE_FINISH_NONE
        if output is not self._first:
            self.state = AttemptState.DONE
        return finish

    def _note(self, output: worker_pb2.TokenOutput) -> None:
        if output.HasField("timing"):
            self._job.timeline.decoded(output.timing)
        if output.cached_tokens > self._job.num_cached and not self._resumed:
            self._job.num_cached = output.cached_tokens

    def _fail(self, why: str) -> None:
        if self._failure is None:
            self._failure = AttemptFailedError(why)
