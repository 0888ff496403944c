"""Requests that outlive their stream: resumable ones, each served by a task of its own, whoever follows it.

    RUNNING --last word--> ENDED (kept for `replay_s`, to be told again)
       |--nobody has followed it for `grace_s`--> ended, its workers are told
       |--no worker can go on for now--> (gone here; its record stays, for Resume to try again)
       '--another router has taken it over--> (gone, and whoever follows it gets ABORTED)

A run is followed by at most one call; a new one cuts the one before off. Where the store can be reached it says who
serves what, so any router can go on: it adopts the sequence where it still runs, and else computes the answer again
from the same seed, which gives the same tokens. While the store is away, requests are resumable at their own router.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
from collections.abc import AsyncIterator
from dataclasses import replace

from protos import inference_pb2, worker_pb2
from router import validation
from router.background import Background
from router.errors import (
    DuplicateRequestError,
    InvalidArgumentError,
    RequestMovedError,
    RequestNotFoundError,
    RequestOrphanedError,
    SlowClientError,
    StoreUnavailableError,
    UnavailableError,
)
from router.info import WorkerInfo
from router.job import Adoption, Chunk
from router.request_store import RequestRecord, RequestStore
from router.scope import Scope
from router.session import Client, Desk, Origin, Session
from router.story import Reader, Story
from router.tenants import Metadata

logger = logging.getLogger(__name__)

ATTEMPTS_A_GENERATION = 1 << 20
"""Each router that serves a request numbers its attempts from a start of its own, above those of the one before."""
TURN_S = 10.0
NOT_KEPT_S = 0.001


class Run:
    """One resumable request at this router."""

    def __init__(self, record: RequestRecord, session: Session, story: Story) -> None:
        self.record = record
        self.session = session
        self.story = story
        self.follower: Scope | None = None
        self.forget: asyncio.TimerHandle | None = None
        """Ends the run when nobody comes to follow it; when it has ended: forgets it."""

    @property
    def may_be_tried_again(self) -> bool:
        """Whether it ended before it was accepted, or in a way that may be over soon: then it is not kept here."""
        failure = self.story.failure
        return self.story.accepted is None or (failure is not None and failure.retry_after_s is not None)

    @property
    def goes_on_elsewhere(self) -> bool:
        """Whether a client has tokens of an answer that could not be ended for now: Resume may go on with it later."""
        return self.may_be_tried_again and (self.story.num_tokens > 0 or self.record.generation > 0)

    def replay(self, token_ids: list[int]) -> int:
        """How many characters of the answer come with its first tokens."""
        message, _ = self.session.fresh_output().push(Chunk(0, token_ids, [], worker_pb2.ENGINE_FINISH_NONE))
        return len(message.text)


class Runs:
    """All runs of one router."""

    def __init__(self, desk: Desk, store: RequestStore, router_id: str) -> None:
        self._desk = desk
        self._store = store
        self._router_id = router_id
        self._runs: dict[str, Run] = {}
        self._asking: dict[str, asyncio.Event] = {}
        """Requests that a call just now looks for in the store."""
        self._background = Background()

    async def generate(self, request: inference_pb2.GenerateRequest, metadata: Metadata) -> Run:
        """The run of a resumable request: a new one, or the one that has its id and its body already."""
        request_id = request.request_id = validation.request_id(request.request_id)
        async with self._alone(request_id):
            return await self._generate(request_id, request, metadata)

    async def _generate(self, request_id: str, request: inference_pb2.GenerateRequest, metadata: Metadata) -> Run:
        owner, body = self._desk.tenants.caller(metadata), _digest(request)
        if (run := self._runs.get(request_id)) is not None:
            return _same(run, run.record, owner, body)
        self._desk.check_open(request, self._desk.tenants.of(metadata), self._limit_s(request))
        if not request.sampling.HasField("seed"):
            request.sampling.seed = validation.draw_seed()
        record = RequestRecord(
            request_id=request_id,
            owner=owner,
            body=body,
            request=request.SerializeToString(),
            router_id=self._router_id,
        )
        try:
            if not await self._store.claim(record, self._limit_s(request) + self._desk.config.resume.replay_s):
                return await self._take_over(request_id, metadata, body)
        except StoreUnavailableError as error:
            logger.warning("resumable at this router only: %s", error, extra={"request_id": request_id})
        return self._begin(record, request, metadata, None)

    async def find(self, request_id: str, next_offset: int, metadata: Metadata) -> Run:
        """The run of a known request, taken over from another router if need be."""
        if next_offset < 0:
            raise InvalidArgumentError(f"next_offset must be at least 0, got {next_offset}", field="next_offset")
        try:
            async with self._alone(request_id):
                if (run := self._runs.get(request_id)) is not None:
                    return _same(run, run.record, self._desk.tenants.caller(metadata), None)
                return await self._take_over(request_id, metadata, None)
        except StoreUnavailableError as error:
            raise UnavailableError(
                f"the registry, which knows where requests run, cannot be asked: {error}",
                retry_after_s=self._desk.config.retry_after_s,
            ) from error

    async def follow(self, run: Run, next_offset: int, client: Client) -> None:
        """Tell a client what a run says from a token on, until it ends; RouterError where a status ends it.

        Whoever followed it before is cut off.
        """
        scope = Scope()
        reader = self._reader(run, next_offset, scope)
        limit_s = self._desk.config.resume.grace_s
        try:
            async with scope:
                while (event := await reader.next_event(TURN_S)) is not None:
                    async with asyncio.timeout(limit_s):
                        with scope.writing():
                            await client.write(event)
        except TimeoutError:
            raise SlowClientError(
                f"the client did not take a message within {limit_s:g} s; read faster, and go on with Resume"
            ) from None
        finally:
            self._left(run, scope)

    def _reader(self, run: Run, next_offset: int, scope: Scope) -> Reader:
        if run.follower is not None:
            run.follower.interrupt(RequestMovedError("another call goes on with this request"))
        run.follower = scope
        if run.forget is not None and not run.story.ended:
            run.forget.cancel()
        return Reader(run.story, next_offset, run.replay)

    def _left(self, run: Run, scope: Scope) -> None:
        """A follower is gone; without another one the run ends after a while."""
        if run.follower is not scope:
            return
        run.follower = None
        if not run.story.ended:
            resume = self._desk.config.resume
            orphaned = RequestOrphanedError(f"nobody followed the request for {resume.grace_s:g} s")
            loop = asyncio.get_running_loop()
            run.forget = loop.call_later(resume.grace_s, run.session.scope.interrupt, orphaned)

    def leave(self) -> None:
        """This router stops: what runs goes on at its workers, for another router to adopt."""
        for run in self._runs.values():
            run.session.leave_it_running()

    async def close(self) -> None:
        """End what is left; the sessions have been interrupted before."""
        for run in self._runs.values():
            if run.forget is not None:
                run.forget.cancel()
        await self._background.settle(TURN_S)
        self._runs.clear()

    @contextlib.asynccontextmanager
    async def _alone(self, request_id: str) -> AsyncIterator[None]:
        """One call of a request at a time asks the store (which bounds how long), so that none takes over another's."""
        while (other := self._asking.get(request_id)) is not None:
            await other.wait()
        done = self._asking[request_id] = asyncio.Event()
        try:
            yield
        finally:
            del self._asking[request_id]
            done.set()

    async def _take_over(self, request_id: str, metadata: Metadata, body: str | None) -> Run:
        """Go on with a request of another router, or of this one's life before."""
        self._desk.check_stays()
        owner = self._desk.tenants.caller(metadata)
        found = await self._store.find(request_id)
        if found is None:
            raise _unknown(request_id)
        known, left_s = found
        _check(known, owner, body)
        record = await self._store.take_over(request_id, self._router_id)
        if record is None:
            raise _unknown(request_id)
        request = inference_pb2.GenerateRequest.FromString(record.request)
        if not record.has_ended:  # else it is told again, in a time of its own
            request.deadline_s = max(0.001, min(self._limit_s(request), left_s - self._desk.config.resume.replay_s))
        adoption = None
        if record.worker_id and not record.has_ended and not request.sampling.HasField("logprobs"):
            adoption = Adoption(record.worker_id, record.epoch, record.attempt)
        logger.info(
            "taking over a request",
            extra={"request_id": request_id, "generation": record.generation, "worker": record.worker_id},
        )
        return self._begin(record, request, metadata, adoption)

    def _begin(
        self,
        record: RequestRecord,
        request: inference_pb2.GenerateRequest,
        metadata: Metadata,
        adoption: Adoption | None,
    ) -> Run:
        story = Story(metadata)
        first_attempt = record.generation * ATTEMPTS_A_GENERATION
        session = Session(self._desk, request, story, Origin(first_attempt, adoption))
        run = self._runs[record.request_id] = Run(record, session, story)
        session.on_reserved = lambda worker, attempt: self._background.spawn(
            self._note_worker(run, worker, attempt), f"note where {record.request_id} runs"
        )
        self._background.spawn(self._serve(run), f"serve {record.request_id}")
        return run

    async def _serve(self, run: Run) -> None:
        failure = await run.session.serve_to_the_end()
        if isinstance(failure, RequestMovedError):
            self._drop(run)
            run.story.fail(failure)
            return
        if failure is not None:
            run.story.fail(failure)
        if run.forget is not None:
            run.forget.cancel()
        kept_s = self._desk.config.resume.replay_s
        if run.may_be_tried_again:
            self._drop(run)
            kept_s = NOT_KEPT_S
        else:
            run.forget = asyncio.get_running_loop().call_later(kept_s, self._drop, run)
            self._make_room()
        if not run.session.leaves_it_running and not run.goes_on_elsewhere:
            try:
                await self._store.ended(run.record.request_id, run.record.generation, kept_s)
            except StoreUnavailableError as error:
                logger.warning("a request's record is left to run out: %s", error)

    async def _note_worker(self, run: Run, worker: WorkerInfo, attempt: int) -> None:
        record = replace(run.record, worker_id=worker.worker_id, epoch=worker.epoch, attempt=attempt)
        try:
            is_ours = await self._store.runs_at(record)
        except StoreUnavailableError as error:
            logger.warning("resumable at this router only: %s", error, extra={"request_id": record.request_id})
            return
        if not is_ours:
            run.session.scope.interrupt(RequestMovedError("another router goes on with this request"))

    def _drop(self, run: Run) -> None:
        if self._runs.get(run.record.request_id) is run:
            del self._runs[run.record.request_id]

    def _make_room(self) -> None:
        """Forget the oldest of the ended ones where there are too many."""
        ended = [run for run in self._runs.values() if run.story.ended and run.follower is None]
        for run in ended[: max(0, len(ended) - self._desk.config.resume.max_kept)]:
            if run.forget is not None:
                run.forget.cancel()
            self._drop(run)

    def _limit_s(self, request: inference_pb2.GenerateRequest) -> float:
        return validation.deadline_s(request, self._desk.config, None)


def _digest(request: inference_pb2.GenerateRequest) -> str:
    return hashlib.sha256(request.SerializeToString(deterministic=True)).hexdigest()


def _same(run: Run, record: RequestRecord, owner: str, body: str | None) -> Run:
    _check(record, owner, body)
    return run


def _check(record: RequestRecord, owner: str, body: str | None) -> None:
    """That a caller may follow the request, and means this one."""
    if record.owner != owner:  # as if it were not there: nobody learns of others' requests
        raise _unknown(record.request_id) if body is None else _taken(record.request_id)
    if body is not None and record.body != body:
        raise _taken(record.request_id)


def _unknown(request_id: str) -> RequestNotFoundError:
    return RequestNotFoundError(
        f"no resumable request {request_id!r} is known: it was not marked resumable, or it ended too long ago; "
        "send it again with Generate"
    )


def _taken(request_id: str) -> DuplicateRequestError:
    return DuplicateRequestError(
        f"another request has the id {request_id!r}: choose another one, or send the same body to go on with it"
    )
