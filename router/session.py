"""One client's Generate call, from its first byte to its one and only end.

States: VALIDATING (may be refused) -> ACCEPTED (the client was told) -> ENDED, by a Finished or by a status.
Cancel, the deadline and a lagging client interrupt it through its scope; whatever happens, the workers are
told by the dispatcher, and the outcome is counted once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import grpc

from engine import wire
from protos import inference_pb2
from router import validation
from router.admission import Line
from router.config import RouterConfig
from router.dispatcher import Dispatcher
from router.errors import (
    DeadlineExceededError,
    DuplicateRequestError,
    RequestCancelledError,
    RouterError,
    SlowClientError,
    UnavailableError,
)
from router.fleet import Fleet
from router.info import WorkerInfo
from router.job import Adoption, Chunk, Ending, Job
from router.model import ServedModel
from router.output import OutputStream
from router.refusals import RefusalLog
from router.retry import Attempts
from router.scope import Scope
from router.stats import RouterStats
from router.tenants import DEFAULT_TENANT, Metadata, Tenants
from router.timeline import Moment, Timeline
from router.wakeup import Signal

logger = logging.getLogger(__name__)

WRITE_PATIENCE_S = 0.05
"""How long a deadline lets a message through that is just being written."""
CANCEL_PATIENCE_S = 1.0
"""The same for Cancel, whose Finished message should follow it."""


class Client(Protocol):
    """Who hears a session: a gRPC call's context, or a story that others read."""

    async def write(self, event: inference_pb2.GenerateEvent) -> None:
        """Take an event; grpc.aio.InternalError when the client is gone."""

    def time_remaining(self) -> float | None:
        """Seconds until the call's own deadline, if it has one."""

    def invocation_metadata(self) -> Metadata:
        """What the call says beside its request."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a session begins: anew, or with what another router left."""

    first_attempt: int = 0
    """Number of the first attempt."""
    adoption: Adoption | None = None


@dataclass(slots=True, eq=False)
class Desk:
    """What all sessions of a router share."""

    config: RouterConfig
    model: ServedModel
    fleet: Fleet
    line: Line
    dispatcher: Dispatcher
    stats: RouterStats
    running: dict[str, Scope]
    """By request_id."""
    ended: Signal
    """A session ended."""
    split: bool
    tenants: Tenants
    refusals: RefusalLog = field(default_factory=lambda: RefusalLog(logger))
    draining: bool = False

    def check_open(self, request: inference_pb2.GenerateRequest, tenant: str, limit_s: float) -> None:
        """Refuse new requests while draining, and those that are not to be served in time."""
        self.check_stays()
        if len(self.line):
            sampling = request.sampling
            claim = self.line.claim(
                priority=request.priority,
                tenant=tenant,
                num_prompt_tokens=0,
                max_tokens=sampling.max_tokens if sampling.HasField("max_tokens") else self.config.default_max_tokens,
                deadline=asyncio.get_running_loop().time() + limit_s,
            )
            self.line.check_open(claim)

    def check_stays(self) -> None:
        """Refuse to begin anything while draining."""
        if self.draining:
            raise UnavailableError(
                "this router is about to stop and takes nothing new; ask another one",
                retry_after_s=self.config.retry_after_s,
            )


class Session:
    """The serving of one request."""

    def __init__(
        self, desk: Desk, request: inference_pb2.GenerateRequest, context: Client, origin: Origin | None = None
    ) -> None:
        self._desk = desk
        self._request = request
        self._context = context
        self.request_id = request.request_id[: validation.MAX_REQUEST_ID_CHARS]
        """For logs: the client's as far as it goes, then the one it was given."""
        self._leaves_it_running = False
        self.on_reserved: Callable[[WorkerInfo, int], object] | None = None
        """Told which worker has it, under which attempt."""
        self.scope = Scope()
        self._origin = origin or Origin()
        self._make_output: Callable[[], OutputStream] = _no_output
        self._timeline = Timeline()
        self._output: OutputStream | None = None
        self._job: Job | None = None
        self._tenant = DEFAULT_TENANT

    async def serve_to_the_end(self) -> RouterError | None:
        """Serve the call and account for it; gives the error whose status is to end it, if there is one."""
        outcome = "client_gone"
        failure: RouterError | None = None
        try:
            outcome = await self._serve()
        except RouterError as error:
            failure = error.with_traceback(None)  # it holds this frame, and the frame holds it
            outcome = error.code.name.lower()
        except grpc.aio.InternalError:
            logger.debug("the client is gone", extra={"request_id": self.request_id})
        except Exception:
            failure = RouterError("the router failed; its log says why")
            outcome = "internal"
            logger.exception("request failed by a defect", extra={"request_id": self.request_id})
        finally:
            self._account(outcome, "" if failure is None else failure.message)
        return failure

    @property
    def leaves_it_running(self) -> bool:
        """Whether an end from outside is to be no end at the workers."""
        return self._leaves_it_running

    def leave_it_running(self) -> None:
        """Have it so."""
        self._leaves_it_running = True
        if self._job is not None:
            self._job.leaves_it_running = True

    def fresh_output(self) -> OutputStream:
        """The text side of the answer, from its beginning; once the request is accepted."""
        return self._make_output()

    async def _serve(self) -> str:
        """Serve the call; gives its outcome. RouterError where a status is to end it."""
        desk, request = self._desk, self._request
        self._tenant = desk.tenants.of(self._context.invocation_metadata())
        limit_s = validation.deadline_s(request, desk.config, self._context.time_remaining())
        if self._origin.adoption is None:
            desk.check_open(request, self._tenant, limit_s)
        request_id = validation.request_id(self._request.request_id)
        if request_id in self._desk.running:
            raise DuplicateRequestError(
                f"a request with the id {request_id!r} is running; one that is marked resumable could be gone on with"
            )
        self.request_id = request_id
        self._desk.running[request_id] = self.scope
        try:
            async with self.scope:
                ending = await self._run(request_id, limit_s)
        except RequestCancelledError:
            if self._job is None or self.scope.write_cut:
                raise
            ending = Ending(inference_pb2.FINISH_REASON_CANCELLED)
            await self._finish(self._job, ending, CANCEL_PATIENCE_S)
        finally:
            del self._desk.running[request_id]
            self._desk.ended.notify()
        return inference_pb2.FinishReason.Name(ending.reason).removeprefix("FINISH_REASON_").lower()

    async def _run(self, request_id: str, limit_s: float) -> Ending:
        # 1. Everything that can be refused without work, then the prompt, then what depends on its length.
        desk, request = self._desk, self._request
        desk.model.check_name(request.model)
        deadline = asyncio.get_running_loop().time() + limit_s
        self.scope.interrupt_at(deadline, lambda: self._too_late(limit_s), WRITE_PATIENCE_S)
        kind = validation.prompt_kind(request)
        stops = validation.stop_strings(request.sampling, desk.model)
        params = validation.sampling_params(request.sampling, desk.config, desk.model)
        ids = await validation.prompt_ids(request, desk.model)
        params = validation.fitted(params, len(ids), desk.model, desk.fleet.pool_tokens(split=desk.split), kind)
        # 2. Accept.
        self._make_output = lambda: OutputStream(desk.model.tokenizer, ids, stops)
        self._output = self._make_output()
        job = Job(
            request_id=request_id,
            prompt_token_ids=ids,
            params=wire.params_to_wire(params),
            priority=request.priority,
            deadline=deadline,
            timeline=self._timeline,
            attempts=Attempts(desk.config.max_attempts, desk.config.retry_after_s, self._origin.first_attempt),
            tenant=self._tenant,
            resumable=request.resumable,
            adoption=self._origin.adoption,
            on_reserved=self.on_reserved,
        )
        self._timeline.mark(Moment.ACCEPTED)
        accepted = inference_pb2.Accepted(
            request_id=request_id, model=desk.model.name, num_prompt_tokens=len(ids), seed=params.seed
        )
        await self._write(inference_pb2.GenerateEvent(accepted=accepted))
        job.leaves_it_running = self._leaves_it_running
        self._job = job
        desk.stats.accepted += 1
        desk.stats.accepted_prompt_tokens += len(ids)
        # 3. Serve.
        ending = await desk.dispatcher.run(job, self._emit, self.scope)
        self.scope.seal()
        await self._finish(job, ending, job.seconds_left())
        return ending

    def _too_late(self, limit_s: float) -> DeadlineExceededError:
        awaited = "the prompt's tokens" if self._job is None else self._job.awaited
        return DeadlineExceededError(f"the request did not end within its {limit_s:g} s; it waited for {awaited}")

    async def _emit(self, chunk: Chunk) -> Ending | None:
        assert self._output is not None
        num_tokens, stats = len(chunk.token_ids), self._desk.stats
        since_s = self._timeline.tokens(chunk.offset, num_tokens)
        stats.sent_tokens += num_tokens
        if chunk.offset:
            stats.itl_s.observe(since_s)
        message, ending = self._output.push(chunk)
        with self.scope.writing():
            await self._context.write(inference_pb2.GenerateEvent(tokens=message))
        if not chunk.offset:
            self._timeline.mark(Moment.FIRST_SENT)
            stats.ttft_s.observe(self._timeline.between(Moment.ARRIVED, Moment.FIRST_SENT))
        return ending

    async def _write(self, event: inference_pb2.GenerateEvent) -> None:
        with self.scope.writing():
            await self._context.write(event)

    async def _finish(self, job: Job, ending: Ending, limit_s: float) -> None:
        """Say the last word."""
        assert self._output is not None
        self._timeline.mark(Moment.ENDED)
        usage = inference_pb2.Usage(
            prompt_tokens=len(job.prompt_token_ids),
            cached_prompt_tokens=job.num_cached,
            completion_tokens=self._output.num_tokens,
        )
        finished = inference_pb2.Finished(
            reason=ending.reason,
            stop_string=ending.stop_string,
            usage=usage,
            timing=self._timeline.timing(),
            prefill_worker=job.prefill_worker,
            decode_worker=job.decode_worker,
            route=job.route if self._request.explain else "",
        )
        try:
            async with asyncio.timeout(limit_s):
                await self._context.write(inference_pb2.GenerateEvent(finished=finished))
        except TimeoutError:
            raise SlowClientError(f"the client did not take its last message within {limit_s:g} s") from None

    def _account(self, outcome: str, error: str) -> None:
        """Add this session's figures to the router's, and log its end."""
        self._timeline.mark(Moment.ENDED)
        self._desk.stats.ended(outcome)
        stats, timeline, job, output = self._desk.stats, self._timeline, self._job, self._output
        if job is None or output is None:
            self._desk.refusals.note(outcome, self.request_id, error)
            return
        stats.prompt_tokens += len(job.prompt_token_ids)
        stats.cached_prompt_tokens += job.num_cached
        stats.generated_tokens += output.num_tokens
        stats.failed_attempts += job.attempts.num_failed
        stats.queue_s.observe(timeline.between(Moment.ARRIVED, Moment.RESERVED))
        stats.total_s.observe(timeline.between(Moment.ARRIVED, Moment.ENDED))
        stats.transfer_s.observe(timeline.transfer_s())
        logger.info(
            "request ended",
            extra={
                "request_id": self.request_id,
                "outcome": outcome,
                "error": error,
                "num_prompt_tokens": len(job.prompt_token_ids),
                "num_generated_tokens": output.num_tokens,
                "num_failed_attempts": job.attempts.num_failed,
                "prefill_worker": job.prefill_worker,
                "decode_worker": job.decode_worker,
                "route": job.route,
                "ttft_s": timeline.between(Moment.ARRIVED, Moment.FIRST_SENT),
                "total_s": timeline.between(Moment.ARRIVED, Moment.ENDED),
            },
        )


def _no_output() -> OutputStream:
    raise AssertionError("the request has not been accepted yet")
