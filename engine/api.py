"""What goes into an engine and what comes out: plain values, no torch.

A caller hands in a `GenerateRequest`; the engine answers with `TokenOutput`s whose offsets have no
gap and never repeat, the last of which carries a `finish_reason`.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

from engine.errors import InvalidRequestError

MAX_LOGPROBS = 20
"""Most alternatives that are reported for one position."""


class FinishReason(enum.Enum):
    """How a sequence ended."""

    EOS = "eos"
    STOP = "stop"
    LENGTH = "length"
    ABORTED = "aborted"
    FAILED = "failed"
    PREEMPTED = "preempted"
    """Its blocks were needed, and it is to be computed again somewhere else."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How the next token is chosen; the random number depends on (seed, position) alone."""

    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0: off."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    max_tokens: int = 256
    min_tokens: int = 0
    """No end-of-sequence and no stop token before this many."""
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0
    logprobs: int | None = None
    """Number of alternatives to report beside the chosen token's own; None: report nothing."""
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _check_range("temperature", self.temperature, low=0.0, high=100.0)
        _check_range("top_p", self.top_p, low=0.0, high=1.0, low_open=True)
        _check_range("top_k", self.top_k, low=0)
        _check_range("min_p", self.min_p, low=0.0, high=1.0)
        _check_range("repetition_penalty", self.repetition_penalty, low=0.0, high=100.0, low_open=True)
        _check_range("presence_penalty", self.presence_penalty, low=-100.0, high=100.0)
        _check_range("frequency_penalty", self.frequency_penalty, low=-100.0, high=100.0)
        _check_range("max_tokens", self.max_tokens, low=1)
        _check_range("min_tokens", self.min_tokens, low=0, high=self.max_tokens)
        _check_range("seed", self.seed, low=0, high=2**64 - 1)
        if self.logprobs is not None:
            _check_range("logprobs", self.logprobs, low=0, high=MAX_LOGPROBS)


def _check_range(name: str, value: float, *, low: float, high: float = math.inf, low_open: bool = False) -> None:
    """Raise InvalidRequestError, naming the field, unless low <= value <= high (low < value if low_open)."""
    inside = low < value <= high if low_open else low <= value <= high
    if not inside:  # NaN is never inside
        bound = f"more than {low:g}" if low_open else f"at least {low:g}"
        upper = "" if math.isinf(high) else f" and at most {high:g}"
        raise InvalidRequestError(f"{name} must be {bound}{upper}, got {value}", field=name)


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateRequest:
    """One attempt at a client's request."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    attempt: int = 0
    """Grows each time the router tries again; outputs of an old attempt are dropped."""
    priority: int = 0
    """Lower runs earlier."""
    deadline_s: float | None = None
    """Seconds left on arrival."""
    resume_from: tuple[int, ...] = ()
    """Tokens emitted by earlier attempts; generation goes on after them."""
    resumable: bool = False
    """Whether it runs on for a while when whoever asked is gone."""
    age_s: float = 0.0
    """Seconds since its first arrival at a router, when it arrives here: of those alike in priority the oldest is
    served first, and preempted last, however often it had to begin anew."""
    num_preemptions: int = 0
    """How often its earlier attempts ended because their blocks were needed by others."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural-log probabilities at one position, after penalties and before temperature."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """(token id, logprob), likeliest first."""


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """New tokens of one sequence."""

    request_id: str
    attempt: int
    offset: int
    """Index of the first of token_ids in the generated stream."""
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    reason: str = ""
    """Why, when ABORTED, FAILED or PREEMPTED."""
    num_cached_tokens: int = 0
    """Prompt tokens whose KV was found in the prefix cache."""


@dataclass(slots=True)
class EngineStats:
    """Counters and gauges, read by whoever wants metrics."""

    num_running: int = 0
    num_waiting: int = 0
    waiting_tokens: int = 0
    """Tokens not yet computed of waiting sequences."""
    free_blocks: int = 0
    findable_blocks: int = 0
    """Free blocks whose content the prefix cache can still give out."""
    num_blocks: int = 0
    steps: int = 0
    computed_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
