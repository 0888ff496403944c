"""The router's own account: plain numbers that whoever wants metrics may read."""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field

LATENCY_BOUNDS_S = (
    0.001, 0.002, 0.003, 0.004, 0.005, 0.006, 0.0075, 0.01, 0.0125, 0.015, 0.02, 0.025, 0.03, 0.035, 0.04, 0.05, 0.06,
    0.075, 0.1, 0.125, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0,
    60.0,
)  # fmt: skip
"""Close enough to each other for an autoscaler to read a p99 between them."""


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
class Routed:
    """Prompts that were sent to workers, counted when a decode worker has promised its blocks."""

    prompt_tokens: int = 0
    """With what is cached, and with what had been generated before another attempt."""
    missing_tokens: int = 0
    """Of these, what the worker that was to compute them did not hold."""
    missing_squares: float = 0.0
    """Sum of the squares of that, by prompt: how unlike they are."""
    prompts: int = 0
    local_tokens: int = 0
    """Of those missing, sent to a decode worker although there are prefill workers."""
    spilled_tokens: int = 0
    """Of these, sent there only because the prefill workers had too much to do."""

    def count(self, *, prompt_tokens: int, missing: int, is_local: bool, spills: bool) -> None:
        """A prompt has its place."""
        self.prompts += 1
        self.prompt_tokens += prompt_tokens
        self.missing_tokens += missing
        self.missing_squares += float(missing) * missing
        if is_local:
            self.local_tokens += missing
        if spills:
            self.spilled_tokens += missing


@dataclass(slots=True)
class RouterStats:
    """Counters since the start, histograms in seconds, and gauges of this moment."""

    outcomes: dict[str, int] = field(default_factory=dict)
    """Ended requests by finish reason (`eos`, `stop`, `length`, `cancelled`) or gRPC status name."""
    accepted: int = 0
    """Requests that were not refused for what they ask."""
    accepted_prompt_tokens: int = 0
    """Theirs, counted when they come."""
    sent_tokens: int = 0
    """Of answers, counted when they are handed to the client."""
    routed_prompts: int = 0
    """Sent to workers: see Routed."""
    routed_prompt_tokens: int = 0
    routed_missing_tokens: int = 0
    routed_missing_squares: float = 0.0
    spilled_prompt_tokens: int = 0
    prompt_tokens: int = 0
    """Of requests that have ended; so are the cached and the generated ones."""
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
    queued_tokens: int = 0
    """Of the prompts that wait in the line, and of the answers that are expected to them."""
    workers: dict[str, int] = field(default_factory=dict)
    """Workers by state."""

    def ended(self, outcome: str) -> None:
        """Count the end of a request."""
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1
