"""The router's own account: plain numbers that whoever wants metrics may read."""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field

LATENCY_BOUNDS_S = (
    0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0,
)  # fmt: skip


@dataclass(slots=True)
class Histogram:
    """Counts of values by upper bound; the last count is of values over all bounds."""

    bounds: tuple[float, ...] = LATENCY_BOUNDS_S
    counts: list[int] = field(default_factory=lambda: [0] * (len(LATENCY_BOUNDS_S) + 1))
    total: float = 0.0
    """Sum of all values."""

    @property
    def num(self) -> int:
        """Values seen."""
        return sum(self.counts)

    def observe(self, value: float | None) -> None:
        """Count a value; None is none."""
        if value is not None:
            self.counts[bisect.bisect_left(self.bounds, value)] += 1
            self.total += value


@dataclass(slots=True)
class RouterStats:
    """Counters since the start, histograms in seconds, and gauges of this moment."""

    outcomes: dict[str, int] = field(default_factory=dict)
    """Ended requests by finish reason (`eos`, `stop`, `length`, `cancelled`) or gRPC status name."""
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    local_prompt_tokens: int = 0
    """Sent to a decode worker to compute, although there are prefill workers."""
    generated_tokens: int = 0
    failed_attempts: int = 0
    """Attempts that another one replaced, or that were the last."""
    ttft_s: Histogram = field(default_factory=Histogram)
    itl_s: Histogram = field(default_factory=Histogram)
    queue_s: Histogram = field(default_factory=Histogram)
    """Arrival until a worker promised its blocks."""
    total_s: Histogram = field(default_factory=Histogram)
    transfer_s: Histogram = field(default_factory=Histogram)
    """What prefill did not hide of the transfer."""
    given_back: int = 0
    """Attempts that ended because a decode worker needed their blocks for others; each went on with another one."""
    moved: int = 0
    """Attempts that ended because their decode worker leaves, or has changed its role; likewise."""
    refused: dict[str, int] = field(default_factory=dict)
    """Refused for what waits already, by reason: `full` or `tenant_full`; `deadline` or `ttft_slo` where that would be
    missed; `waited` where that was known only later."""
    in_flight: int = 0
    queued: int = 0
    workers: dict[str, int] = field(default_factory=dict)
    """Workers by state."""

    def ended(self, outcome: str) -> None:
        """Count the end of a request."""
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1
