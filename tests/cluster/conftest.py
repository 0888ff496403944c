"""What the tests of a running cluster share."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.run_dir import RunDir


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """An empty run directory, also for the commands that a test calls."""
    directory = RunDir(tmp_path / "run")
    monkeypatch.setenv("PDSERVE_RUN_DIR", str(directory.path))
    directory.create()
    return directory
