import json

import pytest
from click.testing import CliRunner
from safetensors import safe_open

from cluster.commands.model import model
from engine.model_source import DEMO_BYTES, demo_path
from tests.engine.checkpoints import CheckpointFamily, make_checkpoint


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PDSERVE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def run(*arguments):
    return CliRunner().invoke(model, arguments)


@pytest.mark.parametrize("family", list(CheckpointFamily))
@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_those_of_the_checkpoint(tmp_path, family, tied):
    directory = make_checkpoint(tmp_path / "tiny", family, tied=tied)
    with safe_open(directory / "model.safetensors", "numpy") as weights:
        num_weights = sum(weights.get_tensor(name).size for name in weights.keys())  # noqa: SIM118
    facts = json.loads(run("show", str(directory), "--json").stdout)
    assert facts["parameters"] == num_weights
    assert facts["num_layers"] == 3
    assert facts["tied_embeddings"] is tied
    assert facts["chat_template"] is True


def test_show_is_readable(tmp_path):
    directory = make_checkpoint(tmp_path / "tiny", CheckpointFamily.LLAMA, tied=True)
    result = run("show", str(directory))
    assert result.exit_code == 0
    shown = {
        name.strip(): value.strip() for name, _, value in (line.partition(":") for line in result.stdout.splitlines())
    }
    assert shown["architecture"] == "LlamaForCausalLM"
    assert shown["chat template"] == "yes"
    assert shown["max model len"] == "4096"


def test_what_is_wrong_is_one_line(tmp_path):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF and nothing more")
    for path in (tmp_path / "nothing", broken):
        result = run("show", str(path))
        assert result.exit_code == 1
        assert result.stderr.startswith("Error: ")
        assert len(result.stderr.splitlines()) == 1


def test_show_demo_says_how_to_fetch_it(cache):
    result = run("show", "demo")
    assert result.exit_code == 1
    assert "`pdserve model fetch demo`" in result.stderr


def test_fetch_leaves_a_fetched_model_alone(cache):
    cache.mkdir()
    with demo_path().open("wb") as file:
        file.truncate(DEMO_BYTES)
    before = demo_path().stat()
    result = run("fetch", "demo")
    assert result.exit_code == 0
    assert result.stdout == f"{demo_path()}\n"
    assert demo_path().stat().st_mtime_ns == before.st_mtime_ns


def test_only_the_demo_can_be_fetched(cache):
    assert run("fetch", "gpt-5").exit_code == 2
