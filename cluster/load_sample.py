"""What a cluster has to carry, at one moment: made from what routers and workers say of themselves.

    RouterActor.load(), FrontActor.status() --LoadMeter, which remembers the last ones--> LoadSample

Counters become rates over the time since the sample before. One that has gone back began anew, with its process. A
process that does not answer adds nothing to this sample; what it counted meanwhile is in the next one that has it,
over the time since its own last answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

COUNTERS = (
    "accepted",
    "accepted_prompt_tokens",
    "sent_tokens",
    "routed_prompts",
    "routed_prompt_tokens",
    "routed_missing_tokens",
    "routed_missing_squares",
    "local_prompt_tokens",
    "spilled_prompt_tokens",
)
HISTOGRAMS = ("ttft_s", "itl_s")
READY = "READY"


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolLoad:
    """The workers whose role is that of a pool, and that are ready; all else is of these alone."""

    ready: int = 0
    running: int = 0
    """Requests that they have, those included whose KV is awaited."""
    reserved: int = 0
    """Of these, those whose KV is awaited."""
    kv_share: float = 0.0
    """Share of their blocks that is held or promised, from 0 to 1."""
    place_share: float = 0.0
    """Share of the requests that they may have at a time, from 0 to 1."""
    waiting_tokens: int = 0
    """Of prompts that wait there, or are being computed."""
    tokens_per_s: float = 0.0
    """Prompt tokens that one worker computes in a second, where it computes any; 0: none has yet."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadSample:
    """Load since the sample before, and as it stands."""

    at: float
    """Unix time."""
    span_s: float
    """Seconds that the rates are of."""
    requests_per_s: float = 0.0
    """Requests that come and are not refused."""
    refused_per_s: float = 0.0
    """Requests that are refused for what waits already."""
    prompt_tokens_per_s: float = 0.0
    """Tokens of the prompts that come, with those that are cached."""
    uncached_tokens_per_s: float = 0.0
    """Of these, what a worker has to compute, by what was cached of the prompts that were sent to workers."""
    local_share: float = 0.0
    """Share of what is computed that decode workers compute because it is little, or because they hold most of the
    prompt; not because prefill workers have too much to do."""
    tokens_per_prompt: float = 0.0
    """Mean of what has to be computed of a prompt."""
    prompt_spread: float = 1.0
    """Variance of that over the square of its mean: 0 where all are alike."""
    answer_tokens_per_s: float = 0.0
    """Tokens that are handed to clients."""
    queued_requests: int = 0
    """Waiting at routers, as no worker has room."""
    queued_tokens: int = 0
    """Of their prompts, and of the answers that are expected."""
    ttft_p99_s: float | None = None
    """None: there was no first token."""
    itl_p99_s: float | None = None
    itl_mean_s: float | None = None
    prefill: PoolLoad = field(default_factory=PoolLoad)
    decode: PoolLoad = field(default_factory=PoolLoad)

    def to_plain(self) -> dict[str, float]:
        """Flat numbers, such as prefill_ready; what is not known is left out."""
        plain: dict[str, float] = {}
        for name, value in asdict(self).items():
            if isinstance(value, dict):
                plain.update({f"{name}_{key}": each for key, each in value.items()})
            elif value is not None:
                plain[name] = value
        return plain


@dataclass(slots=True)
class _Known:
    """What one router said last."""

    at: float
    counters: dict[str, float]
    histograms: dict[str, tuple[Sequence[int], float]]
    """Counts and sum."""


class LoadMeter:
    """Makes samples of what routers and workers say; keeps what routers said last."""

    def __init__(self) -> None:
        self._routers: dict[str, _Known] = {}
        self._at: float | None = None
        self._missing_share = 1.0
        """Of prompt tokens, what had to be computed: as of the last time that there were any."""

    def sample(
        self, routers: Mapping[str, Mapping[str, Any]], fronts: Mapping[str, Mapping[str, Any]], now: float
    ) -> LoadSample:
        """The load by now, Unix time; `routers` by id what `RouterActor.load` gave, `fronts` `FrontActor.status`.

        The first sample, and what is heard of a router for the first time, has no rates: there is nothing to compare.
        """
        rates = dict.fromkeys((*COUNTERS, "refused"), 0.0)
        rises = {name: _Rise() for name in HISTOGRAMS}
        for router_id, plain in routers.items():
            known = _known(plain, now)
            before = self._routers.get(router_id)
            self._routers[router_id] = known
            if before is None or now <= before.at:
                continue
            for name, value in known.counters.items():
                rates[name] += _since(value, before.counters[name]) / (now - before.at)
            for name, (counts, total) in known.histograms.items():
                rises[name].add(plain[name]["bounds"], counts, total, *before.histograms[name])
        span_s, self._at = (now - self._at if self._at is not None else 0.0), now
        return self._made(rates, rises, routers.values(), fronts.values(), span_s)

    def _made(
        self,
        rates: Mapping[str, float],
        rises: Mapping[str, _Rise],
        routers: Iterable[Mapping[str, Any]],
        fronts: Iterable[Mapping[str, Any]],
        span_s: float,
    ) -> LoadSample:
        assert self._at is not None, "set by `sample`"
        routers, missing = list(routers), rates["routed_missing_tokens"]
        if rates["routed_prompt_tokens"] > 0:
            self._missing_share = min(1.0, missing / rates["routed_prompt_tokens"])
        mean = missing / rates["routed_prompts"] if rates["routed_prompts"] else 0.0
        square = rates["routed_missing_squares"] / rates["routed_prompts"] if mean else 0.0
        ready = [front for front in fronts if front.get("state") == READY]
        return LoadSample(
            at=self._at,
            span_s=max(0.0, span_s),
            requests_per_s=rates["accepted"],
            refused_per_s=rates["refused"],
            prompt_tokens_per_s=rates["accepted_prompt_tokens"],
            uncached_tokens_per_s=rates["accepted_prompt_tokens"] * self._missing_share,
            local_share=_share(rates["local_prompt_tokens"] - rates["spilled_prompt_tokens"], missing),
            tokens_per_prompt=mean,
            prompt_spread=max(0.0, square / (mean * mean) - 1) if mean else 1.0,
            answer_tokens_per_s=rates["sent_tokens"],
            queued_requests=sum(int(plain.get("queued", 0)) for plain in routers),
            queued_tokens=sum(int(plain.get("queued_tokens", 0)) for plain in routers),
            ttft_p99_s=rises["ttft_s"].percentile(0.99),
            itl_p99_s=rises["itl_s"].percentile(0.99),
            itl_mean_s=rises["itl_s"].mean(),
            prefill=pool_load(front["stats"] for front in ready if front.get("role") == "prefill"),
            decode=pool_load(front["stats"] for front in ready if front.get("role") in ("decode", "both")),
        )


def pool_load(stats: Iterable[Mapping[str, Any]]) -> PoolLoad:
    """Of the ready workers of a pool, from their WorkerStats."""
    workers = list(stats)
    blocks = sum(each["num_blocks"] for each in workers)
    open_of = [each["num_running"] + each["num_waiting"] + each["num_reserved"] for each in workers]
    places = sum(each["free_places"] for each in workers)
    rates = [each["prompt_tokens_per_s"] for each in workers if each["prompt_tokens_per_s"] > 0]
    return PoolLoad(
        ready=len(workers),
        running=sum(open_of),
        reserved=sum(each["num_reserved"] for each in workers),
        kv_share=_share(sum(map(_taken, workers)), blocks),
        place_share=_share(sum(open_of), sum(open_of) + places) if any(map(_has_looked, workers)) else 0.0,
        waiting_tokens=sum(each["waiting_tokens"] for each in workers),
        tokens_per_s=sum(rates) / len(rates) if rates else 0.0,
    )


def _taken(stats: Mapping[str, Any]) -> float:
    """Blocks of a worker that are held or promised; it promises none before it has looked at what it could."""
    held = stats["num_blocks"] - stats["free_blocks"]
    return float(max(held, stats["num_blocks"] - stats["unpromised_blocks"] if _has_looked(stats) else 0, 0))


def _has_looked(stats: Mapping[str, Any]) -> bool:
    """Whether a worker's free places and unpromised blocks mean anything yet; later none may mean that it is full."""
    return bool(stats["expected_answer_tokens"] > 0)


def _share(part: float, whole: float) -> float:
    return min(1.0, max(0.0, part / whole)) if whole > 0 else 0.0


def _since(value: float, before: float) -> float:
    """How much a counter rose; one that has fallen began anew."""
    return value - before if value >= before else value


def _known(plain: Mapping[str, Any], now: float) -> _Known:
    counters = {name: float(plain[name]) for name in COUNTERS}
    counters["refused"] = float(sum(plain["refused"].values()))
    return _Known(now, counters, {name: (plain[name]["counts"], plain[name]["total"]) for name in HISTOGRAMS})


class _Rise:
    """By how much histograms of the same bounds rose."""

    def __init__(self) -> None:
        self._bounds: Sequence[float] = ()
        self._counts: list[float] = []
        self._total = 0.0

    def add(
        self, bounds: Sequence[float], counts: Sequence[int], total: float, before: Sequence[int], total_before: float
    ) -> None:
        """One histogram, now and before."""
        if len(before) != len(counts) or any(new < old for new, old in zip(counts, before, strict=True)):
            before, total_before = [0] * len(counts), 0.0
        rises = [new - old for new, old in zip(counts, before, strict=True)]
        if not self._counts:
            self._bounds, self._counts = bounds, [0.0] * len(counts)
        self._counts = [old + rise for old, rise in zip(self._counts, rises, strict=True)]
        self._total += total - total_before

    def mean(self) -> float | None:
        """None: there were no values."""
        num = sum(self._counts)
        return self._total / num if num else None

    def percentile(self, share: float) -> float | None:
        """Between the bounds by how many values are there; values above the last bound count as that."""
        rest = share * sum(self._counts)
        if not rest:
            return None
        lower = 0.0
        for bound, count in zip(self._bounds, self._counts, strict=False):
            if count and rest <= count:
                return lower + (bound - lower) * rest / count
            rest, lower = rest - count, bound
        return lower


__all__ = ["LoadMeter", "LoadSample", "PoolLoad", "pool_load"]
