"""`pdserve apply`, with a wish in a real Valkey and a controller that settles it."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from cluster.cli import main
from cluster.cluster_store import Decision
from cluster.wish_change import BusyWishError, Proposal, write
from tests.cluster.wanted_cluster import YAML, FakeController, WantedCluster
from tests.real_valkey import RealValkey

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 20.0


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(YAML))
    return path


def edit(file: Path, **sections: Any) -> None:
    file.write_text(yaml.safe_dump({**YAML, **sections}))


def run(file: Path, *more: str) -> Result:
    return CliRunner().invoke(main, ["apply", "-f", str(file), *more])


def test_a_change_is_written_and_waited_for(wanted: WantedCluster, file: Path, valkey: RealValkey) -> None:
    generation = wanted.up()
    edit(file, decode={"workers": 3}, drain_s=5)
    with FakeController(valkey, takes_s=0.5):
        shown = run(file)
    assert shown.exit_code == 0, shown.output
    assert "decode: 2 -> 3 workers" in shown.stdout
    assert "Done (0." in shown.stdout
    assert "... decode-2: starting" in shown.stderr
    wish = wanted.wish()
    assert (wish.generation, wish.by, wish.sizes) == (generation + 1, "apply", {"prefill": 1, "decode": 3})
    assert (wish.config["drain_s"], wish.config["router"]["port"]) == (5, 50123)
    decision = wanted.store.history(1)[0]
    assert decision.what == "decode.workers 2 -> 3; drain_s 20 -> 5"
    assert decision.details["changes"][0]["key"] == "decode.workers"


def test_what_is_there_already_is_not_written_again(wanted: WantedCluster, file: Path) -> None:
    generation = wanted.up()
    shown = run(file)
    assert (shown.exit_code, wanted.wish().generation) == (0, generation)
    assert "nothing to do" in shown.output
    assert json.loads(run(file, "--json").stdout)["settled"] is True


def test_a_size_that_was_scaled_stays(wanted: WantedCluster, file: Path) -> None:
    generation = wanted.up()
    wanted.store.change(
        generation, Decision(at=1.0, by="scale", what="decode 2 -> 6"), sizes={"prefill": 1, "decode": 6}
    )
    edit(file, drain_s=5)
    assert "apply leaves it at 6" in run(file, "--no-wait").output
    assert wanted.wish().sizes["decode"] == 6
    assert wanted.wish().config["drain_s"] == 5


def test_a_restart_is_refused_and_nothing_written(wanted: WantedCluster, file: Path) -> None:
    generation = wanted.up()
    edit(file, cache={"block_size": 32}, drain_s=5)
    shown = run(file)
    assert shown.exit_code == 5
    assert "cache.block_size cannot change while the cluster runs" in shown.output
    assert wanted.wish().generation == generation


def test_a_bad_file_changes_nothing(wanted: WantedCluster, file: Path) -> None:
    generation = wanted.up()
    file.write_text("model: {path: demo}\nscaling: {mode: sometimes}\n")
    shown = run(file)
    assert shown.exit_code == 1
    assert f"{file}:2: scaling.mode must be one of" in shown.output
    assert wanted.wish().generation == generation


def test_without_a_controller_it_stays_asked_for(wanted: WantedCluster, file: Path) -> None:
    generation = wanted.up()
    edit(file, drain_s=5)
    shown = run(file, "--timeout", "0.5", "--json")
    assert shown.exit_code == 6
    told = json.loads(shown.stdout)
    assert (told["settled"], told["generation"]) == (False, generation + 1)


def test_no_wait_returns_at_once(wanted: WantedCluster, file: Path) -> None:
    wanted.up()
    edit(file, drain_s=5)
    shown = run(file, "--no-wait")
    assert shown.exit_code == 0
    assert "pdserve status --watch" in shown.output


def test_a_budget_that_cannot_be_kept_is_refused(wanted: WantedCluster, file: Path) -> None:
    wanted.up()
    edit(file, decode={"workers": 9}, scaling={"max_workers": 4})
    shown = run(file)
    assert shown.exit_code == 1
    assert "are 10 workers, more than scaling.max_workers (4)" in shown.output


def test_who_is_faster_once_is_taken_in_and_twice_is_named(wanted: WantedCluster) -> None:
    generation = wanted.up()

    def meddler(times: int) -> Callable[[Any], Proposal]:
        left = [times]

        def decide(wish: Any) -> Proposal:
            if left[0]:
                left[0] -= 1
                wanted.store.change(
                    wish.generation,
                    Decision(at=1.0, by="autoscaler", what="decode"),
                    sizes={**wish.sizes, "decode": wish.sizes["decode"] + 1},
                )
            decision = Decision(at=1.0, by="scale", what="prefill")
            return Proposal(decision=decision, sizes={**wish.sizes, "prefill": 5})

        return decide

    assert write(wanted.store, meddler(1)) == generation + 2
    assert wanted.wish().sizes == {"prefill": 5, "decode": 3}
    with pytest.raises(BusyWishError, match="autoscaler changed what is wanted twice"):
        write(wanted.store, meddler(2))


class Watching:
    """`pdserve apply --watch` in a process of its own, and what it prints."""

    def __init__(self, file: Path) -> None:
        command = [sys.executable, "-m", "tests.cluster.pdserve", "apply", "-f", str(file), "--watch"]
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._lines: queue.Queue[str] = queue.Queue()
        self.seen: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line.rstrip())

    def wait_for(self, text: str) -> str:
        """The next line that has `text`."""
        give_up_at = time.monotonic() + LIMIT_S
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, give_up_at - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"waited {LIMIT_S} s for {text!r}, saw {self.seen}") from None
            self.seen.append(line)
            if text in line:
                return line

    def close(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(LIMIT_S)
        self._reader.join(LIMIT_S)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return status


@pytest.fixture
def watching(wanted: WantedCluster, tmp_path: Path, valkey: RealValkey) -> Iterator[Watching]:
    """It watches a file as a ConfigMap has it: cluster.yaml -> ..data/cluster.yaml, ..data -> one."""
    wanted.up()
    (tmp_path / "one").mkdir()
    edit(tmp_path / "one" / "cluster.yaml")
    (tmp_path / "..data").symlink_to("one")
    (tmp_path / "cluster.yaml").symlink_to("..data/cluster.yaml")
    watcher = Watching(tmp_path / "cluster.yaml")
    yield watcher
    if watcher.process.poll() is None:
        watcher.close()


def swap(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "cluster.yaml").write_text(text)
    (tmp_path / "..new").symlink_to(name)
    (tmp_path / "..new").replace(tmp_path / "..data")


def test_a_watched_file_is_applied_whenever_it_changes(
    watching: Watching, wanted: WantedCluster, tmp_path: Path, valkey: RealValkey
) -> None:
    with FakeController(valkey):
        watching.wait_for("nothing to do")
        began = time.monotonic()
        swap(tmp_path, "two", yaml.safe_dump({**YAML, "drain_s": 7}))
        watching.wait_for("applying")
        assert time.monotonic() - began < 2.0
        watching.wait_for("done")
        assert wanted.wish().config["drain_s"] == 7
        edit(tmp_path / "two" / "cluster.yaml", drain_s=-1)
        watching.wait_for("not applied, what ran before stands")
        assert "drain_s must be between" in watching.wait_for("drain_s")
        edit(tmp_path / "two" / "cluster.yaml", mode="colocated")
        assert "mode cannot change" in watching.wait_for("what ran before stands")
        assert wanted.wish().config["drain_s"] == 7
        edit(tmp_path / "two" / "cluster.yaml", drain_s=9)
        watching.wait_for("done")
        assert wanted.wish().config["drain_s"] == 9
    assert watching.close() == 0
    assert "stopped watching" in watching.wait_for("stopped")


def test_a_change_while_redis_is_gone_is_applied_later(
    watching: Watching, wanted: WantedCluster, tmp_path: Path, valkey: RealValkey
) -> None:
    watching.wait_for("nothing to do")
    valkey.kill()
    swap(tmp_path, "two", yaml.safe_dump({**YAML, "drain_s": 7}))
    watching.wait_for("could not read the wish")
    valkey.start()
    with FakeController(valkey):
        watching.wait_for("done")
    assert wanted.wish().config["drain_s"] == 7


def test_json_has_no_place_in_a_watch(file: Path) -> None:
    assert run(file, "--watch", "--json").exit_code == 2
