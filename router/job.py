"""One request on its way through the router: what was asked, and how far it has come."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from protos import inference_pb2, worker_pb2
from router.info import WorkerInfo
from router.retry import Attempts
from router.tenants import DEFAULT_TENANT
from router.timeline import Timeline


@dataclass(frozen=True, slots=True)
class Adoption:
    """The sequence of a resumable request, which may still run at a decode worker."""

    worker_id: str
    epoch: int
    attempt: int


@dataclass(slots=True, eq=False)
class Job:
    """Lives from acceptance to the end of the stream, through all attempts."""

    request_id: str
    prompt_token_ids: list[int]
    params: worker_pb2.SamplingParams
    priority: int
    deadline: float
    """Time of the event loop's clock at which the request ends."""
    timeline: Timeline
    attempts: Attempts
    resumable: bool = False
    adoption: Adoption | None = None
    """What to go on with before any attempt is made."""
    leaves_it_running: bool = False
    """Whether its end at this router is to be no end at its workers."""
    on_reserved: Callable[[WorkerInfo, int], object] | None = None
    """Told which worker has it, under which attempt."""
    tenant: str = DEFAULT_TENANT
    """On whose behalf it came."""
    emitted: list[int] = field(default_factory=list)
    """Tokens handed to the client so far; a new attempt goes on after them."""
    num_preemptions: int = 0
    """Attempts that ended because a decode worker needed the blocks for others."""
    num_cached: int = 0
    """Prompt tokens whose KV the first attempt's workers already held."""
    awaited: str = "a place in the line"
    """What it waits for, from whom."""
    prefill_worker: str = ""
    decode_worker: str = ""
    route: str = ""
    """Why these were chosen."""
    _told: worker_pb2.EngineRequest | None = None
    """What workers were told last: the prompt is turned into a message once."""

    @property
    def num_tokens(self) -> int:
        """Tokens a worker must be able to hold to generate at least one more."""
        return len(self.prompt_token_ids) + len(self.emitted) + 1

    def seconds_left(self) -> float:
        """Until the deadline; never quite 0, which would mean none."""
        return max(0.001, self.deadline - asyncio.get_running_loop().time())

    def engine_request(self) -> worker_pb2.EngineRequest:
        """What a worker is told of it, for the present attempt; valid until the next call."""
        told = self._told
        if told is None:
            told = self._told = worker_pb2.EngineRequest(
                request_id=self.request_id,
                prompt_token_ids=self.prompt_token_ids,
                params=self.params,
                priority=self.priority,
                resumable=self.resumable,
            )
        told.attempt = self.attempts.number
        told.deadline_s = self.seconds_left()
        told.resume_from[:] = self.emitted
        told.age_s = self.timeline.age_s()
        told.num_preemptions = self.num_preemptions
        return told


class Chunk(NamedTuple):
    """New tokens for the client: as many as have come since the last chunk."""

    offset: int
    token_ids: list[int]
    logprobs: list[inference_pb2.PositionLogprobs]
    finish: worker_pb2.EngineFinish
    """NONE, EOS, STOP or LENGTH."""


@dataclass(frozen=True, slots=True)
class Ending:
    """How a stream ended well."""

    reason: inference_pb2.FinishReason
    stop_string: str = ""
