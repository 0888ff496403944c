"""From what the clients saw to figures: of a run under load, and of requests sent one after another."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.serve_clients import ClientResult, second_gap_s, steady_gap_s
from cluster.load import RequestRecord
from cluster.load_report import LoadReport, Slo, Spread, percentile, summarise

EARLY_S = 20.0
"""As long as the runs in `serve_reference` were."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadFigures:
    """One shape, rate and repeat."""

    shape: str
    prompt_len: int
    rate: float
    repeat: int
    """From 1."""
    num_clients: int
    report: LoadReport
    second_token_s: Spread | None
    """First token to second token."""
    client_lag_s: Spread | None
    """How late the clients' event loops were, every 5 ms."""
    early_ttft_s: Spread | None
    """TTFT of what was due in the first EARLY_S: a queue that is almost full takes longer than that to build up."""
    local_share: float
    """Of the answers, those whose prompt was computed by the worker that decoded it."""

    @classmethod
    def of(
        cls, result: ClientResult, slo: Slo, *, shape: str, prompt_len: int, rate: float, repeat: int, num_clients: int
    ) -> LoadFigures:
        """Of a run's records; latencies are of the requests that were answered whole."""
        whole = [record for record in result.load.records if record.failure is None and record.finished is not None]
        return cls(
            shape=shape,
            prompt_len=prompt_len,
            rate=rate,
            repeat=repeat,
            num_clients=num_clients,
            report=summarise(result.load, slo),
            second_token_s=Spread.of(gap for gap in map(second_gap_s, whole) if gap is not None),
            client_lag_s=Spread.of(result.lags_s),
            early_ttft_s=Spread.of(each.ttft_s for each in whole if each.due_s < EARLY_S and each.ttft_s is not None),
            local_share=sum(map(_was_local, whole)) / max(1, len(whole)),
        )

    @property
    def num_failed(self) -> int:
        """Requests without a whole answer."""
        return self.report.num_requests - self.report.num_completed

    def as_json(self) -> dict[str, Any]:
        """Plain values; seconds."""
        return asdict(self)


def _was_local(record: RequestRecord) -> bool:
    finished = record.finished
    return finished is not None and finished.prefill_worker == finished.decode_worker


@dataclass(frozen=True, slots=True)
class Middle:
    """Few repeated measurements."""

    median: float
    p90: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Middle | None:
        """None where there are no values."""
        ordered = sorted(values)
        return cls(statistics.median(ordered), percentile(ordered, 90), len(ordered)) if ordered else None


@dataclass(frozen=True, kw_only=True, slots=True)
class IdleFigures:
    """Requests one after another: of an idle cluster, or of an engine that serves nobody else."""

    what: str
    prompt_len: int
    ttft_s: Middle | None
    second_token_s: Middle | None
    """First token to second token."""
    itl_s: Middle | None
    """Of each request the median gap from its second token on."""
    num_failed: int = 0
    failure: str = ""
    """What the first request that failed was told."""
    phases_s: dict[str, float]
    """Medians of Finished.timing; empty for an engine alone."""
    transfer_bytes: int = 0
    """Of a request, median."""
    client_lag_s: Spread | None = None
    """How late the client's event loop was, every 5 ms."""
    raw_s: dict[str, list[float]]
    """Every TTFT and second gap, in the order measured."""

    @property
    def second_over_itl_s(self) -> float | None:
        """How much longer the second token takes than one more step: what a slow hand-over costs."""
        if self.second_token_s is None or self.itl_s is None:
            return None
        return self.second_token_s.median - self.itl_s.median

    def as_json(self) -> dict[str, Any]:
        """Plain values; seconds."""
        return asdict(self) | {"second_over_itl_s": self.second_over_itl_s}


_PHASES = ("queue_s", "prefill_s", "transfer_s", "first_decode_step_s", "transfer_busy_s", "ttft_s")


def idle_figures(what: str, prompt_len: int, result: ClientResult) -> IdleFigures:
    """Of a cluster's answers."""
    records = result.load.records
    whole = [record for record in records if record.failure is None and record.finished is not None]
    timings = [record.finished.timing for record in whole if record.finished is not None]
    ttfts = [record.ttft_s for record in whole if record.ttft_s is not None]
    gaps = [gap for gap in map(second_gap_s, whole) if gap is not None]
    return IdleFigures(
        what=what,
        prompt_len=prompt_len,
        ttft_s=Middle.of(ttfts),
        second_token_s=Middle.of(gaps),
        itl_s=Middle.of(gap for gap in map(steady_gap_s, whole) if gap is not None),
        num_failed=len(records) - len(whole),
        failure=next((f"{each.failure}: {each.failure_message}" for each in records if each.failure is not None), ""),
        phases_s={name: statistics.median(getattr(timing, name) for timing in timings) for name in _PHASES if timings},
        transfer_bytes=int(statistics.median(timing.transfer_bytes for timing in timings)) if timings else 0,
        client_lag_s=Spread.of(result.lags_s),
        raw_s={"ttft_s": ttfts, "second_token_s": gaps},
    )


def engine_figures(prompt_len: int, moments: Sequence[Sequence[float]]) -> IdleFigures:
    """Of an engine alone; `moments`: for each request the seconds from its posting to each of its tokens."""
    gaps = [[after - before for before, after in itertools.pairwise(each)] for each in moments]
    ttfts, seconds = [each[0] for each in moments if each], [each[0] for each in gaps if each]
    return IdleFigures(
        what="engine alone",
        prompt_len=prompt_len,
        ttft_s=Middle.of(ttfts),
        second_token_s=Middle.of(seconds),
        itl_s=Middle.of(statistics.median(each[1:]) for each in gaps if len(each) > 1),
        phases_s={},
        raw_s={"ttft_s": ttfts, "second_token_s": seconds},
    )


def mean(values: Iterable[float]) -> float:
    """Of at least one value."""
    each = list(values)
    return math.fsum(each) / len(each)
