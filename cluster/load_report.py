"""Statistics of a load measurement, for people (a table) and for programs (plain values).

TTFT    due (open loop) or sent (closed loop) to the first token received
ITL     the gap between two tokens of a stream; all gaps of all requests together
TPOT    the mean of one request's ITLs
E2E     due or sent to the end of the stream
goodput requests per second that were answered whole within the SLO
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cluster.load import LoadResult, RequestRecord
from cluster.waterfall import PHASES, hidden_share

_TOLERATED_GAPS = 0.01


@dataclass(frozen=True, kw_only=True, slots=True)
class Slo:
    """What an answer must keep to be good; None: no bound."""

    ttft_s: float | None = None
    itl_s: float | None = None
    """Bound on all but 1 % of the answer's own ITLs."""

    def __post_init__(self) -> None:
        for name in ("ttft_s", "itl_s"):
            value = getattr(self, name)
            if value is not None and not value > 0.0:
                raise ValueError(f"the SLO's {name} must be more than 0, got {value}")

    def kept_by(self, record: RequestRecord) -> bool:
        """Whether the request was answered whole and in time."""
        if record.failure is not None or record.ttft_s is None:
            return False
        if self.ttft_s is not None and record.ttft_s > self.ttft_s:
            return False
        if self.itl_s is None:
            return True
        gaps = record.itls_s()
        return sum(gap > self.itl_s for gap in gaps) <= len(gaps) * _TOLERATED_GAPS


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """How a quantity is distributed over `count` values."""

    p50: float
    p90: float
    p99: float
    mean: float
    max: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        """None where there are no values."""
        ordered = sorted(values)
        if not ordered:
            return None
        return cls(
            p50=percentile(ordered, 50),
            p90=percentile(ordered, 90),
            p99=percentile(ordered, 99),
            mean=math.fsum(ordered) / len(ordered),
            max=ordered[-1],
            count=len(ordered),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadReport:
    """One measurement in figures; latencies are of requests that were answered whole."""

    model: str
    paced: bool
    """Whether workers took the time of other hardware: the figures are a rehearsal, not a measurement."""
    wall_s: float
    num_requests: int
    num_completed: int
    failures: dict[str, int]
    """Requests without a whole answer, by the status they ended with."""
    failure_messages: dict[str, str]
    """What the first request of each status was told."""
    requests_per_s: float
    output_tokens_per_s: float
    prompt_tokens_per_s: float
    goodput_per_s: float
    """Requests per second that kept the SLO."""
    slo: Slo
    ttft_s: Spread | None
    tpot_s: Spread | None
    itl_s: Spread | None
    e2e_s: Spread | None
    send_lag_s: Spread | None
    """Due to sent: a large one says that this client, not the server, was late."""
    phases_s: dict[str, float]
    """Mean seconds of each phase of Finished.timing."""
    prompt_tokens: int
    cached_share: float
    """Share of prompt tokens whose KV was already there."""
    transfer_bytes: int
    hidden_transfer_share: float | None
    """Share of the transfer's time that prefill hid, 1 - sum(transfer_s) / sum(transfer_busy_s)."""

    def as_json(self) -> dict[str, Any]:
        """Plain values for json.dumps; seconds and bytes."""
        return asdict(self)


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The value below which `percent` of the ascending, non-empty `ordered` lie, between neighbours linearly."""
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summarise(result: LoadResult, slo: Slo) -> LoadReport:
    """The figures of a measurement."""
    records = result.records
    whole = [record for record in records if record.failure is None and record.finished is not None]
    usages = [record.finished.usage for record in whole if record.finished is not None]
    gaps = [record.itls_s() for record in whole]
    wall_s = max(result.wall_s, 1e-9)
    prompt_tokens = sum(usage.prompt_tokens for usage in usages)
    return LoadReport(
        model=result.model,
        paced=result.paced,
        wall_s=result.wall_s,
        num_requests=len(records),
        num_completed=len(whole),
        failures=dict(Counter(record.failure for record in records if record.failure is not None)),
        failure_messages={
            record.failure: record.failure_message for record in reversed(records) if record.failure is not None
        },
        requests_per_s=len(whole) / wall_s,
        output_tokens_per_s=sum(record.num_tokens for record in whole) / wall_s,
        prompt_tokens_per_s=prompt_tokens / wall_s,
        goodput_per_s=sum(slo.kept_by(record) for record in whole) / wall_s,
        slo=slo,
        ttft_s=Spread.of(record.ttft_s for record in whole if record.ttft_s is not None),
        tpot_s=Spread.of(math.fsum(each) / len(each) for each in gaps if each),
        itl_s=Spread.of(gap for each in gaps for gap in each),
        e2e_s=Spread.of(record.e2e_s for record in whole),
        send_lag_s=Spread.of(record.sent_s - record.due_s for record in records),
        prompt_tokens=prompt_tokens,
        cached_share=sum(usage.cached_prompt_tokens for usage in usages) / prompt_tokens if prompt_tokens else 0.0,
        **_timing_figures(whole),
    )


def _timing_figures(whole: list[RequestRecord]) -> dict[str, Any]:
    timings = [record.finished.timing for record in whole if record.finished is not None]
    count = len(timings) or 1
    return {
        "phases_s": {
            field.removesuffix("_s"): math.fsum(getattr(timing, field) for timing in timings) / count
            for _, field in PHASES
        },
        "transfer_bytes": sum(timing.transfer_bytes for timing in timings),
        "hidden_transfer_share": hidden_share(
            math.fsum(timing.transfer_s for timing in timings if timing.transfer_busy_s > 0),
            math.fsum(timing.transfer_busy_s for timing in timings),
        ),
    }


_LATENCIES = (("TTFT", "ttft_s"), ("TPOT", "tpot_s"), ("ITL", "itl_s"), ("E2E", "e2e_s"))


def rows(report: LoadReport) -> list[tuple[str, str]]:
    """Every figure as (name, text), in the order in which a table shows them."""
    failures = ", ".join(f"{count} {name}" for name, count in sorted(report.failures.items())) or "0"
    table = [
        ("requests answered", f"{report.num_completed} of {report.num_requests} in {report.wall_s:.1f} s"),
        ("failed", failures),
        ("requests/s", f"{report.requests_per_s:.2f}"),
        ("output tokens/s", f"{report.output_tokens_per_s:.1f}"),
        ("prompt tokens/s", f"{report.prompt_tokens_per_s:.1f}"),
        (f"goodput/s ({_slo_text(report.slo)})", f"{report.goodput_per_s:.2f}"),
    ]
    if report.paced:
        table.insert(0, ("workers", "paced: a rehearsal, not a measurement"))
    for name, field in _LATENCIES:
        table.append((f"{name} p50 / p90 / p99, ms", _spread_text(getattr(report, field))))
    table += [
        (f"mean {label}, ms", f"{report.phases_s[field.removesuffix('_s')] * 1e3:.1f}") for label, field in PHASES
    ]
    table.append(("prompt tokens cached", f"{report.cached_share:.0%}"))
    if report.hidden_transfer_share is not None:
        table.append(("KV transferred, MiB", f"{report.transfer_bytes / 2**20:.1f}"))
        table.append(("transfer hidden behind prefill", f"{report.hidden_transfer_share:.0%}"))
    if report.send_lag_s is not None:
        table.append(("client's send lag p99, ms", f"{report.send_lag_s.p99 * 1e3:.1f}"))
    return table


def markdown_table(reports: Mapping[str, LoadReport]) -> str:
    """A Markdown table with a column per report; a figure that a report lacks is a dash."""
    columns = {name: dict(rows(report)) for name, report in reports.items()}
    names = list(dict.fromkeys(row for column in columns.values() for row in column))
    names.sort(key=lambda name: name.startswith("client's"))
    lines = [f"| | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    for name in names:
        lines.append(f"| {name} | {' | '.join(column.get(name, '–') for column in columns.values())} |")
    return "\n".join(lines)


def _spread_text(spread: Spread | None) -> str:
    if spread is None:
        return "–"
    return " / ".join(f"{value * 1e3:.1f}" for value in (spread.p50, spread.p90, spread.p99))


def _slo_text(slo: Slo) -> str:
    bounds = (("TTFT", slo.ttft_s), ("ITL", slo.itl_s))
    return ", ".join(f"{name} ≤ {bound * 1e3:g} ms" for name, bound in bounds if bound is not None) or "no SLO"
