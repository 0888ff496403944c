"""What a rehearsed step costs."""

import pytest

from engine.pace import PaceOptions, StepWork

WORK = StepWork(prompt_tokens=1000, tokens=10, kv_tokens=5000)


def test_costs_add_up():
    pace = PaceOptions(fixed_ms=2, prompt_token_us=20, token_us=3, kv_gb_per_s=100, kv_bytes_per_token=1000)
    assert pace.step_s(WORK, 7) == pytest.approx(2e-3 + 1000 * 20e-6 + 10 * 3e-6 + 5000 * 1000 / 100e9)


def test_kv_is_the_served_models_unless_another_one_is_rehearsed():
    assert PaceOptions(kv_gb_per_s=1).step_s(WORK, 7) == pytest.approx(5000 * 7 / 1e9)


def test_without_a_rate_kv_costs_nothing():
    assert PaceOptions(fixed_ms=2, kv_bytes_per_token=10**6).step_s(WORK, 7) == 2e-3


@pytest.mark.parametrize(
    ("costs", "message"),
    [
        ({}, "a pace needs at least one of fixed_ms"),
        ({"kv_bytes_per_token": 100}, "a pace needs at least one of fixed_ms"),
        ({"fixed_ms": -1}, "fixed_ms must be at least 0 and at most 60000, got -1"),
        ({"token_us": float("nan")}, "token_us must be at least 0 and at most 1e\\+06, got nan"),
        ({"prompt_token_us": 1e7}, "prompt_token_us must be at least 0"),
        ({"kv_gb_per_s": 0.0}, "kv_gb_per_s must be more than 0, got 0.0"),
        ({"fixed_ms": 1, "kv_bytes_per_token": 0}, "kv_bytes_per_token must be at least 1, got 0"),
    ],
)
def test_what_makes_no_pace(costs, message):
    with pytest.raises(ValueError, match=message):
        PaceOptions(**costs)
