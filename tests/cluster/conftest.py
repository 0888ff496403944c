"""What the tests of a running cluster share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.run_dir import RunDir
from tests.cluster.wanted_cluster import WantedCluster
from tests.real_valkey import RealValkey


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """An empty run directory, also for the commands that a test calls."""
    directory = RunDir(tmp_path / "run")
    monkeypatch.setenv("PDSERVE_RUN_DIR", str(directory.path))
    directory.create()
    return directory


@pytest.fixture
def wanted(run_dir: RunDir, valkey: RealValkey) -> Iterator[WantedCluster]:
    """A cluster of which nothing is wanted yet, for the commands that a test calls."""
    cluster = WantedCluster(run_dir, valkey)
    yield cluster
    cluster.close()
