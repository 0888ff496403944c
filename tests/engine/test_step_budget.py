"""How a step is shared out, as arithmetic."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.sequence import Sequence
from engine.step_budget import StepLimits, StepShares
from tests.engine.toy import make_request


def sequence(missing: int) -> Sequence:
    made = Sequence.from_request(make_request("x", range(1, missing + 1)), 0.0)
    assert made.num_missing_tokens == missing
    return made


def taken(limits: StepLimits, missing: list[int]) -> list[int]:
    """What sequences get that ask one after the other."""
    shares = StepShares(limits)
    for each in missing:
        asking = sequence(each)
        if count := shares.room_for(asking):
            shares.add(asking, count)
    return [share.num_tokens for share in shares.shares()]


@pytest.mark.parametrize(
    ("missing", "expected"),
    [
        ([100], [16]),
        ([10, 10], [10, 10]),
        ([18], [18]),
        ([20], [20]),
        ([21], [16]),
        ([10, 10, 5], [10, 10]),
        ([10, 11, 5], [10, 6]),
        ([1, 1, 100], [1, 1, 5]),
        ([1, 3, 3, 3], [1, 3, 2]),
        ([1, 18], [1, 5]),
        ([1] * 20, [1] * 16),
        ([1] * 14 + [9], [1] * 14 + [2]),
    ],
)
def test_shares(missing: list[int], expected: list[int]) -> None:
    assert taken(StepLimits(max_tokens=16, mixed_tokens=5, slack_tokens=4), missing) == expected


@given(
    st.integers(1, 40),
    st.integers(0, 10),
    st.integers(1, 40),
    st.lists(st.integers(1, 60), max_size=20).map(sorted),
)
def test_no_limit_is_passed(most: int, slack: int, mixed: int, missing: list[int]) -> None:
    got = taken(StepLimits(most, min(mixed, most), slack), missing)
    assert sum(got) <= most + slack
    assert not missing or got
    generating = min(missing.count(1), most)
    prompts = sum(got) - generating
    if generating:
        assert prompts <= mixed
        assert sum(got) <= most


def test_a_share_taken_back_leaves_its_room() -> None:
    shares = StepShares(StepLimits(max_tokens=16, mixed_tokens=5))
    first, second = sequence(1), sequence(16)
    shares.add(first, 1)
    assert shares.room_for(second) == 5
    shares.drop(first)
    shares.drop(first)
    assert shares.room_for(second) == 16
    assert shares.shares() == []


def test_the_share_of_prompts_may_change() -> None:
    limits = StepLimits(max_tokens=64, mixed_tokens=64)
    assert taken(limits.with_prompt_share(0.25), [1, 100]) == [1, 16]
    assert taken(limits.with_prompt_share(0.25).with_prompt_share(1.0), [1, 100]) == [1, 63]
    assert taken(limits.with_prompt_share(0.001), [1, 100]) == [1, 1]
