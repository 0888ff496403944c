"""What a user may set about admission to a decode worker."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeOptions:
    """How freely a decode worker promises its KV blocks."""

    predicted_answer_tokens: int = 256
    """Tokens an answer is expected to grow to when its max_tokens is larger, until a worker has seen enough answers
    to go by those: blocks for them are kept in hand on admission. Where the guess is too low, the youngest sequence
    is preempted."""
    answer_margin: float = 1.2
    """What answers are expected to grow by is kept in hand so many times: more, and fewer sequences are preempted;
    less, and more run at a time; 0 keeps nothing in hand."""
    give_back_tokens: int = 512
    """A sequence that is preempted with at least so many tokens, whose prompt a prefill worker computed, goes back to
    its router, which has a prefill worker compute it again; one with fewer is computed again where it is."""

    orphan_grace_s: float = 15.0
    """Seconds that a resumable request runs on when its router is gone, and its tokens are kept, until another router
    adopts it."""

    def __post_init__(self) -> None:
        if self.predicted_answer_tokens < 0:
            raise ValueError(f"predicted_answer_tokens must not be negative, got {self.predicted_answer_tokens}")
        if not 0 <= self.orphan_grace_s <= 3600:
            raise ValueError(f"orphan_grace_s must be between 0 and 3600 seconds, got {self.orphan_grace_s}")
        if self.give_back_tokens < 1:
            raise ValueError(f"give_back_tokens must be at least 1, got {self.give_back_tokens}")
        if not 0 <= self.answer_margin <= 100:
            raise ValueError(f"answer_margin must be between 0 and 100, got {self.answer_margin}")
