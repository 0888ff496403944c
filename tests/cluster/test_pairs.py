"""Pairs on a worker's metrics page, and what `pdserve status` makes of them."""

from __future__ import annotations

import asyncio
import json

import pytest
from click.testing import CliRunner
from prometheus_client import generate_latest

from cluster import pairs
from cluster.cli import main
from cluster.commands import status
from cluster.health import Health, Member, Report, _member
from cluster.metrics import StatsCollector, serve
from cluster.pairs import Pair
from protos import worker_pb2 as pb
from router.store import WorkerRecord

FAST = pb.PairInfo(
    peer="decode-0/1", direction="to", state="ready", transport="nccl", latency_s=0.0002, bytes_per_s=3.2e10
)
SLOW = pb.PairInfo(
    peer="decode-1/4", direction="to", state="ready", transport="gloo", latency_s=0.004, bytes_per_s=2e7, is_slow=True
)
INCOMING = pb.PairInfo(peer="prefill-1/1", direction="from", state="ready", transport="gloo", latency_s=0.001)
COMING_UP = pb.PairInfo(peer="decode-2/1", direction="to", state="connecting")
ENDED = pb.PairInfo(peer="decode-0/1", direction="to", state="closed", transport="nccl", latency_s=1.0)


def test_a_page_brings_back_what_a_worker_sends_over() -> None:
    infos = [SLOW, FAST, ENDED, INCOMING, COMING_UP]
    collector = StatsCollector("worker", lambda: {"free_blocks": 7, **pairs.gauges(infos)}, key_labels=pairs.KEY_LABELS)
    server = serve([collector])
    record = WorkerRecord(
        worker_id="prefill-0", epoch=2, role="prefill", address="h:1", metrics_address=server.address, pool="prefill"
    )
    try:
        member = asyncio.run(_member("prefill-0", "worker", "prefill", "prefill", record))
        text = generate_latest(server.registry).decode()
    finally:
        server.close()
    labels = '{direction="to",peer="decode-1/4",transport="gloo"}'
    for line in ("latency_seconds{} 0.004", "bytes_per_second{} 2e+07", "slow{} 1.0", "ready{} 1.0"):
        assert f"pdserve_worker_pair_{line.replace('{}', labels)}" in text
    assert member.numbers == {"free_blocks": 7}
    assert member.pairs == [
        Pair("prefill-0/2", "decode-0/1", "nccl", "ready", 0.0002, 3.2e10),
        Pair("prefill-0/2", "decode-1/4", "gloo", "ready", 0.004, 2e7, True),
        Pair("prefill-0/2", "decode-2/1", "", "connecting"),
    ]


def test_a_pair_made_anew_counts_while_the_one_before_it_ends() -> None:
    again = pb.PairInfo(peer="decode-0/1", direction="to", state="connecting", transport="nccl")
    for infos in ([FAST, again], [again, FAST]):
        values = pairs.gauges(infos)
        assert values["pair_ready"] == {("decode-0/1", "to", "nccl"): 1.0}
        assert values["pair_latency_seconds"] == {("decode-0/1", "to", "nccl"): 0.0002}


def test_status_shows_each_pair_and_marks_the_slow_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = [
        Pair("prefill-0/2", "decode-0/1", "nccl", "ready", 0.0002, 3.2e10),
        Pair("prefill-0/2", "decode-1/4", "gloo", "ready", 0.004, 2e7, True),
        Pair("prefill-0/2", "decode-2/1", "", "connecting"),
    ]
    members = [Member("prefill-0", "worker", "ready", pairs=shown), Member("decode-0", "worker", "ready")]
    monkeypatch.setattr(status, "gather", lambda run_dir: Report(Health.READY, "ready", "/run", members=members))
    lines = CliRunner().invoke(main, ["status"]).output.splitlines()
    assert [line.split() for line in lines[-4:]] == [
        ["from", "to", "transport", "state", "latency", "ms", "GB/s"],
        ["prefill-0/2", "decode-0/1", "nccl", "ready", "0.20", "32"],
        ["prefill-0/2", "decode-1/4", "gloo", "ready", "4.00", "0.02", "slow"],
        ["prefill-0/2", "decode-2/1", "-", "connecting", "-", "-"],
    ]
    told = json.loads(CliRunner().invoke(main, ["status", "--json"]).output)
    assert told["members"][0]["pairs"][1]["is_slow"] is True


def test_status_without_pairs_has_no_table_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    members = [Member("decode-0", "worker", "ready")]
    monkeypatch.setattr(status, "gather", lambda run_dir: Report(Health.READY, "ready", "/run", members=members))
    assert "latency" not in CliRunner().invoke(main, ["status"]).output
