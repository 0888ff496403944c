"""The load of a simulated cluster, step by step: a recorded trace, faster, and modulated by stated curves.

The requests of each step are drawn from those that the trace has around that time (WINDOW_S), as many as a Poisson
process of its rate gives, times `scale` and the curves. So each has the lengths and the cached beginning of a real one.
Behind its end the trace begins again, without its first WARM_S, in which nothing was cached yet. What is cached is what
a cache that forgets nothing would hold. Lengths over the model's limit are clipped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cluster.load_trace import BLOCK_TOKENS, TraceLine
from engine.pace import PaceOptions, StepWork

Floats = NDArray[np.float64]

WINDOW_S = 600.0
"""A hundred times the load is a hundred times as many users, not each request a hundred times."""
WARM_S = 600.0
"""So much of the trace only fills the cache."""
BIN_TOKENS = 32
"""Answers are told apart by so many tokens."""
MOST_ANSWER_TOKENS = 4096
NUM_BINS = MOST_ANSWER_TOKENS // BIN_TOKENS
SERVICE_BINS = 40
"""Of the time that a prompt takes, between none and the SLO; one more for those that take longer."""
STEP_TOKENS = 2048
DAY_S = 86400.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Curves:
    """By what the trace is modulated; all of it is off by default."""

    daily: float = 0.0
    """Swing of the rate over a day, as a share: 0.6 goes from 0.4 at midnight to 1.6 at noon."""
    burst: float = 1.0
    """The rate is multiplied by this in bursts, which rise within 5 minutes and hold for 10."""
    burst_every_s: float = 7200.0
    """On average; when they come is drawn."""
    shift: float = 0.0
    """Every 8 hours prompts get longer by exp(shift) and back, and answers shorter; then the other way round."""

    def rate(self, at: Floats, rng: np.random.Generator) -> Floats:
        """Factors of the rate."""
        rate = 1 - self.daily * np.cos(2 * math.pi * at / DAY_S)
        if self.burst != 1.0:
            gaps = rng.exponential(self.burst_every_s, size=max(1, round(2 * float(at[-1]) / self.burst_every_s)))
            for start in np.cumsum(gaps):
                shape = np.clip(np.minimum((at - start) / 300, (start + 1200 - at) / 300), 0, 1)
                rate = rate * (1 + (self.burst - 1) * shape)
        return np.asarray(rate)

    def lengths(self, at: Floats) -> tuple[Floats, Floats]:
        """Factors of prompts and of answers."""
        phase = self.shift * np.sin(2 * math.pi * at / (DAY_S / 3))
        return np.exp(phase), np.exp(-phase)


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What comes in each step."""

    step_s: float
    requests: Floats
    prompt_tokens: Floats
    uncached_tokens: Floats
    uncached_squares: Floats
    work_s: Floats
    """Seconds of one prefill worker."""
    answer_tokens: Floats
    answers: NDArray[np.float32]  # [num_steps, NUM_BINS]
    """Requests by the length of their answer."""
    services: NDArray[np.float32]  # [num_steps, SERVICE_BINS + 1]
    """Requests by the seconds of one prefill worker that they take, up to the SLO."""

    @property
    def num_steps(self) -> int:
        """Steps."""
        return len(self.requests)


def uncached_lengths(lines: Sequence[TraceLine]) -> Floats:
    """Tokens of each prompt that stand in no earlier one behind the same beginning; at least one."""
    seen: set[int] = set()
    missing = []
    for line in lines:
        known = next((i for i, each in enumerate(line.hash_ids) if each not in seen), len(line.hash_ids))
        missing.append(max(1, line.input_length - known * BLOCK_TOKENS))
        seen.update(line.hash_ids)
    return np.array(missing, dtype=float)


def service_s(uncached: Floats, prompt: Floats, pace: PaceOptions) -> Floats:
    """Seconds that a prefill worker takes: whole steps of STEP_TOKENS, each of which reads the KV before it."""
    steps = np.ceil(uncached / STEP_TOKENS)
    fixed = pace.step_s(StepWork(0, 0, 0), 0)
    token = pace.step_s(StepWork(1, 0, 0), 0) - fixed
    kv_token = pace.step_s(StepWork(0, 0, 1), pace.kv_bytes_per_token or 0) - fixed
    read = steps * prompt - STEP_TOKENS * steps * (steps - 1) / 2
    return np.asarray(steps * fixed + uncached * token + read * kv_token)


def make_load(
    lines: Sequence[TraceLine],
    *,
    scale: float,
    curves: Curves,
    duration_s: float,
    step_s: float,
    pace: PaceOptions,
    max_tokens: int,
    slo_s: float,
    seed: int,
) -> Load:
    """Draw a load; the same seed gives the same one."""
    rng = np.random.default_rng(seed)
    times = np.array([line.at_ms for line in lines]) / 1e3
    warm = int(np.searchsorted(times, times[0] + WARM_S))
    times = times[warm:] - times[warm]
    span_s = times[-1] + 1e-3
    known = (
        np.array([line.input_length for line in lines[warm:]], dtype=float),
        uncached_lengths(lines)[warm:],
        np.array([line.output_length for line in lines[warm:]], dtype=float),
    )
    around = np.concatenate([times - span_s, times, times + span_s])
    at = (np.arange(round(duration_s / step_s)) + 0.5) * step_s
    first = np.searchsorted(around, at % span_s - WINDOW_S / 2)
    last = np.searchsorted(around, at % span_s + WINDOW_S / 2)
    counts = rng.poisson((last - first) / WINDOW_S * scale * curves.rate(at, rng) * step_s)
    stretch = curves.lengths(at)
    parts = []
    for some in np.array_split(np.arange(len(at)), max(1, round(counts.sum() / 1e6))):
        parts.append(_drawn(rng, some, counts, (first, last), known, stretch, pace, max_tokens, slo_s))
    columns = [np.concatenate(each) for each in zip(*parts, strict=True)]
    return Load(step_s=step_s, **dict(zip(list(Load.__dataclass_fields__)[1:], columns, strict=True)))


def _drawn(
    rng: np.random.Generator,
    some: NDArray[np.int64],
    counts: NDArray[np.int64],
    window: tuple[NDArray[np.int64], NDArray[np.int64]],
    known: tuple[Floats, Floats, Floats],
    stretch: tuple[Floats, Floats],
    pace: PaceOptions,
    max_tokens: int,
    slo_s: float,
) -> tuple[NDArray[np.floating], ...]:
    """The columns of a load, for some steps."""
    num, step = len(some), np.repeat(np.arange(len(some)), counts[some])
    of = some[step]
    which = window[0][of] + (rng.random(len(of)) * (window[1] - window[0])[of]).astype(int)
    prompt, missing, answer = (each[which % len(each)] for each in known)
    answer = np.clip(np.ceil(answer * stretch[1][of]), 1, MOST_ANSWER_TOKENS - 1)
    longer = np.minimum(prompt * stretch[0][of], max_tokens - answer)
    missing = np.maximum(1.0, missing * longer / prompt)
    work = service_s(missing, longer, pace)

    def summed(values: Floats) -> Floats:
        return np.bincount(step, weights=values, minlength=num)

    answer_bin = (answer // BIN_TOKENS).astype(int)
    service_bin = np.minimum(work / slo_s * SERVICE_BINS, SERVICE_BINS).astype(int)
    answers = np.bincount(step * NUM_BINS + answer_bin, minlength=num * NUM_BINS).reshape(num, NUM_BINS)
    services = np.bincount(step * (SERVICE_BINS + 1) + service_bin, minlength=num * (SERVICE_BINS + 1))
    return (
        counts[some].astype(float),
        summed(longer),
        summed(missing),
        summed(missing**2),
        summed(work),
        summed(answer),
        answers.astype(np.float32),
        services.reshape(num, SERVICE_BINS + 1).astype(np.float32),
    )
