"""The run directory: everything that one cluster keeps on this machine.

```
<run dir>/             0700
  lock                 held (flock) by the supervisor for as long as it lives
  state.json           what runs: pids with start times, addresses; written by the supervisor alone
  config.json          the configuration that runs
  secrets/             0600 each: cluster, valkey, ray
  processes/           our processes on this node
  valkey/              the registry's data
  ray/                 Ray's session: its logs
  logs/                our logs
```

On a node of a Ray that spans machines it is made by the first process of ours that comes there, with logs and
sockets only; secrets that are mounted ($PDSERVE_SECRETS_DIR, a file each) go before those of its own.

Unix sockets live in a short directory of their own under /tmp, because a socket's path has a limit of
107 bytes and a run directory's has not. States of a run: STARTING -> READY -> STOPPING -> (no state);
a supervisor that dies leaves its state behind, which the next `up` or `down` finds by the free lock.
"""

from __future__ import annotations

import enum
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

RUN_DIR_VARIABLE = "PDSERVE_RUN_DIR"
NODE_DIR_VARIABLE = "PDSERVE_NODE_DIR"
SECRETS_VARIABLE = "PDSERVE_SECRETS_DIR"
SECRET_BYTES = 32
MAX_SOCKET_PATH = 107


class Phase(enum.Enum):
    """Where a run is in its life."""

    STARTING = "starting"
    READY = "ready"
    STOPPING = "stopping"


class AlreadyRunningError(RuntimeError):
    """Another supervisor holds the run directory."""


class NoSecretError(RuntimeError):
    """A process has not been given the cluster's secret; one that it made itself would fit nobody else's."""


@dataclass(frozen=True)
class ProcessRef:
    """A process of this machine, told from any later one of the same pid by its start time."""

    pid: int
    started: int
    """Clock ticks between boot and the process's start."""

    @classmethod
    def of(cls, pid: int) -> ProcessRef:
        """Name a running process; ProcessLookupError if there is none."""
        return cls(pid, _stat_fields(pid).started)

    def is_alive(self) -> bool:
        """Whether that very process still runs (a zombie does not)."""
        try:
            found = _stat_fields(self.pid)
        except ProcessLookupError:
            return False
        return found.started == self.started and found.state not in "ZX"


@dataclass(frozen=True)
class _Stat:
    state: str
    session: int
    started: int


def _stat_fields(pid: int) -> _Stat:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError) as error:
        raise ProcessLookupError(f"no process {pid}") from error
    after_name = text.rpartition(")")[2].split()
    return _Stat(state=after_name[0], session=int(after_name[3]), started=int(after_name[19]))


def session_members(leader: ProcessRef) -> list[ProcessRef]:
    """Living processes of the session that `leader` founded, itself first if it lives.

    A session's number is not given to another process while the session has members, so members of a
    session whose leader is gone, or is that very leader, are its own.
    """
    members = []
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        try:
            found = _stat_fields(pid)
        except ProcessLookupError:
            continue
        if pid == leader.pid and found.started != leader.started:
            return []
        if found.session == leader.pid and found.started >= leader.started and found.state not in "ZX":
            members.append(ProcessRef(pid, found.started))
    return sorted(members, key=lambda member: member.pid != leader.pid)


@dataclass
class RunState:
    """What runs, as `status` and `down` need to know it."""

    phase: Phase
    run_id: str
    """New with each `up`."""
    supervisor: ProcessRef
    sockets: str
    """Directory of the unix sockets."""
    redis_url: str = ""
    """Without a password."""
    valkey: ProcessRef | None = None
    ray_address: str = ""
    ray_is_ours: bool = True
    ray: dict[str, ProcessRef] = field(default_factory=dict)
    """Processes of our own Ray: gcs_server, raylet."""
    routers: list[str] = field(default_factory=list)
    """Addresses for clients."""
    restarts: dict[str, int] = field(default_factory=dict)
    """How often the supervisor has restarted what."""
    metrics_address: str = ""
    """Of the supervisor's own /metrics."""

    def to_json(self) -> str:
        """The state as text."""
        return json.dumps({**asdict(self), "phase": self.phase.value}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> RunState:
        """The inverse of `to_json`."""
        data: dict[str, Any] = json.loads(text)
        data["phase"] = Phase(data["phase"])
        data["supervisor"] = ProcessRef(**data["supervisor"])
        data["valkey"] = ProcessRef(**data["valkey"]) if data["valkey"] else None
        data["ray"] = {name: ProcessRef(**ref) for name, ref in data["ray"].items()}
        return cls(**data)


class RunDir:
    """Paths in a run directory, and the few rules about them."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def default(cls) -> RunDir:
        """$PDSERVE_RUN_DIR, or `pdserve/default` in the user's state directory."""
        named = os.environ.get(RUN_DIR_VARIABLE)
        if named:
            return cls(Path(named).expanduser().absolute())
        base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
        return cls(Path(base).expanduser().absolute() / "pdserve" / "default")

    @classmethod
    def of_node(cls, path: str) -> RunDir:
        """That of a process which Ray has placed on this machine: $PDSERVE_NODE_DIR, or `path`, that of `up`."""
        return cls(Path(os.environ.get(NODE_DIR_VARIABLE) or path).expanduser().absolute())

    @property
    def state_file(self) -> Path:
        """Written by the supervisor alone."""
        return self.path / "state.json"

    @property
    def config_file(self) -> Path:
        """The configuration that runs, as JSON."""
        return self.path / "config.json"

    @property
    def logs(self) -> Path:
        """Directory of our logs."""
        return self.path / "logs"

    @property
    def processes(self) -> Path:
        """Directory of what our processes on this node say of themselves."""
        return self.path / "processes"

    def create(self) -> None:
        """Make the directory; PermissionError if it exists and is open to others."""
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        _require_private(self.path)
        for path in (self.path / "secrets", self.path / "valkey", self.processes, self.logs):
            path.mkdir(exist_ok=True, mode=0o700)

    @property
    def socket_dir(self) -> Path:
        """Directory of the unix sockets; its path is short, and the same for the same run directory."""
        name = hashlib.sha256(os.fsencode(self.path)).hexdigest()[:10]
        return Path(f"/tmp/pdserve-{os.getuid()}-{name}")

    @property
    def load_socket(self) -> Path:
        """Where the supervisor hears how far the engines have loaded (see `cluster.model_load`)."""
        return self.socket_dir / "load"

    def make_socket_dir(self) -> Path:
        """Make `socket_dir`, private."""
        path = self.socket_dir
        path.mkdir(mode=0o700, exist_ok=True)
        _require_private(path)
        return path

    def clear(self, state: RunState | None) -> None:
        """Forget a run that is over: its state and its sockets, not its data and logs."""
        if state is not None and state.sockets.startswith("/tmp/pdserve-"):
            shutil.rmtree(state.sockets, ignore_errors=True)
        self.state_file.unlink(missing_ok=True)

    def secret(self, name: str) -> str:
        """The secret of that name; one that nobody has given is made on first use."""
        try:
            return self.given_secret(name)
        except NoSecretError:
            write_private(self.path / "secrets" / name, secrets.token_hex(SECRET_BYTES))
        return self.given_secret(name)

    def given_secret(self, name: str) -> str:
        """The secret of that name: the mounted one, else this directory's; NoSecretError if there is neither."""
        path = self._file_of_secret(name)
        try:
            text = path.read_text().strip()
        except FileNotFoundError as error:
            raise NoSecretError(
                f"there is no secret {name!r} on this node (looked for {path}): mount the directory of the cluster's "
                f"secrets on every node, and name it in ${SECRETS_VARIABLE}"
            ) from error
        if not text:
            raise NoSecretError(f"the secret {path} is empty: write the cluster's secret into it")
        return text

    def _file_of_secret(self, name: str) -> Path:
        mounted = os.environ.get(SECRETS_VARIABLE)
        if mounted and (Path(mounted) / name).exists():
            return Path(mounted) / name
        return self.path / "secrets" / name

    def secret_path(self, name: str) -> Path:
        """The file that holds a secret."""
        self.secret(name)
        return self._file_of_secret(name)

    def read_state(self) -> RunState | None:
        """What the supervisor last wrote; None if there is nothing (readable)."""
        try:
            return RunState.from_json(self.state_file.read_text())
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def write_state(self, state: RunState) -> None:
        """Replace the state at once."""
        write_private(self.state_file, state.to_json())

    def running(self) -> RunState | None:
        """The state of a run whose supervisor lives; None otherwise."""
        state = self.read_state()
        return state if state is not None and state.supervisor.is_alive() else None

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Be the one supervisor of this directory; AlreadyRunningError if there is another."""
        descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise AlreadyRunningError(f"a cluster already runs from {self.path}") from error
            yield
        finally:
            os.close(descriptor)


def write_private(path: Path, text: str) -> None:
    """Replace a file at once by one that only its owner can read."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    temporary.replace(path)


def _require_private(path: Path) -> None:
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise PermissionError(f"{path} must be a directory of your own; remove it or set PDSERVE_RUN_DIR")
    if found.st_mode & 0o077:
        raise PermissionError(f"{path} must not be open to others: run `chmod 700 {path}`")
