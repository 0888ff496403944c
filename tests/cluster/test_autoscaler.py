"""Decisions of the autoscaler: what decides, in words; limits that always hold; calm under a constant load."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from cluster.autoscaler import Inputs, Outcome, decide
from cluster.load_sample import LoadSample, PoolLoad
from cluster.scaling_config import PoolLimits, ScalingConfig
from cluster.size_limits import Limits

WIDE = PoolLimits(min=1, max=50)
SCALING = ScalingConfig(mode="on", prefill=WIDE, decode=WIDE, itl_slo_s=0.05, headroom=0.2, hysteresis=0.15)
NOW = 10_000.0


def sample(at: float = NOW, *, tokens_per_s: float = 0.0, **fields: Any) -> LoadSample:
    """Prompts of 2,000 tokens, prefill workers of 10,000 tokens a second, a decode pool that is half full."""
    plain: dict[str, Any] = {
        "span_s": 5.0,
        "requests_per_s": tokens_per_s / 2000,
        "uncached_tokens_per_s": tokens_per_s,
        "tokens_per_prompt": 2000.0,
        "prompt_spread": 0.1,
        "itl_mean_s": 0.02,
        "itl_p99_s": 0.025,
        "ttft_p99_s": 0.5,
        "prefill": PoolLoad(ready=2, tokens_per_s=10_000.0),
        "decode": PoolLoad(ready=2, running=50, kv_share=0.5, place_share=0.3),
    }
    return LoadSample(at=at, **{**plain, **fields})


def series(num: int = 24, **fields: Any) -> list[LoadSample]:
    return [sample(NOW - 5 * (num - 1 - i), **fields) for i in range(num)]


def asked_inputs(samples: Sequence[LoadSample], prefill: int = 2, decode: int = 2, **fields: Any) -> Inputs:
    plain: dict[str, Any] = {
        "now": NOW,
        "changed_at": {},
        "scaling": SCALING,
        "ttft_slo_s": 2.0,
        "gpus": {"prefill": 1.0, "decode": 1.0},
        "split": True,
        "start_s": 60.0,
        "can_change_role": True,
    }
    return Inputs(samples=samples, sizes={"prefill": prefill, "decode": decode}, **{**plain, **fields})


def asked(samples: Sequence[LoadSample], prefill: int = 2, decode: int = 2, **fields: Any) -> Outcome:
    return decide(asked_inputs(samples, prefill, decode, **fields))


def test_prefill_follows_the_uncached_tokens_that_arrive() -> None:
    made = asked(series(tokens_per_s=41_000.0))
    assert made.sizes == {"prefill": 6, "decode": 2}, "41,000 / (10,000 * 0.8)"
    assert made.reason.startswith("prefill 2 -> 6: 41,000 uncached tokens/s arrive, 6 workers of 10,000/s keep the p99")
    assert "decode stays 2" in made.reason
    assert made.details["prompt_tokens_per_s"] == pytest.approx(41_000.0)


def test_prefill_is_sized_for_waits_long_before_it_is_full() -> None:
    """Few workers and unlike prompts: a mean utilisation of 80 % would let 1 % wait far too long."""
    unlike = series(tokens_per_s=15_000.0, tokens_per_prompt=8000.0, prompt_spread=3.0)
    alike = series(tokens_per_s=15_000.0, tokens_per_prompt=500.0, prompt_spread=0.1)
    assert asked(unlike).sizes["prefill"] > asked(alike).sizes["prefill"] == 2


def test_prefill_looks_ahead_over_the_start_up_time() -> None:
    rising = [sample(NOW - 5 * (23 - i), tokens_per_s=10_000.0 + 500 * i) for i in range(24)]
    made = asked(rising)
    assert made.sizes["prefill"] > asked(rising, start_s=0.0).sizes["prefill"]
    assert "trend +" in made.reason
    wild = [
        *series(tokens_per_s=1000.0)[:-6],
        *(sample(NOW - 5 * i, tokens_per_s=9e4 / (i + 1)) for i in range(5, -1, -1)),
    ]
    assert asked(wild, start_s=600.0).details["expected_prompt_tokens_per_s"] <= 2 * 9e4


def test_what_has_piled_up_asks_for_workers_too() -> None:
    piled = series(tokens_per_s=12_000.0, prefill=PoolLoad(ready=2, tokens_per_s=10_000.0, waiting_tokens=600_000))
    assert asked(piled).sizes["prefill"] > asked(series(tokens_per_s=12_000.0)).sizes["prefill"]
    assert "work off 600,000 tokens that wait" in asked(piled).reason


def test_prompts_that_decode_workers_compute_anyway_are_theirs() -> None:
    assert asked(series(tokens_per_s=41_000.0, local_share=0.25)).sizes["prefill"] == 4


def test_without_a_rate_the_pool_stays_and_another_pools_rate_will_do() -> None:
    unknown = series(tokens_per_s=41_000.0, prefill=PoolLoad(ready=2))
    assert asked(unknown).sizes["prefill"] == 2
    assert "nothing is known" in asked(unknown).reason
    others = series(
        tokens_per_s=41_000.0, prefill=PoolLoad(), decode=PoolLoad(ready=2, kv_share=0.5, tokens_per_s=10_000.0)
    )
    assert asked(others).sizes["prefill"] == 6
    assert asked([]).sizes == {"prefill": 2, "decode": 2}


def test_decode_follows_kv_places_and_those_that_wait() -> None:
    full = PoolLoad(ready=2, running=50, kv_share=0.95, place_share=0.3)
    assert asked(series(decode=full)).sizes["decode"] == 3
    assert "95% of the KV of 2 workers taken" in asked(series(decode=full)).reason
    crowded = PoolLoad(ready=2, running=50, kv_share=0.3, place_share=0.95)
    assert "95% of the places" in asked(series(decode=crowded)).reason
    waiting = series(decode=replace(full, kv_share=1.0), queued_requests=60)
    assert asked(waiting).sizes["decode"] > 3
    assert "60 requests wait for room" in asked(waiting).reason


def test_decode_follows_the_itl() -> None:
    made = asked(series(itl_p99_s=0.09, itl_mean_s=0.08))
    assert made.sizes["decode"] == 4
    assert "ITL p99 90.0 of 50 ms" in made.reason


def test_an_itl_that_does_not_come_from_the_load_asks_for_nothing() -> None:
    idle = PoolLoad(ready=2, running=1, kv_share=0.02, place_share=0.02)
    assert asked(series(itl_p99_s=0.5, itl_mean_s=0.01, decode=idle)).sizes["decode"] <= 2


def test_a_late_first_token_asks_for_one_more_only_where_prompts_pile_up() -> None:
    piled = PoolLoad(ready=2, tokens_per_s=10_000.0, waiting_tokens=25_000)
    assert asked(series(tokens_per_s=8000.0, ttft_p99_s=3.0, prefill=piled)).sizes["prefill"] == 3
    assert asked(series(tokens_per_s=8000.0, ttft_p99_s=3.0)).sizes["prefill"] == 2


def test_pauses() -> None:
    busy, idle = series(tokens_per_s=41_000.0), series(tokens_per_s=1000.0)
    assert asked(busy, changed_at={"prefill": NOW - 9}).sizes["prefill"] == 2
    assert "it changed 9 s ago" in asked(busy, changed_at={"prefill": NOW - 9}).reason
    assert asked(busy, changed_at={"prefill": NOW - 10}).sizes["prefill"] == 6
    assert asked(idle, prefill=20, changed_at={"prefill": NOW - 59}).sizes["prefill"] == 20
    assert asked(idle, prefill=20, changed_at={"prefill": NOW - 60}).sizes["prefill"] == 17, "15 % at a time"


def test_a_pool_that_grows_takes_workers_that_the_other_has_to_spare() -> None:
    idle = PoolLoad(ready=8, running=10, kv_share=0.05)
    busy = series(tokens_per_s=41_000.0, decode=idle, itl_mean_s=0.005, itl_p99_s=0.006)
    made = asked(busy, decode=8, changed_at={"prefill": NOW - 20, "decode": NOW - 20})
    assert made.sizes == {"prefill": 6, "decode": 6}, "30 % at a time"
    assert asked(busy, decode=8, changed_at={"decode": NOW - 20}, can_change_role=False).sizes["decode"] == 8


def test_a_full_budget_shifts_a_worker_to_the_pool_that_starves() -> None:
    scaling = replace(SCALING, max_gpus=6.0)
    load = series(tokens_per_s=41_000.0, decode=PoolLoad(ready=4, running=90, kv_share=0.75), itl_p99_s=0.05)
    made = asked(load, decode=4, scaling=scaling)
    assert made.sizes["prefill"] == 3
    assert made.sizes["decode"] == 3
    assert "the budget is 6 GPUs" in made.reason
    shifted = {"prefill": NOW - 5, "decode": NOW - 5}
    assert asked(load, decode=4, scaling=scaling, changed_at=shifted).sizes == {"prefill": 2, "decode": 4}
    even = asked(load, prefill=3, decode=3, scaling=scaling)
    assert even.sizes == {"prefill": 3, "decode": 3}, "and back it does not go"


def test_more_than_the_budget_is_given_up_at_once() -> None:
    made = asked(series(), prefill=9, decode=9, scaling=replace(SCALING, max_workers=5), changed_at={"prefill": NOW})
    assert sum(made.sizes.values()) <= 5


def test_colocated_has_one_pool_for_both() -> None:
    load = series(tokens_per_s=41_000.0, decode=PoolLoad(ready=2, kv_share=0.5, tokens_per_s=10_000.0))
    made = asked(load, split=False)
    assert made.sizes == {"decode": 6}
    assert made.reason.startswith("decode 2 -> 6: 41,000 uncached tokens/s")
    assert asked(series(decode=PoolLoad(ready=2, kv_share=0.95)), split=False).sizes == {"decode": 3}


# ---- whatever the inputs ----

shares = st.floats(0, 1)
amounts = st.one_of(st.just(0.0), st.floats(0, 1e7))
seconds = st.one_of(st.none(), st.floats(0, 100))
pool_loads = st.builds(
    PoolLoad,
    ready=st.integers(0, 60),
    running=st.integers(0, 5000),
    kv_share=shares,
    place_share=shares,
    waiting_tokens=st.integers(0, 10**8),
    tokens_per_s=amounts,
)
samples_of = st.builds(
    LoadSample,
    at=st.just(0.0),
    span_s=st.just(5.0),
    requests_per_s=amounts,
    refused_per_s=amounts,
    uncached_tokens_per_s=amounts,
    local_share=shares,
    tokens_per_prompt=amounts,
    prompt_spread=st.floats(0, 50),
    queued_requests=st.integers(0, 10**5),
    ttft_p99_s=seconds,
    itl_p99_s=seconds,
    itl_mean_s=seconds,
    prefill=pool_loads,
    decode=pool_loads,
)
limits_of = st.integers(1, 40).flatmap(
    lambda least: st.builds(PoolLimits, min=st.just(least), max=st.integers(least, 60))
)
ratios = st.one_of(st.none(), st.floats(0.1, 5))


@st.composite
def scalings(draw: st.DrawFn) -> ScalingConfig:
    low, high = draw(ratios), draw(ratios)
    if low is not None and high is not None:
        low, high = min(low, high), max(low, high)
    return ScalingConfig(
        prefill=draw(limits_of),
        decode=draw(limits_of),
        max_workers=draw(st.one_of(st.none(), st.integers(1, 100))),
        max_gpus=draw(st.one_of(st.none(), st.floats(1, 200))),
        min_ratio=low,
        max_ratio=high,
        headroom=draw(st.floats(0, 0.9)),
        hysteresis=draw(st.floats(0, 0.9)),
        itl_slo_s=draw(st.floats(0.001, 10)),
    )


@st.composite
def any_inputs(draw: st.DrawFn) -> Inputs:
    loads = draw(st.lists(samples_of, max_size=20))
    return Inputs(
        now=NOW,
        samples=[replace(each, at=NOW - 5 * (len(loads) - i)) for i, each in enumerate(loads)],
        sizes={"prefill": draw(st.integers(0, 80)), "decode": draw(st.integers(0, 80))},
        changed_at=draw(st.dictionaries(st.sampled_from(["prefill", "decode"]), st.floats(NOW - 100, NOW))),
        scaling=draw(scalings()),
        ttft_slo_s=draw(st.floats(0.01, 100)),
        gpus={"prefill": draw(st.floats(0, 8)), "decode": draw(st.floats(0, 8))},
        split=draw(st.booleans()),
        start_s=draw(st.floats(0, 600)),
        can_change_role=draw(st.booleans()),
    )


@settings(max_examples=300, deadline=None)
@given(any_inputs())
def test_no_limit_is_ever_exceeded(inputs: Inputs) -> None:
    made, limits = decide(inputs), Limits.of(inputs.scaling, inputs.gpus, split=inputs.split)
    pools = ("prefill", "decode") if inputs.split else ("decode",)
    assert tuple(made.sizes) == pools
    assert made.reason
    least = dict.fromkeys(pools, 1)
    if sum(least.values()) > limits.max_workers or limits.gpus_of(least) > limits.max_gpus:
        assert made.sizes == {pool: inputs.sizes[pool] for pool in pools}, "nothing fits: nothing is changed"
        return
    assert sum(made.sizes.values()) <= limits.max_workers
    assert limits.gpus_of(made.sizes) <= limits.max_gpus + 1e-6
    for pool in pools:
        assert 1 <= made.sizes[pool] <= limits.pools[pool].max
    sizes = range(1, 61)
    every = ({"prefill": p, "decode": d} for p, d in itertools.product(sizes if inputs.split else [0], sizes))
    if limits.broken(made.sizes) is not None:
        assert all(limits.broken({pool: each[pool] for pool in pools}) is not None for each in every)


def scaled(one: LoadSample, factor: float) -> LoadSample:
    decode = replace(one.decode, kv_share=one.decode.kv_share * factor, place_share=one.decode.place_share * factor)
    more = {name: getattr(one, name) * factor for name in ("requests_per_s", "uncached_tokens_per_s")}
    return replace(one, **more, decode=decode)


@settings(max_examples=100, deadline=None)
@given(
    tokens=st.lists(st.floats(0, 2e5), min_size=1, max_size=24),
    kv=st.floats(0.01, 0.45),
    factor=st.floats(1, 2),
    prefill=st.integers(1, 50),
    decode=st.integers(1, 50),
)
def test_more_load_never_gets_fewer_workers(
    tokens: list[float], kv: float, factor: float, prefill: int, decode: int
) -> None:
    decoding = PoolLoad(ready=decode, running=10, kv_share=kv, place_share=0.1)
    load = [sample(NOW - 5 * (len(tokens) - i), tokens_per_s=each, decode=decoding) for i, each in enumerate(tokens)]
    sizes = {"prefill": prefill, "decode": decode, "can_change_role": False}
    less, more = asked(load, **sizes).sizes, asked([scaled(each, factor) for each in load], **sizes).sizes
    assert all(more[pool] >= less[pool] for pool in less)


def settled(load_of: Callable[[int, int], LoadSample], scaling: ScalingConfig, num: int) -> tuple[list[Any], str]:
    """Sizes over so many decisions of 5 s in a cluster that starts workers at once; and the last reason."""
    sizes, changed, load, history, reason = {"prefill": 3, "decode": 9}, dict[str, float](), list[LoadSample](), [], ""
    for step in range(num):
        now = 5.0 * step
        load.append(replace(load_of(sizes["prefill"], sizes["decode"]), at=now))
        inputs = asked_inputs(load[-120:], **sizes, now=now, changed_at=changed, scaling=scaling, gpus={})
        made = decide(inputs)
        changed = {**changed, **{pool: now for pool in sizes if made.sizes[pool] != sizes[pool]}}
        sizes, reason = made.sizes, made.reason
        history.append((sizes["prefill"], sizes["decode"]))
    return history, reason


@settings(max_examples=20, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(
    tokens_per_s=st.floats(0, 3e5),
    reads=st.floats(0.1, 600.0),
    fixed_s=st.floats(0.002, 0.02),
    budget=st.integers(2, 99),
)
def test_a_constant_load_comes_to_rest(tokens_per_s: float, reads: float, fixed_s: float, budget: int) -> None:
    """Against a cluster that answers: the more KV each decode worker holds, the longer its steps, the more it holds."""

    def load_of(prefill: int, decode: int) -> LoadSample:
        rate = reads / decode
        share = min(1.0, rate * fixed_s / (1 - rate * 0.03)) if rate < 33 else 1.0
        itl_s = fixed_s + 0.03 * share
        return sample(
            tokens_per_s=tokens_per_s,
            itl_mean_s=itl_s,
            itl_p99_s=itl_s * 1.1,
            prefill=PoolLoad(ready=prefill, tokens_per_s=10_000.0),
            decode=PoolLoad(ready=decode, running=100, kv_share=share),
        )

    history, reason = settled(load_of, replace(SCALING, itl_slo_s=0.04, max_workers=budget), 250)
    assert history[-60:] == [history[-1]] * 60, reason
