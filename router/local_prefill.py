"""When a decode worker computes a prompt itself: the prefill pool is behind, and it has room.

Its running streams pay for it, with steps that are longer by a bounded chunk (`prompt_share` of the engine), so it is
for queues that a moment makes, and its share of all prompt tokens has a limit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

MEMORY_S = 30.0
"""Seconds after which what was sent where counts half."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalPrefillConfig:
    """When decode workers compute prompts themselves (mode split)."""

    max_share: float = 0.25
    """Most of the prompt tokens that decode workers compute, as a share; 0: none."""
    when_waiting_s: float = 0.25
    """Only where a prompt would wait longer than this, in seconds, for the least busy prefill worker."""
    max_load: float = 0.8
    """Only on a decode worker that uses less than this share of its places and of its blocks."""

    def __post_init__(self) -> None:
        for name in ("max_share", "max_load"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        if not self.when_waiting_s >= 0:
            raise ValueError(f"when_waiting_s must be at least 0 seconds, got {self.when_waiting_s}")


class LocalShare:
    """Where a router's prompts were computed, as of late. `now` is on any clock that only grows."""

    def __init__(self, max_share: float) -> None:
        self._max_share = max_share
        self._all = 0.0
        self._local = 0.0
        self._at = 0.0

    def count(self, num_tokens: int, now: float, *, local: bool) -> None:
        """A prompt was sent off."""
        kept = math.exp2(-max(0.0, now - self._at) / MEMORY_S)
        self._at = now
        self._all = self._all * kept + num_tokens
        self._local = self._local * kept + (num_tokens if local else 0)

    def allows(self, num_tokens: int) -> bool:
        """Whether one more prompt may be computed locally; what decays, decays alike."""
        return self._local + num_tokens <= self._max_share * (self._all + num_tokens)
