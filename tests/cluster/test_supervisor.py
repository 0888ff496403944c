"""The whole of `up`, `status`, `down` with the real Valkey, Ray and supervisor; small actors stand in for workers."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from click.testing import CliRunner, Result

from cluster import launch
from cluster.cli import main as pdserve
from cluster.commands import load_bars
from cluster.ray_node import ray_environment
from cluster.run_dir import Phase, ProcessRef, RunDir, RunState, session_members

pytestmark = pytest.mark.cluster

STANDINS = "tests.cluster.standins"
ROOT = str(Path(__file__).resolve().parents[2])


def invoke(*args: str) -> Result:
    return CliRunner().invoke(pdserve, list(args), catch_exceptions=False)


def write_config(folder: Path, model_file: Path, **changes: object) -> Path:
    """JSON is YAML."""
    data = {"model": {"path": str(model_file)}, "router": {"port": 0}, "drain_s": 2, "start_timeout_s": 120, **changes}
    path = folder / "cluster.yaml"
    path.write_text(json.dumps(data))
    return path


def write_header(folder: Path) -> Path:
    """A directory that looks like a model from outside: the stand-ins never read its weights."""
    model = folder / "some_model"
    model.mkdir(exist_ok=True)
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "rms_norm_eps": 1e-6,
    }
    header = {"architectures": ["LlamaForCausalLM"], "vocab_size": 8, "max_position_embeddings": 8, **sizes}
    (model / "config.json").write_text(json.dumps(header))
    (model / "tokenizer.json").touch()
    return model


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    return write_config(tmp_path, write_header(tmp_path))


@pytest.fixture
def run_dir(run_dir: RunDir, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunDir]:
    monkeypatch.setenv("PYTHONPATH", ROOT)
    yield run_dir
    launch.stop(run_dir, 0.0)


def up(config_file: Path, *more: str) -> Result:
    return invoke("up", "-f", str(config_file), "--actors", STANDINS, *more)


def state(run_dir: RunDir) -> RunState:
    found = run_dir.read_state()
    assert found is not None
    return found


def test_up_status_restart_down(run_dir: RunDir, config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_bars, "LINE_EVERY_S", 0.0)
    started = up(config_file)
    assert started.exit_code == 0, started.output
    for worker in ("prefill-0", "decode-0"):
        assert f"{worker} has loaded 3.0 of 8.0 GB" in started.output
    first = state(run_dir)
    assert first.phase is Phase.READY
    assert first.routers
    assert first.routers[0] in started.output

    again = up(config_file)
    assert again.exit_code == 1
    assert "a cluster is ready already" in again.output
    assert_no_secret_is_visible(run_dir, first)
    assert_listens_on_loopback_only(first)

    shown = invoke("status", "--json")
    report = json.loads(shown.output)
    assert shown.exit_code == 1, "the small actors are in no registry"
    assert report["ray"].startswith("answers")
    assert report["valkey"].startswith("answers")
    assert {member["state"] for member in report["members"]} == {"missing"}

    assert_valkey_comes_back(run_dir, first)
    assert invoke("down").exit_code == 0
    assert session_members(first.supervisor) == []
    assert run_dir.read_state() is None
    assert not Path(first.sockets).exists()
    assert invoke("down").output == "No cluster is running.\n"
    assert invoke("status").exit_code == 3


def assert_no_secret_is_visible(run_dir: RunDir, running: RunState) -> None:
    secrets = [run_dir.secret(name).encode() for name in ("cluster", "valkey", "ray")]
    for member in session_members(running.supervisor):
        arguments = Path(f"/proc/{member.pid}/cmdline").read_bytes()
        assert not any(secret in arguments for secret in secrets)
    for log in run_dir.logs.iterdir():
        assert not any(secret in log.read_bytes() for secret in secrets)


def assert_listens_on_loopback_only(running: RunState) -> None:
    inodes = set()
    for member in session_members(running.supervisor):
        for entry in Path(f"/proc/{member.pid}/fd").iterdir():
            target = os.readlink(entry)
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    lines = (Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()).splitlines()
    listening = [line.split() for line in lines if line.split()[3] == "0A"]
    addresses = {fields[1].partition(":")[0] for fields in listening if fields[9] in inodes}
    assert addresses <= {"0100007F", "0000000000000000FFFF00000100007F"}
    assert addresses


def assert_valkey_comes_back(run_dir: RunDir, running: RunState) -> None:
    assert running.valkey is not None
    url = f"redis://:{run_dir.secret('valkey')}@{running.redis_url.removeprefix('redis://')}"
    retry = redis.retry.Retry(redis.backoff.ConstantBackoff(0.05), 200)
    with redis.Redis.from_url(url, retry=retry, retry_on_error=[redis.ConnectionError]) as client:
        client.set("kept", "yes")
        client.execute_command("WAITAOF", 1, 0, 2000)
        os.kill(running.valkey.pid, signal.SIGKILL)
        launch.wait_gone(running.valkey, 5.0)
        assert client.get("kept") == b"yes"
        assert client.info("server")["process_id"] != running.valkey.pid


def test_leftovers_of_a_killed_supervisor_are_cleaned_up_by_down(run_dir: RunDir, config_file: Path) -> None:
    assert up(config_file).exit_code == 0
    left = state(run_dir)
    os.kill(left.supervisor.pid, signal.SIGKILL)
    assert launch.wait_gone(left.supervisor, 5.0)
    assert session_members(left.supervisor)
    shown = invoke("status")
    assert shown.exit_code == 1
    assert "left behind by a supervisor that died" in shown.output
    assert invoke("down").exit_code == 0
    assert session_members(left.supervisor) == []


def test_an_actor_that_cannot_start_is_told_and_everything_ends(run_dir: RunDir, tmp_path: Path) -> None:
    model = {"path": str(write_header(tmp_path)), "name": "broken"}
    failed = up(write_config(tmp_path, tmp_path, model=model))
    assert failed.exit_code == 1
    assert "the model file is broken" in failed.output
    assert run_dir.read_state() is None


def test_what_is_wrong_is_found_before_anything_starts(run_dir: RunDir, tmp_path: Path) -> None:
    missing = up(write_config(tmp_path, tmp_path / "none.gguf"))
    assert missing.exit_code == 1
    assert "there is no model at" in missing.output
    model = write_header(tmp_path)
    (model / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    unsupported = up(write_config(tmp_path, model))
    assert unsupported.exit_code == 1
    assert "the architecture 'GPT2LMHeadModel' is not supported; supported are LlamaForCausalLM" in unsupported.output
    model = write_header(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        used = up(write_config(tmp_path, model, router={"port": port}))
    assert used.exit_code == 1
    assert f"port {port} of 127.0.0.1 is in use: stop what listens there, or set router.port" in used.output
    nowhere = up(write_config(tmp_path, model, redis={"url": f"redis://:secret@127.0.0.1:{port}/2"}))
    assert nowhere.exit_code == 1
    assert f"the Redis at redis://***@127.0.0.1:{port}/2 cannot be used" in nowhere.output
    assert "secret" not in nowhere.output
    typo = up(write_config(tmp_path, model, rooter={}))
    assert "did you mean `router`?" in typo.output
    assert run_dir.read_state() is None


def test_ray_variables_carry_a_path_to_the_token_never_the_token(run_dir: RunDir) -> None:
    variables = ray_environment(run_dir, "r1")
    assert run_dir.secret("ray") not in "".join(variables.values())
    assert Path(variables["RAY_AUTH_TOKEN_PATH"]).read_text() == run_dir.secret("ray")


def test_waiting_for_a_process_that_lives_is_bounded() -> None:
    assert not launch.wait_gone(ProcessRef.of(os.getpid()), 0.01)
