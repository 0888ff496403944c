"""How many workers the load asks of each pool. Pure arithmetic over samples, before any limit.

prefill   uncached prompt tokens that come in a second, over what a worker computes in a second; and so many that 99 %
          wait no longer than the TTFT SLO leaves beside the computing itself; and what has piled up
decode    blocks held or promised and places taken, each against what a worker has; and what the ITL leaves of that

Either is looked at for the time at which a worker that is started now would be ready.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cluster.forecast import MOST_SERVERS, Line, Points, ahead, line, peak, recent, servers_for, trend
from cluster.load_sample import LoadSample, PoolLoad
from cluster.scaling_config import ScalingConfig

LARGE_PROMPT = 3.0
"""Standard deviations above the mean at which a prompt is taken for one of the largest."""
LEAST_WAIT_SHARE = 0.2
"""Share of the TTFT SLO that may be spent waiting, even if the largest prompts take longer than the rest of it."""
CATCH_UP_S = (10.0, 60.0)
"""Within the start-up time, but no less and no more than this, what has piled up is to be gone."""
MAX_REFUSED = 1.0
"""Refused requests come again and are counted again; they add no more than this share to the load."""
MAX_QUEUED = 2.0
"""Those that wait at routers add no more than so many times what the decode pool has."""
USUAL_RISE = 2.0
"""By how many times its fixed part a step is longer where a worker is full, until that is seen."""
CAREFUL_RISE = 7.0
"""The same where a pool is to shrink: reading KV may be almost all of a step (an H200 with an 8B model), and then a
little less room fills the workers that are left by much."""
SATURATED = 0.95
"""Load from which on a worker is taken to be full."""
LEAST_ITL_S = 1e-6
LEAST_LOAD = 0.1
"""An ITL over its SLO asks for no more workers than would bring each to this load: if that does not help, the ITL does
not come from the load."""
FEW = 12
"""Samples of which the least share of awaited KV is taken for the usual one: more is due to the prefill pool."""
PATIENCE = 3
"""Samples in a row that must say so before a measured TTFT asks for a worker."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Horizon:
    """What needs are worked out for."""

    scaling: ScalingConfig
    ttft_slo_s: float
    start_s: float

    @property
    def trend_s(self) -> float:
        """How far back a trend is looked for."""
        return min(600.0, max(60.0, 2 * self.start_s))


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """Of one pool."""

    up: int
    """It should have no fewer workers."""
    down: int
    """It should have no more; never less than `up`."""
    why: str
    details: dict[str, float] = field(default_factory=dict)


def prefill_need(samples: Sequence[LoadSample], pool: Callable[[LoadSample], PoolLoad], to: Horizon) -> Need | None:
    """Of the pool that computes the prompts; None: nothing is known of how fast it does."""
    newest, scaling = samples[-1], to.scaling
    rate = _rate(samples, pool)
    if rate is None:
        return None
    # 1. What comes, and what it may have risen to.
    points = [(each.at, _prompt_load(each)) for each in samples]
    level, rise = recent(points), trend(points, to.trend_s)
    expected = ahead(level, rise, to.start_s)
    # 2. What has piled up beyond what is being worked off in time anyway.
    mean, spread = _prompt_size(samples)
    largest_s = mean * (1 + LARGE_PROMPT * math.sqrt(spread)) / rate
    wait_s = max(to.ttft_slo_s - largest_s, LEAST_WAIT_SHARE * to.ttft_slo_s)
    ready, usual = pool(newest).ready, pool(newest).ready * rate * wait_s / 2
    backlog = float(pool(newest).waiting_tokens)
    if backlog > usual:
        backlog += newest.queued_requests * mean
    piled = max(0.0, backlog - usual) / min(max(to.start_s, CATCH_UP_S[0]), CATCH_UP_S[1])

    # 3. How many workers that takes.
    def workers(tokens_per_s: float) -> int:
        work = tokens_per_s / rate
        return max(
            _whole(work / (1 - scaling.headroom)),
            servers_for(work, mean / rate, spread, wait_s),
        )

    up = workers(expected + piled)
    if backlog > usual and _is_late(samples, to.ttft_slo_s):
        up = max(up, ready + 1)
    held = max(expected + piled, peak(points, scaling.shrink_pause_s))
    why = (
        f"{level:,.0f} uncached tokens/s arrive{_trend_words(level, rise, expected)}, {up} workers of {rate:,.0f}/s "
        f"keep the p99 wait under {wait_s:.2g} s"
    )
    if piled:
        why += f" and work off {backlog:,.0f} tokens that wait"
    return Need(
        up=up,
        down=max(up, workers(held * (1 + scaling.hysteresis))),
        why=why,
        details={
            "prompt_tokens_per_s": level,
            "expected_prompt_tokens_per_s": expected,
            "worker_tokens_per_s": rate,
            "prompt_wait_slo_s": wait_s,
            "prompt_backlog_tokens": backlog,
        },
    )


def decode_need(samples: Sequence[LoadSample], to: Horizon) -> Need | None:
    """Of the pool that generates the tokens; None: none of its workers has been heard."""
    heard = [each for each in samples if each.decode.ready]
    if not heard:
        return None
    scaling = to.scaling
    points, load, itl_s = _decode_points(heard)
    # 1. The load at which a worker is full, be it of KV, of requests, or for the ITL.
    pairs = [(_generating(each), max(LEAST_ITL_S, each.itl_mean_s)) for each in heard if each.itl_mean_s]
    usual, careful = line(pairs, USUAL_RISE), line(pairs, CAREFUL_RISE)
    late_s, tail = _itl_p99(heard)
    awaited = min(map(_awaited, heard[-FEW:]))

    def full_load(itl: Line) -> float:
        by_itl = max(itl.reaches(scaling.itl_slo_s / tail), LEAST_LOAD, load / 2) if late_s else 1.0
        return min(max(0.1, 1 - awaited), by_itl) * (1 - scaling.headroom)

    full = full_load(usual)
    # 2. What comes, in requests' KV that is read in a second: that stays the same whatever the number of workers.
    #    Where workers are full it is what they can do, and tells no trend.
    free = [point for point, each in zip(points, heard, strict=True) if _load(each) < SATURATED]
    level, rise = recent(points), trend(free, to.trend_s)
    expected = max(ahead(level, rise, to.start_s), level * _arrivals_rise(heard, to))

    def workers(reads_per_s: float, itl: Line) -> int:
        if load <= 0 or reads_per_s <= 0:
            return 0
        full = full_load(itl)
        return _whole(reads_per_s * itl_s * itl.at(full) / itl.at(load) / full)

    up = workers(expected, usual)
    held = max(expected, peak(points, scaling.shrink_pause_s))
    return Need(
        up=up,
        down=max(up, workers(held * (1 + scaling.hysteresis), careful)),
        why=(
            f"{_decode_words(heard[-1], late_s, scaling.itl_slo_s)}{_trend_words(level, rise, expected)}, "
            f"{up} workers stay under {full:.0%}"
        ),
        details={
            "decode_load": load,
            "decode_full_load": full,
            "decode_running": float(heard[-1].decode.running),
            "itl_p99_s": late_s,
            "decode_expected_rise": expected / level - 1 if level else 0.0,
        },
    )


def _decode_words(newest: LoadSample, late_s: float, slo_s: float) -> str:
    queued = f", {newest.queued_requests} requests wait for room" if newest.queued_requests else ""
    itl = f", ITL p99 {late_s * 1e3:.1f} of {slo_s * 1e3:g} ms" if late_s else ""
    what = "KV" if newest.decode.kv_share >= newest.decode.place_share else "places"
    return f"{_load(newest):.0%} of the {what} of {newest.decode.ready} workers taken{queued}{itl}"


def _whole(workers: float) -> int:
    return math.ceil(min(float(MOST_SERVERS), workers) - 1e-9)


def _prompt_load(sample: LoadSample) -> float:
    """Tokens a second that ask for a prefill worker, those of refused requests included."""
    refused = min(MAX_REFUSED, sample.refused_per_s / sample.requests_per_s) if sample.requests_per_s else 0.0
    return sample.uncached_tokens_per_s * (1 - sample.local_share) * (1 + refused)


def _prompt_size(samples: Sequence[LoadSample]) -> tuple[float, float]:
    """Tokens of a prompt that have to be computed: mean, and variance over its square, of those that came of late."""
    known = [each for each in samples[-12:] if min(each.tokens_per_prompt, each.requests_per_s) > 1e-6]
    weight = sum(each.requests_per_s for each in known)
    if not weight:
        return 0.0, 0.0
    mean = sum(each.requests_per_s * each.tokens_per_prompt for each in known) / weight
    square = sum(each.requests_per_s * each.tokens_per_prompt**2 * (1 + each.prompt_spread) for each in known) / weight
    return mean, max(0.0, square / (mean * mean) - 1)


def _rate(samples: Sequence[LoadSample], pool: Callable[[LoadSample], PoolLoad]) -> float | None:
    """Prompt tokens a second of one worker: of the pool as of late, else of the other one."""
    rates = [pool(each).tokens_per_s for each in samples if pool(each).tokens_per_s > 0]
    rates = rates or [each.decode.tokens_per_s for each in samples if each.decode.tokens_per_s > 0]
    return sum(rates[-3:]) / len(rates[-3:]) if rates else None


def _is_late(samples: Sequence[LoadSample], slo_s: float) -> bool:
    late = [each.ttft_p99_s for each in samples[-PATIENCE:] if each.ttft_p99_s is not None]
    return len(late) == PATIENCE and min(late) > slo_s


def _load(sample: LoadSample) -> float:
    return max(sample.decode.kv_share, sample.decode.place_share)


def _arrivals_rise(samples: Sequence[LoadSample], to: Horizon) -> float:
    """What the requests that come may have risen to, over what they are: what they bring to generate follows later."""
    points = [(each.at, each.requests_per_s) for each in samples]
    level = recent(points)
    return ahead(level, trend(points, to.trend_s), to.start_s) / level if level else 1.0


def _awaited(sample: LoadSample) -> float:
    """Share of the requests of decode workers whose KV is not there yet."""
    return min(1.0, sample.decode.reserved / sample.decode.running) if sample.decode.running else 0.0


def _generating(sample: LoadSample) -> float:
    """The load without those."""
    return _load(sample) * (1 - _awaited(sample))


def _decode_points(heard: Sequence[LoadSample]) -> tuple[Points, float, float]:
    """KV that is read in a second, in workers' whole KV, by sample; and load and ITL of late."""
    itl_s = next((each.itl_mean_s for each in heard if each.itl_mean_s), 1.0)
    reads, loads, itls = [], [], []
    for each in heard:
        itl_s = max(LEAST_ITL_S, each.itl_mean_s or itl_s)
        queued = min(MAX_QUEUED, each.queued_requests / max(1, each.decode.running)) * (1 - _awaited(each))
        reads.append((each.at, each.decode.ready * _generating(each) * (1 + queued) / itl_s))
        loads.append((each.at, _generating(each)))
        itls.append((each.at, itl_s))
    return reads, recent(loads), recent(itls)


def _itl_p99(heard: Sequence[LoadSample]) -> tuple[float, float]:
    """The ITL's p99 as of late, and over its mean; 0 and 1 if there was no token."""
    found = [each for each in heard[-PATIENCE:] if each.itl_p99_s and each.itl_mean_s]
    if not found:
        return 0.0, 1.0
    late_s = statistics.median(each.itl_p99_s or 0.0 for each in found)
    tail = statistics.median((each.itl_p99_s or 0.0) / max(LEAST_ITL_S, each.itl_mean_s or 0.0) for each in found)
    return late_s, max(1.0, tail)


def _trend_words(level: float, rise_per_s: float, expected: float) -> str:
    if not level or expected <= level * 1.005:
        return ""
    return f" (trend {rise_per_s * 60 / level:+.0%}/min)".replace("%", " %")
