"""What `up` checks and settles before it starts anything."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from cluster import launch
from cluster.config import ClusterConfig, ObservabilityConfig, from_plain, to_plain
from cluster.run_dir import RunDir
from router.config import RouterConfig
from tests.cluster.wanted_cluster import WantedCluster
from tests.engine.checkpoints import CheckpointFamily, make_checkpoint


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ClusterConfig:
    """A model and its cluster, named from the directory that the test stands in."""
    make_checkpoint(tmp_path / "model", CheckpointFamily.LLAMA, tied=True)
    monkeypatch.chdir(tmp_path)
    return from_plain({"model": {"path": "model"}, "router": {"port": 0}})


def test_paths_count_from_the_directory_of_up(config: ClusterConfig, run_dir: RunDir, tmp_path: Path) -> None:
    for name in ("cert.pem", "key.pem", "keys.txt"):
        (tmp_path / name).touch()
    router = RouterConfig(port=0, tls_cert="cert.pem", tls_key="key.pem", api_keys_file="keys.txt")
    asked = dataclasses.replace(config, router=router, observability=ObservabilityConfig(log_dir="logs"))
    settled = launch.check(asked, run_dir)
    assert settled.model.path == str(tmp_path / "model")
    assert settled.router.tls_cert == str(tmp_path / "cert.pem")
    assert settled.router.tls_key == str(tmp_path / "key.pem")
    assert settled.router.api_keys_file == str(tmp_path / "keys.txt")
    assert settled.observability.log_dir == str(tmp_path / "logs")


def test_a_file_that_is_not_there_is_named(config: ClusterConfig, run_dir: RunDir, tmp_path: Path) -> None:
    asked = dataclasses.replace(config, router=RouterConfig(port=0, api_keys_file="keys.txt"))
    with pytest.raises(launch.LaunchError, match=f"router.api_keys_file: {tmp_path / 'keys.txt'} cannot be read"):
        launch.check(asked, run_dir)


def test_a_port_is_chosen_once(config: ClusterConfig, run_dir: RunDir) -> None:
    settled = launch.check(config, run_dir)
    assert settled.router.port > 0
    assert launch.check(settled, run_dir) == settled


def test_a_broken_header_is_refused(config: ClusterConfig, run_dir: RunDir, tmp_path: Path) -> None:
    (tmp_path / "model" / "config.json").write_text("{")
    with pytest.raises(launch.LaunchError, match=r"config\.json is not valid JSON"):
        launch.check(config, run_dir)


def test_beside_what_runs_a_file_is_settled_as_up_did(config: ClusterConfig, run_dir: RunDir, tmp_path: Path) -> None:
    settled = launch.check(config, run_dir)
    assert launch.settle(config, to_plain(settled)) == settled
    asked = dataclasses.replace(config, router=RouterConfig(port=50777))
    assert launch.settle(asked, to_plain(settled)).router.port == 50777
    with pytest.raises(launch.LaunchError, match="there is no model at"):
        launch.settle(from_plain({"model": {"path": "elsewhere"}}), to_plain(settled))


def test_a_model_that_is_only_there_is_not_looked_for_here(config: ClusterConfig, run_dir: RunDir) -> None:
    running = {**to_plain(launch.check(config, run_dir)), "model": {"path": "/only/there"}}
    asked = from_plain({"model": {"path": "/only/there"}})
    assert launch.settle(asked, running).model.path == "/only/there"


def test_the_drain_is_that_of_what_was_last_applied(wanted: WantedCluster) -> None:
    generation = wanted.up()
    assert launch.drain_bound(wanted.run_dir) == 20
    applied = {**wanted.wish().config, "drain_s": 3.0}
    wanted.store.change(generation, wanted.store.history()[0], config=applied)
    assert launch.drain_bound(wanted.run_dir) == 3
