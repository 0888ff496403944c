import pytest

from router.wait_forecast import MAX_RETRY_S, AdmissionRate, Outlook, TooLong, Usual, expected_wait_s, retry_s


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
    assert hasty.wait_s(10**6, 0.2) is None
    assert slow.per_s(4.0) is None


def test_a_wait_is_too_long_for_a_deadline_or_for_the_slo():
    assert expected_wait_s(300.0, None, 9.0) is None
    assert expected_wait_s(300.0, 100.0, 9.0) == 3.0
    assert expected_wait_s(30_000.0, 100.0, 9.0) == 180.0  # 20 times what was watched
    outlook = Outlook(3.0, 0.5)
    assert outlook.too_long(10.0, None) is None
    assert outlook.too_long(3.0, None) is TooLong.DEADLINE
    assert outlook.too_long(10.0, 3.6) is None
    assert outlook.too_long(10.0, 3.4) is TooLong.TTFT_SLO
    assert outlook.too_long(2.0, 2.2, sureness=0.5) is None
    assert outlook.too_long(2.0, 1.9, sureness=0.5) is TooLong.TTFT_SLO
    assert Outlook(None, 0.5).too_long(0.0, 0.1) is None


def test_the_time_to_retry_is_what_the_queue_needs_within_bounds():
    assert retry_s(None, 1.0, 0.0) == 1.0
    assert retry_s(0.2, 1.0, 0.0) == 1.0
    assert retry_s(8.0, 1.0, 0.0) == 8.0
    assert retry_s(8.0, 1.0, 1.0) == 10.0
    assert retry_s(1e9, 1.0, 0.0) == MAX_RETRY_S


def test_a_usual_value_follows_the_latest():
    usual = Usual(256.0)
    assert usual.value == 256.0
    usual.observe(10.0)
    assert usual.value == 10.0
    usual.observe(20.0)
    assert usual.value == 15.0
    for _ in range(200):
        usual.observe(100.0)
    assert usual.value == pytest.approx(100.0, rel=0.01)
