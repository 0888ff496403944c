"""What a step takes on hardware that is not here: a worker rehearses it with a model that is small enough for a laptop.

Pure arithmetic; `engine/paced_runner.py` makes steps take that long.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

MAX_FIXED_MS = 60_000.0
MAX_TOKEN_US = 1e6


@dataclass(frozen=True, slots=True)
class StepWork:
    """What a step has to do, in tokens."""

    prompt_tokens: int
    """Computed for sequences that get more than one."""
    tokens: int
    """Computed for sequences that get one."""
    kv_tokens: int
    """Of whose KV the step reads: the contexts of all its sequences together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PaceOptions:
    """Rehearsal: each step takes at least the time that these costs add up to. `python -m benchmarks.fit_pace` works
    them out from a measurement of the hardware."""

    fixed_ms: float = 0.0
    """What every step costs, in milliseconds."""
    prompt_token_us: float = 0.0
    """Each token of a prompt that the step computes, in microseconds."""
    token_us: float = 0.0
    """Each sequence that the step gives one token, in microseconds."""
    kv_gb_per_s: float | None = None
    """How fast a step reads the KV of its sequences' contexts, in GB/s; default: that costs nothing."""
    kv_bytes_per_token: int | None = None
    """Bytes of one token's KV in the model that is rehearsed; default: in the model that is served."""

    def __post_init__(self) -> None:
        for name, most in (("fixed_ms", MAX_FIXED_MS), ("prompt_token_us", MAX_TOKEN_US), ("token_us", MAX_TOKEN_US)):
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"{name} must be at least 0 and at most {most:g}, got {getattr(self, name)}")
        if self.kv_gb_per_s is not None and not 0 < self.kv_gb_per_s < math.inf:
            raise ValueError(f"kv_gb_per_s must be more than 0, got {self.kv_gb_per_s}")
        if self.kv_bytes_per_token is not None and self.kv_bytes_per_token < 1:
            raise ValueError(f"kv_bytes_per_token must be at least 1, got {self.kv_bytes_per_token}")
        if not (self.fixed_ms or self.prompt_token_us or self.token_us or self.kv_gb_per_s):
            raise ValueError(
                "a pace needs at least one of fixed_ms, prompt_token_us, token_us and kv_gb_per_s; leave `pace` out "
                "where steps shall take their own time"
            )

    def step_s(self, work: StepWork, kv_bytes_per_token: int) -> float:
        """Seconds of a step; `kv_bytes_per_token` is the served model's own."""
        seconds = self.fixed_ms / 1e3
        seconds += (work.prompt_tokens * self.prompt_token_us + work.tokens * self.token_us) / 1e6
        if self.kv_gb_per_s is not None:
            kv_bytes = work.kv_tokens * (self.kv_bytes_per_token or kv_bytes_per_token)
            seconds += kv_bytes / (self.kv_gb_per_s * 1e9)
        return seconds
