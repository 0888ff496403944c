"""Samples of the load: rates since the sample before, and the pools as they stand."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from cluster.load_sample import LoadMeter, pool_load
from protos import worker_pb2 as pb
from router.stats import RouterStats


def router(**fields: Any) -> dict[str, Any]:
    stats = RouterStats(**{name: value for name, value in fields.items() if name not in ("ttft_s", "itl_s")})
    for name in ("ttft_s", "itl_s"):
        for value in fields.get(name, ()):
            getattr(stats, name).observe(value)
    return asdict(stats)


def front(role: str, state: str = "READY", **stats: Any) -> dict[str, Any]:
    message = pb.WorkerStats(**{"num_blocks": 100, "free_blocks": 100, **stats})
    plain = {field.name: getattr(message, field.name) for field in pb.WorkerStats.DESCRIPTOR.fields}
    return {"role": role, "state": state, "stats": plain}


def test_rates_are_of_the_time_between_two_samples() -> None:
    meter = LoadMeter()
    first = meter.sample({"r0": router(accepted=100, sent_tokens=5000)}, {}, 1000.0)
    assert (first.requests_per_s, first.answer_tokens_per_s, first.ttft_p99_s) == (0.0, 0.0, None)
    second = meter.sample(
        {
            "r0": router(
                accepted=150,
                accepted_prompt_tokens=10_000,
                sent_tokens=6000,
                routed_prompts=40,
                routed_prompt_tokens=8000,
                routed_missing_tokens=2000,
                routed_missing_squares=40 * 50.0**2 * 3,
                local_prompt_tokens=600,
                spilled_prompt_tokens=200,
                refused={"full": 5, "deadline": 15},
                queued=3,
                queued_tokens=700,
            )
        },
        {},
        1010.0,
    )
    assert (second.at, second.span_s, second.requests_per_s, second.answer_tokens_per_s) == (1010.0, 10.0, 5.0, 100.0)
    assert (second.prompt_tokens_per_s, second.uncached_tokens_per_s) == (1000.0, pytest.approx(250.0))
    assert (second.tokens_per_prompt, second.prompt_spread) == (50.0, pytest.approx(2.0))
    assert second.local_share == pytest.approx(0.2)
    assert (second.refused_per_s, second.queued_requests, second.queued_tokens) == (2.0, 3, 700)


def test_what_is_cached_is_known_from_before_where_nothing_was_routed() -> None:
    meter = LoadMeter()
    meter.sample({"r0": router()}, {}, 0.0)
    told: dict[str, Any] = {"routed_prompt_tokens": 100, "routed_missing_tokens": 30, "routed_prompts": 1}
    meter.sample({"r0": router(accepted_prompt_tokens=100, **told)}, {}, 1.0)
    stalled = meter.sample({"r0": router(accepted_prompt_tokens=1100, **told)}, {}, 2.0)
    assert stalled.uncached_tokens_per_s == pytest.approx(300.0)


def test_a_router_that_began_anew_and_one_that_did_not_answer() -> None:
    meter = LoadMeter()
    meter.sample({"r0": router(accepted=1000, itl_s=[0.02] * 50), "r1": router(accepted=10)}, {}, 0.0)
    sample = meter.sample({"r0": router(accepted=20, itl_s=[0.01] * 5)}, {}, 10.0)
    assert sample.requests_per_s == pytest.approx(2.0)
    assert sample.itl_mean_s == pytest.approx(0.01)
    late = meter.sample({"r0": router(accepted=20, itl_s=[0.01] * 5), "r1": router(accepted=50)}, {}, 20.0)
    assert late.requests_per_s == pytest.approx(2.0), "40 since its own last answer, 20 s ago"
    assert late.itl_p99_s is None


def test_percentiles_are_of_what_came_since() -> None:
    meter = LoadMeter()
    slow = [5.0] * 1000
    meter.sample({"r0": router(ttft_s=slow)}, {}, 0.0)
    fast = router(ttft_s=[*slow, *[0.11] * 95, *[0.45] * 5])
    sample = meter.sample({"r0": fast, "r1": router()}, {}, 5.0)
    assert sample.ttft_p99_s is not None
    assert 0.4 < sample.ttft_p99_s <= 0.5
    beyond = meter.sample({"r0": router(ttft_s=[*slow, *[0.11] * 95, *[0.45] * 5, 500.0])}, {}, 10.0)
    assert beyond.ttft_p99_s == 60.0


def test_a_worker_belongs_to_the_pool_of_its_role() -> None:
    fronts = {
        "prefill-0": front("prefill", prompt_tokens_per_s=1000.0, waiting_tokens=300, num_waiting=2),
        "prefill-1": front("decode", free_blocks=20, unpromised_blocks=10, expected_answer_tokens=8, num_running=6),
        "decode-0": front("decode", free_blocks=90, num_running=1, num_reserved=1, free_places=8),
        "decode-1": front("decode", state="DRAINING", free_blocks=0),
        "decode-2": front("prefill"),
    }
    sample = LoadMeter().sample({}, fronts, 1.0)
    assert (sample.prefill.ready, sample.prefill.waiting_tokens, sample.prefill.tokens_per_s) == (2, 300, 1000.0)
    assert (sample.decode.ready, sample.decode.running) == (2, 8)
    assert sample.decode.kv_share == pytest.approx((90 + 10) / 200), "promised where it promises, else held"
    assert sample.decode.place_share == pytest.approx(0.5)
    assert LoadMeter().sample({}, {"d": front("both")}, 1.0).decode.ready == 1


def test_plain_numbers_for_people() -> None:
    plain = LoadMeter().sample({"r0": router()}, {"p": front("prefill")}, 7.0).to_plain()
    assert plain["prefill_ready"] == 1
    assert "ttft_p99_s" not in plain
    assert all(isinstance(value, int | float) for value in plain.values())


def test_a_pool_without_a_free_place_is_full_not_empty() -> None:
    full = dict.fromkeys((field.name for field in pb.WorkerStats.DESCRIPTOR.fields), 0)
    full |= {
        "num_blocks": 100,
        "free_blocks": 90,
        "unpromised_blocks": 80,
        "num_running": 4,
        "expected_answer_tokens": 50,
    }
    assert pool_load([full]).place_share == 1.0
    assert pool_load([full | {"expected_answer_tokens": 0}]).place_share == 0.0, "it has not looked yet"
    assert pool_load([full, full | {"free_places": 8}]).place_share == 0.5
