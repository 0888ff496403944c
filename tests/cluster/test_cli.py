"""The command group: every command loads, help is cheap, wrong words are refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from cluster.cli import COMMANDS, SUMMARIES, main
from cluster.run_dir import RunDir

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_loads_and_has_help(name: str) -> None:
    shown = CliRunner().invoke(main, [name, "--help"])
    assert shown.exit_code == 0, shown.output
    assert name in SUMMARIES


def test_help_lists_all_and_imports_none() -> None:
    code = (
        "import sys\nfrom cluster.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('ray', 'torch', 'grpc', 'cluster.config') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")
    assert all(f"  {name} " in done.stdout for name in COMMANDS)


def test_an_unknown_command_is_refused() -> None:
    result = CliRunner().invoke(main, ["serve"])
    assert result.exit_code == 2
    assert "No such command 'serve'" in result.output


def test_a_target_that_is_no_command_is_a_defect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COMMANDS, "up", "cluster.cli:COMMANDS")
    with pytest.raises(TypeError, match="must be a click command, got dict"):
        main.get_command(click.Context(main), "up")


def test_validate_lists_every_problem_of_every_file(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text("model: {path: demo}\n")
    bad.write_text("modl: {}\n")
    result = CliRunner().invoke(main, ["validate", str(good), str(bad)])
    assert result.exit_code == 1
    assert f"{good}: fine" in result.output
    assert "did you mean `model`?" in result.output
    assert CliRunner().invoke(main, ["validate", str(good)]).exit_code == 0


def test_validate_warns_of_a_model_that_is_not_here(tmp_path: Path) -> None:
    file = tmp_path / "far.yaml"
    file.write_text("model: {path: /nowhere/model}\n")
    result = CliRunner().invoke(main, ["validate", "-f", str(file)])
    assert result.exit_code == 0
    assert f"{file}: fine\n{file}: on this machine `pdserve up` would fail: there is no model at" in result.output
    assert CliRunner().invoke(main, ["validate"]).exit_code == 2


def test_schema_is_json() -> None:
    result = CliRunner().invoke(main, ["config", "schema"])
    assert json.loads(result.output)["required"] == ["model"]


def test_status_and_down_where_nothing_runs(run_dir: RunDir) -> None:
    shown = CliRunner().invoke(main, ["status"])
    assert shown.exit_code == 3
    assert "Start one with `pdserve up`" in shown.output
    assert json.loads(CliRunner().invoke(main, ["status", "--json"]).output)["health"] == "not_running"
    assert CliRunner().invoke(main, ["down"]).exit_code == 0


@pytest.mark.parametrize("options", [[], ["--foreground"]])
def test_keep_is_for_a_ray_that_outlives_the_command(run_dir: RunDir, tmp_path: Path, options: list[str]) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("model: {path: x}\n")
    said = CliRunner().invoke(main, ["up", "-f", str(file), "--keep", *options])
    assert said.exit_code == 2
    assert "--keep needs --foreground, and a ray.address" in said.output
