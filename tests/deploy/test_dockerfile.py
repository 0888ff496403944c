"""The Dockerfile, as its instructions say: stages, user, and what they install. No image is built here."""

from __future__ import annotations

import io
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

parse = pytest.importorskip("dockerfile_parse", reason="dockerfile-parse is not installed (extra: dev)")

ROOT = Path(__file__).parents[2]
FILE = ROOT / "deploy" / "Dockerfile"
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def stages() -> dict[str, list[tuple[str, str]]]:
    """The instructions of each stage by its name, with those of the stages that it stands on before them."""
    parser = parse.DockerfileParser(fileobj=io.BytesIO(FILE.read_bytes()))
    found: dict[str, list[tuple[str, str]]] = {"": []}
    name = ""
    for line in parser.structure:
        if line["instruction"] == "FROM":
            base, _, name = re.fullmatch(r"(\S+)( AS (\w[\w-]*))?", line["value"]).groups()
            found[name] = list(found.get(base, []))
        elif line["instruction"] != "COMMENT":
            found[name].append((line["instruction"], line["value"]))
    return found


def values(stage: list[tuple[str, str]], instruction: str) -> list[str]:
    return [value for name, value in stage if name == instruction]


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_each_target_runs_pdserve_as_a_user(stages: dict[str, list[tuple[str, str]]], target: str) -> None:
    stage = stages[target]
    assert values(stage, "USER")[-1] == "1000:1000"
    assert stage.index(("USER", "1000:1000")) > max(
        index for index, (name, _) in enumerate(stage) if name in ("RUN", "COPY")
    )
    assert json.loads(values(stage, "ENTRYPOINT")[-1]) == ["pdserve"]
    assert "pdserve" in PROJECT["project"]["scripts"]
    assert values(stage, "COPY") == [f"--from=build-{target} /opt/pdserve /opt/pdserve"], (
        "no sources, no compilers' rest"
    )


def test_what_is_installed_is_what_pyproject_says(stages: dict[str, list[tuple[str, str]]]) -> None:
    [ray] = [need for need in PROJECT["project"]["dependencies"] if need.startswith("ray")]
    for target, install in (("cpu", "pip install . "), ("cuda", 'pip install ".[gpu]" ')):
        run = values(stages[f"build-{target}"], "RUN")[-1]
        assert install in run
        assert f'"{ray.replace("ray", "ray[default]", 1)}"' in run
        arguments = dict(value.split("=", 1) for value in values(stages[f"build-{target}"], "ARG"))
        assert f"TORCH_VERSION ?= {arguments['TORCH_VERSION']}" in (ROOT / "Makefile").read_text()
        assert ("cpu" in arguments["TORCH_INDEX"]) == (target == "cpu")
    assert "gpu" in PROJECT["project"]["optional-dependencies"]


def test_every_package_is_copied_and_let_through(stages: dict[str, list[tuple[str, str]]]) -> None:
    packages = {name.partition(".")[0] for name in PROJECT["tool"]["setuptools"]["packages"]}
    copied = " ".join(values(stages["build-cpu"], "COPY")).split()
    let_through = (ROOT / "deploy" / "Dockerfile.dockerignore").read_text().split("\n")
    for name in packages:
        assert f"./{name}" in copied
        assert f"!{name}" in let_through
    for name in copied:
        assert name.startswith("./") or f"!{name}" in let_through
    assert values(stages["build-cpu"], "COPY")[0].split()[:3] == ["pyproject.toml", "README.md", "LICENSE"]
