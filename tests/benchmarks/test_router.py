"""A tiny load on a real router: every figure is there, and the streams are whole."""

import os

import pytest

from benchmarks import router
from benchmarks.router import Latency, Plan, Rate, Report, Requests, table
from benchmarks.router_rig import cores_for, cpu_s, rss_bytes

PLAN = Plan(
    seconds=0.1, streams=4, connections=2, requests_at_once=2, idle_streams=20, messages_per_s=400, num_workers=2
)


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(router, "WARM_TOKENS", 5)
    monkeypatch.setattr(router, "WARM_S", 0.1)
    monkeypatch.setattr(router, "MESSAGES_PER_S", 400)


def test_rate_of_two_routers():
    rate = router.measure_rate(PLAN, 2)
    assert rate.routers == 2
    assert rate.messages_per_s > 0
    assert 0 < rate.one_token_share <= 1
    assert 0 < rate.cpu_us < 1e5


def test_latency_and_its_pace():
    late = router.measure_latency(PLAN, 2)
    assert late.streams_a_step == 2
    assert late.messages_per_s < 800, "steps are not sooner than they are due"
    assert 0 < late.p50_ms <= late.p99_ms


@pytest.mark.parametrize("mode", ["colocated", "split"])
def test_requests(mode):
    requests = router.measure_requests(PLAN, mode)
    assert requests.requests_per_s > 1
    assert requests.cpu_us > 0


def test_memory_of_open_streams():
    assert router.measure_memory(PLAN) >= 0


def test_table_says_what_the_bounds_are():
    late = Latency(4, 10_000, 0.9, 4.0, 1.0, 0.5)
    report = Report(8, [Rate(1, 21_000, 1.0, 40.0)], [late], [Requests("split", 900, 1000.0)], 43.0, 188.0)
    lines = table(report).splitlines()
    assert lines[2] == "| messages/s, 1 router, 100.0% of one token | 21,000 | 40.0 µs each | 25,000 | 400 |"
    assert "| 0.90 ms |" in lines[3]
    assert lines[3].endswith("| 1 ms |")
    assert len(lines) == 2 + 1 + 2 + 1 + 2


@pytest.mark.skipif(not os.path.exists("/proc/self/schedstat"), reason="Linux tells")
def test_what_the_kernel_tells_of_a_process():
    before = cpu_s(os.getpid())
    sum(range(1_000_000))
    assert cpu_s(os.getpid()) > before
    assert rss_bytes(os.getpid()) > 1 << 20
    routers, load = cores_for(1)
    assert len(routers[0]) == 1
    assert load
