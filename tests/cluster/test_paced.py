"""Whoever starts, watches or loads a cluster of paced workers is told that they are."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from cluster.cli import main
from cluster.commands import lifecycle, status
from cluster.config import ClusterConfig, PoolConfig
from cluster.health import Health, Member, Report
from cluster.run_dir import RunDir
from engine.config import ModelOptions
from engine.pace import PaceOptions

PACED, PLAIN = PoolConfig(pace=PaceOptions(fixed_ms=5)), PoolConfig()


@pytest.mark.parametrize(
    ("mode", "prefill", "decode", "whose"),
    [
        ("split", PACED, PACED, "prefill and decode"),
        ("split", PLAIN, PACED, "decode"),
        ("colocated", PACED, PACED, "decode"),
        ("colocated", PACED, PLAIN, None),
        ("split", PLAIN, PLAIN, None),
    ],
)
def test_up_says_whose_time_is_anothers(capsys, tmp_path, mode, prefill, decode, whose):
    config = ClusterConfig(model=ModelOptions(path="demo"), mode=mode, prefill=prefill, decode=decode)
    lifecycle._summary(config, ["127.0.0.1:1"], RunDir(tmp_path))
    lines = [line.split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines() if "Rehearsal" in line]
    assert lines == ([f"{whose} workers are paced: they take the time of other hardware"] if whose else [])


def test_status_marks_paced_workers(monkeypatch):
    members = [Member("prefill-0", "worker", "ready"), Member("decode-0", "worker", "ready", paced=True)]
    monkeypatch.setattr(status, "gather", lambda run_dir: Report(Health.READY, "ready", "/run", members=members))
    lines = CliRunner().invoke(main, ["status"]).output.splitlines()
    assert [line.split()[0] for line in lines if line.endswith("  paced")] == ["decode-0"]
    assert lines[-1].strip() == "Paced workers take the time of other hardware: a rehearsal, not a measurement."
    told = json.loads(CliRunner().invoke(main, ["status", "--json"]).output)
    assert [member["paced"] for member in told["members"]] == [False, True]
