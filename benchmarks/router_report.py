"""What a router's benchmark found, and its table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.router_decisions import TARGET_US

MESSAGES_PER_S = 20_000
"""The bound for one router on one core; latency is measured at half of it."""
P50_MS, P99_MS = 1.0, 5.0


@dataclass(frozen=True)
class Rate:
    """Tokens of long streams."""

    routers: int
    """0: a bare gRPC server in the router's place."""
    messages_per_s: float
    one_token_share: float
    """Of all messages."""
    cpu_us: float
    """Of the routers, for each message."""


@dataclass(frozen=True)
class Delay:
    """Of all tokens, from just before a step is written to the client that has read it; milliseconds."""

    p50_ms: float
    p99_ms: float

    @classmethod
    def of(cls, taken_s: Sequence[float]) -> Delay:
        """Their quantiles."""
        ordered = sorted(taken_s)
        p50, p99 = (1e3 * ordered[int(share * len(ordered))] for share in (0.5, 0.99))
        return cls(p50, p99)


@dataclass(frozen=True)
class Latency:
    """At a fixed pace."""

    streams_a_step: int
    messages_per_s: float
    one_token_share: float
    cpu_share: float
    """Of the router's core that was used."""
    routed: Delay
    direct: Delay
    """The same from a bare gRPC server in the router's place."""

    def rows(self) -> list[str]:
        """Of the table."""
        pace = f"{self.messages_per_s:,.0f} messages/s, {self.streams_a_step} a step"
        rows = []
        for name, routed, direct, bound in (
            ("p50", self.routed.p50_ms, self.direct.p50_ms, P50_MS),
            ("p99", self.routed.p99_ms, self.direct.p99_ms, P99_MS),
        ):
            reached = f"{routed - direct:.2f} ms ({routed:.2f} - {direct:.2f})"
            rows.append(
                f"| added latency at {pace}: {name} | {reached} | {self.cpu_share:.0%} of a core | | {bound:g} ms |"
            )
        return rows


@dataclass(frozen=True)
class Requests:
    """Answers of two tokens."""

    mode: str
    requests_per_s: float
    cpu_us: float
    """Of the router, for each request."""


@dataclass(frozen=True)
class Report:
    """Everything that was measured."""

    cores: int
    rates: list[Rate]
    latencies: list[Latency]
    requests: list[Requests]
    stream_kib: float
    """Resident memory of the router for each open stream."""
    decision_us: float
    """The median of a choice among 1,000 workers, for the kind of prompts that takes longest."""


def table(report: Report) -> str:
    """Markdown."""
    lines = [
        "| measured | reached | router's CPU | by that, per core-second | bound |",
        "|---|---:|---:|---:|---:|",
    ]
    for rate in report.rates:
        which = {0: "a bare gRPC server", 1: "1 router"}.get(rate.routers, f"{rate.routers} routers at once")
        lines.append(
            f"| messages/s, {which}, {rate.one_token_share:.1%} of one token | {rate.messages_per_s:,.0f} "
            f"| {rate.cpu_us:.1f} µs each | {1e6 / rate.cpu_us:,.0f} "
            f"| {f'{rate.routers * MESSAGES_PER_S:,}' if rate.routers else ''} |"
        )
    for latency in report.latencies:
        lines += latency.rows()
    for requests in report.requests:
        lines.append(
            f"| requests/s of 2 tokens, {requests.mode} | {requests.requests_per_s:,.0f} "
            f"| {requests.cpu_us:,.0f} µs each | {1e6 / requests.cpu_us:,.0f} | |"
        )
    lines.append(f"| memory for each open stream | {report.stream_kib:.0f} KiB | | | |")
    lines.append(f"| a choice among 1,000 workers, p50 | {report.decision_us:.0f} µs | | | {TARGET_US:.0f} µs |")
    return "\n".join(lines)
