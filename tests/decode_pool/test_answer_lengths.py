import random
import time

import pytest

from decode_pool.answer_lengths import EDGES, ENOUGH, AnswerLengths


def seen(lengths: list[int], predicted: int = 256, max_tokens: int = 10**6) -> AnswerLengths:
    made = AnswerLengths(predicted)
    for length in lengths:
        made.add(min(length, max_tokens), was_cut=length > max_tokens)
    return made


def mean_beyond(lengths: list[int], had: int, limit: int) -> float:
    beyond = [min(length, limit) for length in lengths if length > had]
    return sum(beyond) / len(beyond)


def test_before_enough_were_seen_the_prediction_holds():
    made = seen([10] * (ENOUGH - 1), predicted=100)
    assert made.expected(0, 1000) == 100
    assert made.expected(0, 60) == 60
    assert made.expected(300, 1000) == 300
    made.add(10, was_cut=False)
    assert made.expected(0, 1000) < 30


@pytest.mark.parametrize("had", [0, 20, 100, 250, 600])
@pytest.mark.parametrize("limit", [50, 400, 5000])
def test_the_mean_of_those_that_go_on_is_expected(had: int, limit: int):
    rng = random.Random(1)
    lengths = [int(rng.lognormvariate(5.0, 0.8)) + 1 for _ in range(4000)]
    made = seen(lengths)
    if had < limit:
        assert made.expected(had, limit) == pytest.approx(mean_beyond(lengths, had, limit), rel=0.15)
    else:
        assert made.expected(had, limit) == had


def test_answers_that_were_cut_off_are_not_taken_for_short_ones():
    rng = random.Random(2)
    lengths = [rng.randrange(1, 600) for _ in range(2000)]
    limits = [rng.choice((16, 64, 1000)) for _ in lengths]
    made = AnswerLengths(256)
    for length, limit in zip(lengths, limits, strict=True):
        made.add(min(length, limit), was_cut=length > limit)
    assert made.expected(0, 5000) == pytest.approx(300, rel=0.15)


def test_what_happened_long_ago_is_forgotten():
    made = seen([2000] * 1000 + [20] * 1500)
    assert made.expected(0, 10_000) < 60


def test_beyond_all_that_were_seen_the_prediction_tells():
    made = seen([50] * 500, predicted=100)
    assert made.expected(200, 10_000) == pytest.approx(300, rel=0.15)
    assert made.expected(200, 220) == pytest.approx(220, abs=5)
    assert 900_000 <= made.expected(900_000, 10**7) <= 1_100_000
    assert seen([5] * 100, predicted=0).expected(900_000, 10**7) == 900_000


def test_all_lengths_have_their_bucket_and_a_guess_never_leaves_its_bounds():
    rng = random.Random(4)
    made = AnswerLengths(256)
    for _ in range(3000):
        made.add(rng.choice(EDGES[1:]) + rng.randrange(-1, 2), was_cut=rng.random() < 0.3)
        had, limit = rng.randrange(2000), rng.randrange(1, 4000)
        assert had <= made.expected(had, limit) <= max(had, limit) + 1e-6


def test_a_guess_is_cheap():
    made = seen(list(range(1, 1000)))
    made.expected(0, 100)
    started = time.perf_counter()
    for had in range(1000):
        made.expected(had, 4096)
    assert (time.perf_counter() - started) / 1000 < 50e-6
