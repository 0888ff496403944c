"""Leaving a node: who gets SIGTERM, how long is waited, and what is said of who stays."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict

import pytest

from cluster.leave_node import leave, processes_here
from cluster.process import NodeProcess
from cluster.run_dir import ProcessRef, RunDir

Start = Callable[..., subprocess.Popen[bytes]]
STUBBORN = "import signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); sys.stdin.read()"
WILLING = "import sys; print(flush=True); sys.stdin.read()"


@pytest.fixture
def start(run_dir: RunDir) -> Iterator[Start]:
    started: list[subprocess.Popen[bytes]] = []

    def start_one(name: str, role: str, code: str = WILLING, drain_s: float = 1.0) -> subprocess.Popen[bytes]:
        process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout is not None
        process.stdout.readline()
        note = NodeProcess(role=role, process=ProcessRef.of(process.pid), drain_s=drain_s, gcs_address="", node_id="")
        (run_dir.processes / f"{name}.json").write_text(json.dumps(asdict(note)))
        return process

    yield start_one
    for process in started:
        process.kill()
        process.communicate()


def test_what_drains_gets_sigterm_and_is_waited_for(run_dir: RunDir, start: Start) -> None:
    drain = [start("decode-0-front", "front"), start("decode-0-engine0", "engine0"), start("router-0", "router")]
    other = start("controller", "controller")
    assert len(processes_here(run_dir)) == 3
    assert leave(run_dir) == []
    assert [process.wait(5) for process in drain] == [-signal.SIGTERM] * 3
    assert other.poll() is None, "the controller is started again elsewhere by Ray"
    assert leave(run_dir) == [], "a second time there is nothing to do"


def test_who_does_not_end_is_named_at_the_bound(run_dir: RunDir, start: Start) -> None:
    start("decode-0-front", "front", STUBBORN)
    [left] = leave(run_dir, timeout_s=0.2)
    assert left.role == "front"


def test_notes_of_earlier_lives_and_broken_ones_are_passed_over(run_dir: RunDir, start: Start) -> None:
    gone = start("decode-0-front", "front")
    gone.kill()
    gone.wait(5)
    (run_dir.processes / "broken.json").write_text("{")
    assert processes_here(run_dir) == []
