"""A tiny load on a real router: every figure is there, and the streams are whole."""

import os

import pytest

from benchmarks import router
from benchmarks.router import Plan
from benchmarks.router_report import Delay, Latency, Rate, Report, Requests, table
from benchmarks.router_rig import cores_for, cpu_s, rss_bytes

PLAN = Plan(
    seconds=0.1, streams=4, connections=2, requests_at_once=2, idle_streams=20, messages_per_s=400, num_workers=2
)


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(router, "WARM_TOKENS", 5)
    monkeypatch.setattr(router, "WARM_S", 0.1)
    monkeypatch.setattr(router, "MESSAGES_PER_S", 400)


@pytest.mark.parametrize("num_routers", [0, 2])
def test_rate(num_routers):
    rate = router.measure_rate(PLAN, num_routers)
    assert rate.routers == num_routers
    assert rate.messages_per_s > 0
    assert 0 < rate.one_token_share <= 1
    assert 0 < rate.cpu_us < 1e5


def test_latency_and_its_pace():
    late = router.measure_latency(PLAN, 2)
    assert late.streams_a_step == 2
    assert late.messages_per_s < 800, "steps are not sooner than they are due"
    assert 0 < late.routed.p50_ms <= late.routed.p99_ms
    assert 0 < late.direct.p50_ms <= late.direct.p99_ms


@pytest.mark.parametrize("mode", ["colocated", "split"])
def test_requests(mode):
    requests = router.measure_requests(PLAN, mode)
    assert requests.requests_per_s > 1
    assert requests.cpu_us > 0


def test_memory_of_open_streams():
    assert router.measure_memory(PLAN) >= 0


def test_table_says_what_the_bounds_are():
    late = Latency(4, 10_000, 1.0, 0.5, routed=Delay(1.0, 4.5), direct=Delay(0.25, 1.5))
    rates = [Rate(0, 30_000, 1.0, 25.0), Rate(1, 21_000, 1.0, 40.0)]
    lines = table(Report(8, rates, [late], [Requests("split", 900, 1000.0)], 43.0, 188.0)).splitlines()
    assert lines[3] == "| messages/s, 1 router, 100.0% of one token | 21,000 | 40.0 µs each | 25,000 | 20,000 |"
    assert "| 0.75 ms (1.00 - 0.25) |" in lines[4]
    assert lines[4].endswith("| 1 ms |")
    assert "| 3.00 ms (4.50 - 1.50) |" in lines[5]
    assert len(lines) == 2 + 2 + 2 + 1 + 2


@pytest.mark.skipif(not os.path.exists("/proc/self/schedstat"), reason="Linux tells")
def test_what_the_kernel_tells_of_a_process():
    before = cpu_s(os.getpid())
    sum(range(1_000_000))
    assert cpu_s(os.getpid()) > before
    assert rss_bytes(os.getpid()) > 1 << 20
    routers, load = cores_for(1)
    assert len(routers[0]) == 1
    assert load
