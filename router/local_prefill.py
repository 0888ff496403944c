"""When a decode worker computes a prompt itself instead of a prefill worker.

    short    few of its tokens are not cached there
    held     it holds more of the prompt than the prefill worker does, as after an answer that it gave itself
    waits    the prompt would wait too long for a prefill worker

and, but for short ones, only if its first token is to come sooner so. The worker's running streams pay for it with
steps that are longer by a bounded chunk (`prompt_share` of the engine); so it must have room, and what is computed this
way has a limit as a share of all prompt tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from router.info import WorkerInfo
from router.reckoning import Reckoning

MEMORY_S = 30.0
"""Seconds after which what was sent where counts half."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalPrefillConfig:
    """When decode workers compute prompts themselves (mode split)."""

    max_share: float = 0.25
    """Most that decode workers compute of all prompt tokens, as a share; 0: nothing."""
    short_tokens: int = 32
    """A prompt of which no more than so many tokens are missing on a decode worker is computed there."""
    when_waiting_s: float = 0.25
    """So is one that would wait longer than this, in seconds, for the least busy prefill worker."""
    max_load: float = 0.8
    """Only on a decode worker that uses less than this share of its places and of its blocks."""

    def __post_init__(self) -> None:
        for name in ("max_share", "max_load"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        for name in ("short_tokens", "when_waiting_s"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")


class LocalChoice(NamedTuple):
    """The decode worker that should compute a prompt itself."""

    worker: WorkerInfo
    why: str
    spills: bool = False
    """Whether only because the prefill workers have too much to do."""


class LocalShare:
    """Where a router's prompts were computed, as of late. `now` is on any clock that only grows."""

    def __init__(self, max_share: float) -> None:
        self._max_share = max_share
        self._all = 0.0
        self._local = 0.0
        self._at = 0.0

    def count(self, num_tokens: int, num_local: int, now: float) -> None:
        """A prompt was sent off, of which so many tokens are computed by a decode worker."""
        kept = math.exp2(-max(0.0, now - self._at) / MEMORY_S)
        self._at = now
        self._all = self._all * kept + num_tokens
        self._local = self._local * kept + num_local

    def take_back(self, num_tokens: int, num_local: int) -> None:
        """A prompt that was counted a moment ago was not taken in."""
        self._all = max(0.0, self._all - num_tokens)
        self._local = max(0.0, self._local - num_local)

    def allows(self, num_tokens: int, num_local: int) -> bool:
        """Whether such a prompt may be computed locally; what decays, decays alike."""
        return self._local + num_local <= self._max_share * (self._all + num_tokens)


def why_local(
    decoders: Sequence[WorkerInfo], prefiller: WorkerInfo, reckon: Reckoning, config: LocalPrefillConfig
) -> LocalChoice | None:
    """The decode worker that should compute the prompt itself, and why; None: the prefill worker does.

    Where the prompt is short for several, the one that holds most of it is not to get all of its kind: load counts too.
    """
    free = [info for info in decoders if reckon.load(info) < config.max_load]
    if not free:
        return None
    if short := [info for info in free if reckon.missing(info) <= config.short_tokens]:
        best = min(short, key=reckon.both_s)
        return LocalChoice(best, f"{reckon.missing(best)} tokens are missing there")
    best = min(free, key=reckon.local_s)
    missing, wait_s = reckon.missing(best), reckon.wait_s(prefiller)
    if reckon.local_s(best) >= reckon.split_s(prefiller):
        return None
    if missing < reckon.missing(prefiller):
        why = f"{missing} tokens are missing there, {reckon.missing(prefiller)} at {prefiller.label}"
        return LocalChoice(best, why)
    if wait_s > config.when_waiting_s:
        return LocalChoice(best, f"{wait_s:.2f} s to wait at {prefiller.label}", spills=True)
    return None
