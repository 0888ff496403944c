"""A request's body inside an engine: its tokens, its blocks, and how far it has been computed.

Two counters and no phase flag: `num_computed_tokens` chases `num_tokens`. Chunked prefill, prefix
hits, local prefill, recompute after a loss and decoding are all the same catching up. Both count what is scheduled:
while a step is under way, its tokens count as computed, and the one it samples stands in token_ids as PENDING.

States: WAITING -> RUNNING -> FINISHED, with RUNNING -> WAITING on preemption. A sequence whose KV
is still on its way (decode_pool) is not yet known to the scheduler. The scheduler alone changes them.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from engine.api import FinishReason, GenerateRequest, TokenLogprobs

PENDING = -1
"""Stands in token_ids for a token that a step under way samples."""


class SequenceStatus(enum.Enum):
    """Where a sequence is in its life."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """One request as the scheduler and the runner see it."""

    request: GenerateRequest
    token_ids: list[int]
    """Prompt, then what was generated (by earlier attempts too), then PENDING for each step under way that samples."""
    arrival: float
    """Monotonic seconds of the request's first arrival at a router; survives preemption and new attempts."""
    num_computed_tokens: int = 0
    """Tokens whose KV lies in this sequence's blocks, or will when the steps under way are done."""
    num_pending: int = 0
    """Tokens at the end of token_ids that are PENDING."""
    block_ids: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    """Chained hashes of the full blocks of token_ids."""
    num_hashed_blocks: int = 0
    """Blocks already published to the prefix cache."""
    num_cached_tokens: int = 0
    status: SequenceStatus = SequenceStatus.WAITING
    finish_reason: FinishReason | None = None
    num_preemptions: int = 0
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    owner: str = ""
    """Who asked (a router's id): outputs go there, and its loss ends the sequence."""
    prefill_only: bool = False
    """Prefill for another worker: ends with its first token. Its blocks stay held until whoever
    sends them calls the scheduler's `release`, and it is never preempted."""
    first_step_at: float = 0.0
    """Monotonic seconds when its first step was scheduled; 0: not yet."""

    @classmethod
    def from_request(cls, request: GenerateRequest, arrival: float) -> Sequence:
        """A sequence that has computed nothing yet; `arrival` is its arrival here, on a monotonic clock."""
        token_ids = [*request.prompt_token_ids, *request.resume_from]
        arrival -= request.age_s
        return cls(request=request, token_ids=token_ids, arrival=arrival, num_preemptions=request.num_preemptions)

    @property
    def came_at(self) -> float:
        """Monotonic seconds of its arrival here."""
        return self.arrival + self.request.age_s

    @property
    def num_tokens(self) -> int:
        """Tokens known so far."""
        return len(self.token_ids)

    @property
    def num_known_tokens(self) -> int:
        """Tokens whose ids are known."""
        return len(self.token_ids) - self.num_pending

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens the client sent."""
        return len(self.request.prompt_token_ids)

    @property
    def num_generated_tokens(self) -> int:
        """Tokens generated so far, by earlier attempts and the steps under way too: the offset of the next one."""
        return len(self.token_ids) - len(self.request.prompt_token_ids)

    @property
    def num_missing_tokens(self) -> int:
        """Tokens still to be computed before the next one can be sampled."""
        return len(self.token_ids) - self.num_computed_tokens
