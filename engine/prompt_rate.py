"""How many prompt tokens an engine computes in a second of its steps, as of late: what a router reckons queues with."""

from __future__ import annotations

import math

from engine.batch import StepPlan

MEMORY_S = 20.0
"""Seconds of steps with prompts after which a measurement counts half."""


class PromptRate:
    """A mean over steps that compute prompts, recent ones counting more. The loop's thread adds, any may read."""

    def __init__(self) -> None:
        self.tokens_per_s = 0.0
        """0 until there has been a prompt."""
        self._tokens = 0.0
        self._seconds = 0.0

    def add(self, plan: StepPlan, seconds: float) -> None:
        """A step took so long, beside whatever else it computed."""
        tokens = sum(share.num_tokens for share in plan.shares if share.num_tokens > 1)
        if not tokens or seconds <= 0:
            return
        kept = math.exp2(-seconds / MEMORY_S)
        self._tokens = self._tokens * kept + tokens
        self._seconds = self._seconds * kept + seconds
        self.tokens_per_s = self._tokens / self._seconds
