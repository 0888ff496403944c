"""How many workers each pool should have: a pure function of what was seen, with its reason in words.

    samples -> needs of the pools (pool_needs) -> pauses, small steps down -> limits (size_limits) -> sizes

A pool grows at once by as much as it needs, and shrinks in small steps, and only when the load would leave a smaller
pool with room to spare. Where the budget is full, and one pool starves while the other would do with less, workers go
from the one to the other. What is here knows nothing of workers by name, of Ray, or of time but what it is told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cluster.load_sample import LoadSample
from cluster.pool_needs import Horizon, Need, decode_need, prefill_need
from cluster.scaling_config import ScalingConfig
from cluster.size_limits import Limits, Sizes

SHRINK_SHARE = 0.15
"""A pool gets smaller by no more than this share of itself at a time, and by one at least."""

HANDED_SHARE = 0.3
"""No more than this share of a pool goes to the other one at a time, and one at least."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """All that a decision depends on."""

    now: float
    """Unix time."""
    samples: Sequence[LoadSample]
    """Oldest first; ten minutes of them are enough."""
    sizes: Mapping[str, int]
    """Wanted workers by pool, as they stand."""
    changed_at: Mapping[str, float]
    """When the wanted size of a pool changed last; a pool that is missing has never changed."""
    scaling: ScalingConfig
    ttft_slo_s: float
    gpus: Mapping[str, float]
    """GPUs that one worker of a pool reserves."""
    split: bool
    """Whether there are two pools; else there is the decode pool alone, whose workers do both jobs."""
    start_s: float
    """Until a new worker is ready."""
    can_change_role: bool
    """Whether a worker can go from one pool to the other in seconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What is wanted now."""

    sizes: dict[str, int]
    reason: str
    """Why the sizes change, or why they do not."""
    details: dict[str, float] = field(default_factory=dict)
    """The figures behind it."""


def decide(inputs: Inputs) -> Outcome:
    """The sizes that are wanted from now on. They keep every limit that can be kept (see size_limits), whatever the
    load; without samples, and for a pool of whose work nothing is known, only the limits decide."""
    pools = ("prefill", "decode") if inputs.split else ("decode",)
    current = {pool: inputs.sizes.get(pool, 0) for pool in pools}
    limits = Limits.of(inputs.scaling, inputs.gpus, split=inputs.split)
    needs = _needs(inputs, current)
    wanted = {pool: _paced(inputs, pool, current[pool], needs[pool]) for pool in pools}
    if inputs.split and inputs.can_change_role:
        wanted = _handed_over(inputs, current, wanted, needs)
    sizes, limited = _within(inputs, limits, current, wanted, needs)
    details = {f"{pool}_needed": float(needs[pool].up) for pool in pools}
    for need in needs.values():
        details.update(need.details)
    return Outcome(sizes=sizes, reason=_reason(inputs, current, wanted, sizes, needs, limited), details=details)


def _needs(inputs: Inputs, current: Sizes) -> dict[str, Need]:
    """What each pool needs; a pool of which nothing is known keeps what it has."""
    samples = inputs.samples
    to = Horizon(scaling=inputs.scaling, ttft_slo_s=inputs.ttft_slo_s, start_s=inputs.start_s)
    found = {
        "prefill": prefill_need(samples, lambda each: each.prefill, to) if samples and inputs.split else None,
        "decode": decode_need(samples, to) if samples else None,
    }
    if samples and not inputs.split and (decode := found["decode"]) is not None:
        prompts = prefill_need(samples, lambda each: each.decode, to)
        if prompts is not None:
            found["decode"] = Need(
                up=max(prompts.up, decode.up),
                down=max(prompts.down, decode.down),
                why=prompts.why if prompts.up > decode.up else decode.why,
                details={**prompts.details, **decode.details},
            )
    return {
        pool: found[pool] or Need(up=num, down=num, why="nothing is known yet of how fast its workers are")
        for pool, num in current.items()
    }


def _since_change(inputs: Inputs, pool: str) -> float:
    return inputs.now - inputs.changed_at.get(pool, float("-inf"))


def _paced(inputs: Inputs, pool: str, current: int, need: Need) -> int:
    """What a pool needs, as far as its pauses allow."""
    since_s, scaling = _since_change(inputs, pool), inputs.scaling
    if need.up > current:
        return need.up if since_s >= scaling.grow_pause_s else current
    if need.down < current and since_s >= scaling.shrink_pause_s:
        return max(need.down, current - max(1, int(SHRINK_SHARE * current)))
    return current


def _handed_over(inputs: Inputs, current: Sizes, wanted: dict[str, int], needs: Mapping[str, Need]) -> dict[str, int]:
    """Where one pool grows and the other has more than it needs, that one gives at once: a worker can come back as
    fast."""
    limits = {"prefill": inputs.scaling.prefill, "decode": inputs.scaling.decode}
    for taker, giver in (("prefill", "decode"), ("decode", "prefill")):
        lacks = wanted[taker] - current[taker]
        spare = current[giver] - max(needs[giver].down, limits[giver].min)
        if lacks > 0 and spare > 0 and _since_change(inputs, giver) >= inputs.scaling.grow_pause_s:
            most = max(1, int(HANDED_SHARE * current[giver]))
            return {**wanted, giver: min(wanted[giver], current[giver] - min(lacks, spare, most))}
    return wanted


def _within(
    inputs: Inputs, limits: Limits, current: Sizes, wanted: Mapping[str, int], needs: Mapping[str, Need]
) -> tuple[dict[str, int], str]:
    """The wanted sizes, or the best that the limits allow; and which limit that was."""
    limit = limits.broken(wanted)
    if limit is None:
        return dict(wanted), ""

    def served(sizes: Sizes) -> tuple[float, ...]:
        """Share of what it needs that each pool has, the worse one first."""
        return tuple(sorted(min(1.0, sizes[pool] / max(1, needs[pool].up)) for pool in sizes))

    def rate(sizes: Sizes) -> tuple[float, ...]:
        away = sum(abs(sizes[pool] - wanted[pool]) for pool in sizes)
        return *served(sizes), -limits.gpus_of(sizes), -float(sum(sizes.values())), -float(away)

    best = limits.best(rate, wanted)
    if best is None:
        return dict(current), f"{limit}, which has no room for one worker of each pool"
    # Whoever has workers that it needs gives them up only where that helps clearly, and not at once again.
    kept = {pool: min(current[pool], wanted[pool]) for pool in current}
    grown = max(limits.at_least(kept).candidates(wanted), key=rate, default=None)
    if grown is None or all(best[pool] >= kept[pool] for pool in kept):
        return best, limit
    may_shift = all(_since_change(inputs, pool) >= _shift_pause(inputs) for pool in current)
    margin = inputs.scaling.hysteresis * (1 if inputs.can_change_role else 2)
    if may_shift and served(best)[0] > served(grown)[0] * (1 + margin) + 1e-9:
        return best, limit
    return grown, limit


def _shift_pause(inputs: Inputs) -> float:
    scaling = inputs.scaling
    return scaling.grow_pause_s if inputs.can_change_role else max(scaling.grow_pause_s, scaling.shrink_pause_s)


def _reason(
    inputs: Inputs, current: Sizes, wanted: Sizes, sizes: Sizes, needs: Mapping[str, Need], limited: str
) -> str:
    parts = []
    for pool, before in current.items():
        need = needs[pool]
        change = f"{pool} {before} -> {sizes[pool]}" if sizes[pool] != before else f"{pool} stays {before}"
        note = ""
        if sizes[pool] < need.up:
            pauses = wanted[pool] < need.up and not limited
            cause = f"it changed {_since_change(inputs, pool):.0f} s ago" if pauses else limited
            note = f"; it needs {need.up}, but {cause}" if cause else f"; it needs {need.up}"
        elif sizes[pool] > need.down and sizes[pool] >= before:
            note = f"; {need.down} would do"
        elif sizes[pool] != wanted[pool] and limited:
            note = f"; {limited}"
        parts.append(f"{change}: {need.why}{note}")
    return ". ".join(parts)
