"""`pdserve history`, from a real Valkey."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from cluster.cli import main
from cluster.cluster_store import Decision
from cluster.commands.history import new_ones
from tests.cluster.wanted_cluster import WantedCluster

ROOT = Path(__file__).resolve().parents[2]
NOON = 1_700_000_000.0


def decision(number: int) -> Decision:
    return Decision(
        at=NOON + number,
        by="autoscaler",
        what=f"decode {number} -> {number + 1}",
        reason="KV is 91 % full, over the 80 % that headroom leaves",
        details={"kv_share": 0.91},
    )


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["history", *arguments])


def test_newest_last_with_reasons(wanted: WantedCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    monkeypatch.setenv("COLUMNS", "100")
    time.tzset()
    wanted.up()
    for number in range(3):
        wanted.store.note(decision(number))
    lines = run().output.splitlines()
    assert lines[0].split() == ["time", "by", "what,", "and", "why"]
    assert lines[1].split()[2:] == ["up", "up"]
    assert lines[-2] == "2023-11-14 22:13:22  autoscaler  decode 2 -> 3"
    assert lines[-1].strip().startswith("KV is 91 % full")
    assert [line for line in run("-n", "1").output.splitlines() if "->" in line] == lines[-2:-1]


def test_json_is_an_object_a_line(wanted: WantedCluster) -> None:
    wanted.up()
    wanted.store.note(decision(1))
    told = [json.loads(line) for line in run("--json").stdout.splitlines()]
    assert [each["by"] for each in told] == ["up", "autoscaler"]
    assert told[1]["details"] == {"kv_share": 0.91}


def test_nothing_yet(wanted: WantedCluster) -> None:
    wanted.run_dir.config_file.write_text(json.dumps({"redis": {"url": None}}))
    assert run().output == "Nothing was decided yet.\n"


def test_what_is_new() -> None:
    one, two, three = decision(1), decision(2), decision(3)
    assert new_ones([two, one], []) == [two, one]
    assert new_ones([two, one], [two, one]) == []
    assert new_ones([three, two, one], [two]) == [three]
    assert new_ones([three, two], [two, one]) == [three]  # the oldest was cut off
    assert new_ones([], [one]) == []


def test_following_prints_what_comes(wanted: WantedCluster) -> None:
    wanted.up()
    command = [sys.executable, "-m", "tests.cluster.pdserve", "history", "--follow", "--json"]
    code = "import signal, runpy, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += f"sys.argv = {command[2:]!r}; runpy.run_module('tests.cluster.pdserve', run_name='__main__')"
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert select.select([process.stdout], [], [], 20)[0]
        assert json.loads(process.stdout.readline())["by"] == "up"
        wanted.store.note(decision(5))
        assert select.select([process.stdout], [], [], 10)[0]
        assert json.loads(process.stdout.readline())["what"] == "decode 5 -> 6"
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
