"""The run directory: private, one supervisor, state that tells a process from a later one of its pid."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.run_dir import AlreadyRunningError, Phase, ProcessRef, RunDir, RunState, session_members


def state_of(ref: ProcessRef, sockets: Path) -> RunState:
    return RunState(
        phase=Phase.READY, run_id="r1", supervisor=ref, sockets=str(sockets), valkey=ref, ray={"raylet": ref}
    )


def test_everything_is_private(run_dir: RunDir) -> None:
    secret = run_dir.secret("cluster")
    assert len(secret) == 64
    assert run_dir.secret("cluster") == secret
    assert run_dir.secret("valkey") != secret
    for path in [run_dir.path, *run_dir.path.iterdir()]:
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert stat.S_IMODE(run_dir.secret_path("cluster").stat().st_mode) == 0o600


def test_a_directory_open_to_others_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    with pytest.raises(PermissionError, match="chmod 700"):
        RunDir(tmp_path / "open").create()
    (tmp_path / "link").symlink_to(tmp_path / "open")
    with pytest.raises(PermissionError, match="must be a directory of your own"):
        RunDir(tmp_path / "link").create()


def test_default_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PDSERVE_RUN_DIR", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", "/somewhere")
    assert RunDir.default().path == Path("/somewhere/pdserve/default")
    monkeypatch.setenv("PDSERVE_RUN_DIR", "rel")
    assert RunDir.default().path == Path.cwd() / "rel"


def test_the_socket_directory_is_short_private_and_always_the_same(tmp_path: Path) -> None:
    deep = RunDir(tmp_path / ("d" * 150))
    path = deep.make_socket_dir()
    try:
        assert path == deep.make_socket_dir()
        assert len(str(path / "plasma_store_socket")) < 107
        path.chmod(0o777)
        with pytest.raises(PermissionError):
            deep.make_socket_dir()
    finally:
        path.rmdir()


def test_one_supervisor_at_a_time(run_dir: RunDir) -> None:
    with run_dir.hold(), pytest.raises(AlreadyRunningError, match=str(run_dir.path)), run_dir.hold():
        pass
    with run_dir.hold():
        pass


def test_state_round_trip_and_garbage(run_dir: RunDir) -> None:
    assert run_dir.read_state() is None
    state = state_of(ProcessRef.of(os.getpid()), run_dir.path)
    run_dir.write_state(state)
    assert run_dir.read_state() == state
    assert run_dir.running() == state
    for text in ("", "{", "[]", '{"phase": "asleep"}'):
        run_dir.state_file.write_text(text)
        assert run_dir.read_state() is None


def test_state_of_a_dead_supervisor_is_not_running(run_dir: RunDir) -> None:
    mine = ProcessRef.of(os.getpid())
    run_dir.write_state(state_of(ProcessRef(mine.pid, mine.started - 1), run_dir.path))
    assert run_dir.read_state() is not None
    assert run_dir.running() is None


def test_a_zombie_is_not_alive() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    ref = ProcessRef.of(process.pid)
    assert ref.is_alive()
    os.kill(process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert not ref.is_alive()
    process.communicate()
    with pytest.raises(ProcessLookupError):
        ProcessRef.of(process.pid)


def test_session_members_are_the_session_and_nobody_else() -> None:
    code = "import subprocess, sys; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); p.wait()"
    leader = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    assert leader.stdout is not None
    child = int(leader.stdout.readline())
    ref = ProcessRef.of(leader.pid)
    try:
        assert [member.pid for member in session_members(ref)] == [leader.pid, child]
        assert session_members(ProcessRef(ref.pid, ref.started - 1)) == []
        leader.kill()
        leader.wait()
        assert [member.pid for member in session_members(ref)] == [child]
    finally:
        os.kill(child, signal.SIGKILL)
        leader.stdout.close()
