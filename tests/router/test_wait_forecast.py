import pytest

from router.wait_forecast import MAX_RETRY_S, AdmissionRate, Arrivals, Serving, Usual, expected_wait_s, retry_s


def test_the_rate_counts_only_while_somebody_waits():
    rate = AdmissionRate()
    assert rate.per_s(0.0) is None
    rate.wait(0.0, is_waiting=True)
    for second in range(1, 6):
        rate.admitted(100, float(second))
    rate.wait(5.0, is_waiting=False)
    assert rate.per_s(500.0) == pytest.approx(150, rel=0.15)
    rate.wait(500.0, is_waiting=True)
    assert rate.per_s(500.0) == pytest.approx(150, rel=0.15)


def test_the_rate_follows_what_happened_of_late():
    rate = AdmissionRate()
    rate.wait(0.0, is_waiting=True)
    for tenth in range(1, 301):
        rate.admitted(100, tenth / 10)
    assert rate.per_s(30.0) == pytest.approx(1100, rel=0.05)
    for second in range(31, 91):
        rate.admitted(100, float(second))
    assert rate.per_s(90.0) == pytest.approx(130, rel=0.1)


def test_no_rate_is_known_from_a_moment_nor_from_a_few():
    hasty, slow = AdmissionRate(), AdmissionRate()
    hasty.wait(0.0, is_waiting=True)
    slow.wait(0.0, is_waiting=True)
    for number in range(20):
        hasty.admitted(100, number / 100)
    for number in range(2):
        slow.admitted(100, float(number))
    assert hasty.per_s(0.2) is None
    assert slow.per_s(4.0) is None


def test_a_wait_is_what_is_ahead_over_the_rate_as_far_as_one_can_see():
    assert expected_wait_s(300.0, None, 9.0) is None
    assert expected_wait_s(300.0, 100.0, 9.0) == 3.0
    assert expected_wait_s(30_000.0, 100.0, 9.0) == 180.0  # 20 times what was watched


def test_what_comes_of_higher_classes_goes_before():
    came = Arrivals()
    for tenth in range(600):
        came.add(-1, 5, tenth / 10)
        came.add(0, 2, tenth / 10)
    assert came.above_per_s(-1, 60.0) == 0.0
    assert came.above_per_s(0, 60.0) == pytest.approx(50, rel=0.05)
    assert came.above_per_s(1, 60.0) == pytest.approx(70, rel=0.05)
    assert came.above_per_s(1, 200.0) < 0.1
    assert expected_wait_s(300.0, 100.0, 9.0, above_per_s=50.0) == 6.0
    assert expected_wait_s(300.0, 100.0, 900.0, above_per_s=500.0) == 150.0


def test_before_any_rate_was_seen_what_runs_tells_of_it():
    serving = Serving(first_token_s=0.5, token_s=0.01, answer_tokens=50.0, num_seen=16)
    assert serving.rate(8, 100.0) == 8 * 100 / 1.0 * 1.25
    assert serving.rate(0, 100.0) is None
    assert Serving().rate(8, 100.0) is None


def test_a_place_must_come_in_time_for_the_whole_answer_and_for_the_first_token():
    serving = Serving(first_token_s=0.5, token_s=0.01, answer_tokens=100.0)
    assert serving.admit_by(10.0, 20.0, 1000, None) == (pytest.approx(18.5), False)
    assert serving.admit_by(10.0, 20.0, 50, None) == (pytest.approx(19.0), False)
    assert serving.admit_by(10.0, 20.0, 1000, 3.0) == (pytest.approx(12.5), True)
    assert serving.admit_by(10.0, 12.0, 1000, 3.0) == (pytest.approx(10.5), False)
    assert serving.admit_by(10.0, 11.0, 1000, None) == (pytest.approx(10.1), False)  # its answer may be a short one
    assert Serving().admit_by(10.0, 20.0, 1000, None) == (20.0, False)


def test_the_time_to_retry_is_what_the_queue_needs_within_bounds():
    assert retry_s(None, 1.0, 0.0) == 1.0
    assert retry_s(0.2, 1.0, 0.0) == 1.0
    assert retry_s(8.0, 1.0, 0.0) == 8.0
    assert retry_s(8.0, 1.0, 1.0) == 10.0
    assert retry_s(1e9, 1.0, 0.0) == MAX_RETRY_S


def test_what_serving_takes_follows_the_latest():
    usual = Usual()
    assert usual.serving == Serving()
    usual.observe(11, 0.2, 0.1)
    assert usual.serving == Serving(0.2, 0.01, 11.0, 1)
    usual.observe(1, None, None)
    assert usual.serving == Serving(0.2, 0.01, 6.0, 2)
    for _ in range(200):
        usual.observe(101, 0.4, 2.0)
    assert usual.serving.token_s == pytest.approx(0.02, rel=0.01)
    assert usual.serving.expected_tokens(1000) == pytest.approx(101, rel=0.01)
    assert usual.serving.expected_tokens(7) == 7
