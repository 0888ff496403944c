"""`pdserve plan-diff` beside a wish in a real Valkey."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from cluster.cli import main
from cluster.connect import current_config
from tests.cluster.wanted_cluster import YAML, WantedCluster


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(YAML))
    return path


def edit(file: Path, **sections: Any) -> None:
    file.write_text(yaml.safe_dump({**YAML, **sections}))


def run(file: Path, *more: str) -> Result:
    return CliRunner().invoke(main, ["plan-diff", "-f", str(file), *more])


def test_an_unchanged_file_gives_no_difference(wanted: WantedCluster, file: Path) -> None:
    wanted.up()
    shown = run(file)
    assert (shown.exit_code, shown.output) == (0, f"{file}: nothing to do, this is what runs (generation 1).\n")


def test_paths_and_the_port_are_settled_before_they_are_compared(
    wanted: WantedCluster, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "keys").touch()
    given = {"port": 0, "api_keys_file": "keys"}
    wanted.up(
        router={**given, "api_keys_file": str(tmp_path / "keys")}, observability={"log_dir": str(tmp_path / "logs")}
    )
    edit(file, router=given, observability={"log_dir": "logs"})
    assert run(file).exit_code == 0
    (tmp_path / "keys").unlink()
    shown = run(file)
    assert shown.exit_code == 1
    assert "router.api_keys_file" in shown.output


def test_each_change_has_a_line_with_what_it_needs(wanted: WantedCluster, file: Path) -> None:
    wanted.up()
    edit(file, decode={"workers": 3, "max_running": 9}, scaling={"mode": "advise"})
    shown = run(file)
    assert shown.exit_code == 4
    lines = {line.split()[0]: " ".join(line.split()) for line in shown.output.splitlines() if line.startswith("  ")}
    assert lines["decode.workers"] == "decode.workers 2 3 hot decode: 2 -> 3 workers"
    assert lines["decode.max_running"].startswith("decode.max_running 64 9 drain: decode each decode worker is")
    assert lines["scaling.mode"].startswith("scaling.mode off advise hot the autoscaler says")


def test_a_restart_has_an_exit_code_of_its_own(wanted: WantedCluster, file: Path) -> None:
    wanted.up()
    edit(file, mode="colocated")
    shown = run(file)
    assert shown.exit_code == 5
    assert "`pdserve down`, `pdserve up`" in shown.output


def test_json_has_all_of_it(wanted: WantedCluster, file: Path) -> None:
    generation = wanted.up()
    edit(file, decode={"workers": 3})
    told = json.loads(run(file, "--json").stdout)
    assert told["generation"] == generation
    assert told["needs"] == "hot"
    assert told["changes"] == [
        {
            "key": "decode.workers",
            "now": 2,
            "then": 3,
            "needs": "hot",
            "touches": [],
            "means": "decode: 2 -> 3 workers",
        }
    ]
    assert told["sizes"]["decode"] == {"now": 2, "then": 3, "file": 3, "running_config": 2}


def test_a_bad_file_is_refused_with_its_line(wanted: WantedCluster, file: Path) -> None:
    wanted.up()
    file.write_text("model: {path: demo}\ndecode:\n  worker: 2\n")
    shown = run(file)
    assert shown.exit_code == 1
    assert f"{file}:3: decode.worker: unknown key; did you mean `workers`?" in shown.output


def test_where_nothing_runs(run_dir: Any, file: Path) -> None:
    shown = run(file)
    assert shown.exit_code == 3
    assert "no cluster is running" in shown.output


def test_before_anything_is_wanted(wanted: WantedCluster, file: Path) -> None:
    wanted.run_dir.config_file.write_text(json.dumps({"redis": {"url": None}}))
    assert run(file).exit_code == 3


def test_redis_url_of_the_file_is_enough_elsewhere(wanted: WantedCluster, file: Path, valkey: Any) -> None:
    wanted.up(redis={"url": valkey.url})
    wanted.run_dir.state_file.unlink()
    edit(file, redis={"url": valkey.url})
    assert run(file).exit_code == 0


def test_a_redis_that_is_gone_is_named(wanted: WantedCluster, file: Path, valkey: Any) -> None:
    wanted.up()
    valkey.kill()
    shown = run(file)
    assert shown.exit_code == 1
    assert "could not read the wish" in shown.output
    assert current_config(wanted.run_dir)["drain_s"] == 20
    valkey.start()


def test_the_config_that_counts_is_the_one_that_was_applied(wanted: WantedCluster) -> None:
    generation = wanted.up()
    wish = wanted.wish()
    decision = wanted.store.history()[0]
    wanted.store.change(generation, decision, config={**wish.config, "drain_s": 3.0})
    assert current_config(wanted.run_dir)["drain_s"] == 3.0
