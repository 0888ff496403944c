"""How a process begins on a node that has nothing of the machine of `up`."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from cluster.config import ClusterConfig, PoolConfig, from_plain, to_plain
from cluster.process import NodeProcess, at_node, begin, with_hosts
from cluster.run_dir import NoSecretError, RunDir
from engine.config import ModelOptions


@dataclass(frozen=True, kw_only=True)
class Spec:
    config: dict[str, Any]
    run_dir: str
    redis_url: str = "redis://:word@127.0.0.1:1/0"


@pytest.fixture
def config() -> ClusterConfig:
    return ClusterConfig(model=ModelOptions(path="x"), prefill=PoolConfig(host="node"), drain_s=7)


@pytest.fixture
def mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "mounted"
    directory.mkdir()
    (directory / "cluster").write_text("abc\n")
    monkeypatch.setenv("PDSERVE_SECRETS_DIR", str(directory))
    return directory


def test_the_run_directory_is_made_on_the_node_and_the_secret_comes_from_the_mounted_ones(
    config: ClusterConfig, mounted: Path, tmp_path: Path
) -> None:
    path = tmp_path / "node" / "run"
    assert begin("front", "decode-0", config, str(path), "redis://127.0.0.1:1/0") == b"abc"
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert (path / "logs" / "decode-0-front.log").exists()
    assert not (path / "secrets" / "cluster").exists()
    note = NodeProcess.read(path / "processes" / "decode-0-front.json")
    assert note is not None
    assert (note.role, note.process.pid, note.drain_s, note.node_id) == ("front", os.getpid(), 7, "")


def test_a_node_without_the_secret_makes_none_of_its_own(config: ClusterConfig, tmp_path: Path) -> None:
    with pytest.raises(NoSecretError, match="mount the directory of the cluster's secrets on every node"):
        begin("front", "decode-0", config, str(tmp_path / "run"), "redis://127.0.0.1:1/0")


def test_an_empty_secret_is_none(mounted: Path, run_dir: RunDir) -> None:
    (mounted / "cluster").write_text("\n")
    with pytest.raises(NoSecretError, match="is empty"):
        run_dir.given_secret("cluster")


def test_mounted_secrets_go_before_those_of_the_run_directory(
    run_dir: RunDir, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    own = run_dir.secret("cluster")
    (tmp_path / "cluster").write_text("mounted")
    monkeypatch.setenv("PDSERVE_SECRETS_DIR", str(tmp_path))
    assert run_dir.secret("cluster") == run_dir.given_secret("cluster") == "mounted"
    assert run_dir.secret_path("cluster") == tmp_path / "cluster"
    assert run_dir.secret("valkey") == (run_dir.path / "secrets" / "valkey").read_text()
    monkeypatch.delenv("PDSERVE_SECRETS_DIR")
    assert run_dir.secret("cluster") == own


def test_what_a_process_is_told_is_seen_from_its_node(
    config: ClusterConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PDSERVE_NODE_DIR", str(tmp_path / "here"))
    told = Spec(config=to_plain(replace(config, prefill=PoolConfig())), run_dir="/of/up")
    assert at_node(told) == replace(told, run_dir=str(tmp_path / "here"))
    monkeypatch.delenv("PDSERVE_NODE_DIR")
    assert at_node(told) == told


def test_only_hosts_that_are_node_become_the_nodes_address(config: ClusterConfig) -> None:
    plain = to_plain(config)
    seen = from_plain(with_hosts(plain, lambda: "10.1.2.3"))
    assert (seen.prefill.host, seen.decode.host, seen.router.host) == ("10.1.2.3", "127.0.0.1", "127.0.0.1")
    assert plain["prefill"]["host"] == "node"
    keys = (("decode", "host"), ("transfer", "host"), ("router", "host"), ("observability", "metrics_host"))
    for section, key in keys:
        plain[section][key] = "node"
    everywhere = with_hosts(plain, lambda: "10.1.2.3")
    assert {everywhere[section][key] for section, key in keys} == {"10.1.2.3"}
