"""Prometheus metrics over plain stats."""

from __future__ import annotations

import socket
import urllib.request
from dataclasses import asdict, dataclass, field

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.metrics import StatsCollector, serve
from router.stats import RouterStats


@dataclass
class Stats:
    steps: int = 3
    free_blocks: int = 7
    name: str = "no number"
    extra: dict[str, float] = field(default_factory=lambda: {"hidden_share": 0.5})
    nothing: dict[str, float] = field(default_factory=dict)


def scrape(address: str) -> dict[str, float]:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=5.0) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    return {sample.name: sample.value for family in families for sample in family.samples}


def test_numbers_are_read_at_each_scrape() -> None:
    stats = Stats()
    server = serve([StatsCollector("engine", lambda: stats, counters=["steps"])])
    try:
        first = scrape(server.address)
        stats.free_blocks = 6
        second = scrape(server.address)
    finally:
        server.close()
    assert first["pdserve_engine_steps_total"] == 3
    assert first["pdserve_engine_extra"] == 0.5
    assert (first["pdserve_engine_free_blocks"], second["pdserve_engine_free_blocks"]) == (7, 6)
    assert not any("name" in name for name in first)


def test_the_routers_stats_are_families_with_names_of_their_own() -> None:
    stats = RouterStats(outcomes={"eos": 3, "stop": 1}, workers={"ready": 2})
    for histogram, seconds in ((stats.ttft_s, 0.02), (stats.ttft_s, 70.0), (stats.itl_s, 0.5)):
        histogram.observe(seconds)
    collector = StatsCollector("router", lambda: asdict(stats), counters=["outcomes"], key_labels={"workers": "state"})
    server = serve([collector])
    try:
        with urllib.request.urlopen(f"http://{server.address}/metrics", timeout=5.0) as answer:
            text = answer.read().decode()
    finally:
        server.close()
    families = list(text_string_to_metric_families(text))
    names = [family.name for family in families]
    assert len(names) == len(set(names)), "a family that comes twice is refused by Prometheus"
    samples = {(each.name, *each.labels.values()): each.value for family in families for each in family.samples}
    assert samples["pdserve_router_outcomes_total", "eos"] == 3
    assert samples["pdserve_router_workers", "ready"] == 2
    assert samples["pdserve_router_ttft_seconds_bucket", "0.01"] == 0
    assert samples["pdserve_router_ttft_seconds_bucket", "60"] == 1
    assert samples["pdserve_router_ttft_seconds_bucket", "+Inf"] == samples["pdserve_router_ttft_seconds_count",] == 2
    assert samples["pdserve_router_ttft_seconds_sum",] == pytest.approx(70.02)
    assert samples["pdserve_router_itl_seconds_count",] == 1


def test_a_mapping_may_have_several_labels() -> None:
    key_labels = {"rate": ("peer", "direction")}
    collector = StatsCollector("worker", lambda: {"rate": {("d/1", "to"): 2.5}}, key_labels=key_labels)
    (family,) = collector.collect()
    (sample,) = family.samples
    assert (sample.name, sample.value) == ("pdserve_worker_rate", 2.5)
    assert sample.labels == {"peer": "d/1", "direction": "to"}


def test_labels() -> None:
    server = serve([StatsCollector("router", lambda: {"queued": 2}, labels={"router": "r-0"})])
    try:
        found = scrape(server.address)
    finally:
        server.close()
    assert found["pdserve_router_queued"] == 2


def test_listens_where_told_and_closes() -> None:
    server = serve()
    host, port = server.address.split(":")
    assert host == "127.0.0.1"
    server.close()
    with socket.create_server((host, int(port))), pytest.raises(OSError):
        serve(port=int(port))


def test_stats_must_be_numbers_with_names() -> None:
    with pytest.raises(TypeError, match="must be a dataclass or a mapping, got list"):
        list(StatsCollector("x", lambda: [1]).collect())
