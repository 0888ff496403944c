"""Starts and stops the supervisor from outside: what `up` and `down` do, without their words.

`check` finds what is wrong before anything is started; `start` follows the supervisor's progress; `stop`
ends a run whatever is left of it, and does nothing where nothing runs.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis

from cluster.children import send_signal
from cluster.config import NODE_HOST, ClusterConfig, public_url, to_plain
from cluster.connect import current_config
from cluster.placement import port_of, router_ids
from cluster.ray_node import package_environment
from cluster.run_dir import AlreadyRunningError, ProcessRef, RunDir, session_members, write_private
from cluster.valkey import free_port
from engine.errors import ModelError
from engine.model_source import DEMO_NAME, resolve
from engine.models.config import ModelConfig

STOP_MARGIN_S = 45.0
"""What a stop may take beyond its drain: the driver, Ray's own grace, the sweep."""
KILL_GRACE_S = 5.0
REDIS_TIMEOUT_S = 5.0


class LaunchError(RuntimeError):
    """The cluster cannot be started; the message says what to do."""


@dataclass
class Launched:
    """A supervisor that has been started."""

    process: subprocess.Popen[bytes]
    events: Iterator[dict[str, Any]]
    """Its progress, to the last event (see `cluster.progress`)."""


def check(config: ClusterConfig, run_dir: RunDir) -> ClusterConfig:
    """The configuration settled: its paths made absolute and its router's port fixed, for restarts to keep.

    LaunchError if it cannot run here and now.
    """
    running = run_dir.running()
    if running is not None:
        raise LaunchError(
            f"a cluster is {running.phase.value} already (supervisor {running.supervisor.pid}, from {run_dir.path}): "
            "stop it with `pdserve down`, or set PDSERVE_RUN_DIR to run another one beside it"
        )
    config = _absolute_paths(_absolute_model(config))
    router, observability = config.router, config.observability
    ports = [
        *(("router.port", router.host, port_of(router.port, name)) for name in router_ids(config)),
        *(
            ("observability.metrics_port", observability.metrics_host, port_of(observability.metrics_port, name))
            for name in router_ids(config)
        ),
        ("redis.port", "127.0.0.1", 0 if config.redis.url else config.redis.port),
        ("ray.port", "127.0.0.1", 0 if config.ray.address else config.ray.port),
    ]
    for name, host, port in ports:
        if port and host != NODE_HOST and not (name == "router.port" and config.ray.address):
            _check_port(name, host, port)
    if config.redis.url:
        _check_redis(config.redis.url)
    return _with_port(config, free_port(config.router.replicas)) if config.router.port == 0 else config


def settle(config: ClusterConfig, running: dict[str, Any]) -> ClusterConfig:
    """The configuration as `check` would settle it beside the one that runs, so that the two can be compared.

    LaunchError if a file that it names cannot be used.
    """
    if config.model.path != running["model"]["path"]:
        config = _absolute_model(config)
    config = _absolute_paths(config)
    return _with_port(config, running["router"]["port"]) if config.router.port == 0 else config


def _with_port(config: ClusterConfig, port: int) -> ClusterConfig:
    return dataclasses.replace(config, router=dataclasses.replace(config.router, port=port))


def _absolute_model(config: ClusterConfig) -> ClusterConfig:
    try:
        source = resolve(config.model.path, config.model.load_format)
        ModelConfig.load(source)
    except ModelError as error:
        raise LaunchError(str(error)) from error
    if config.model.path == DEMO_NAME:
        return config
    return dataclasses.replace(config, model=dataclasses.replace(config.model, path=str(source.path.resolve())))


def _check_port(name: str, host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                what = f"port {port} of {host} is in use: stop what listens there, or set {name} to another port"
            else:
                what = (
                    f"cannot listen on {host}:{port} ({error.strerror}): set {name.rpartition('.')[0]}'s host or port"
                )
            raise LaunchError(f"{what} (0 takes any free one)") from error


def _absolute_paths(config: ClusterConfig) -> ClusterConfig:
    """Files named in the YAML count from the directory of `up`, not from where the processes run."""
    files = {name: getattr(config.router, name) for name in ("tls_cert", "tls_key", "api_keys_file")}
    given = {name: Path(file).expanduser().absolute() for name, file in files.items() if file is not None}
    for name, file in given.items():
        if not os.access(file, os.R_OK):
            raise LaunchError(f"router.{name}: {file} cannot be read: name a file that this user may read")
    changes: dict[str, Any] = {name: str(file) for name, file in given.items()}
    router = dataclasses.replace(config.router, **changes)
    log_dir = config.observability.log_dir
    there = None if log_dir is None else str(Path(log_dir).expanduser().absolute())
    observability = dataclasses.replace(config.observability, log_dir=there)
    return dataclasses.replace(config, router=router, observability=observability)


def _check_redis(url: str) -> None:
    try:
        bound = REDIS_TIMEOUT_S
        with redis.Redis.from_url(url, protocol=2, socket_connect_timeout=bound, socket_timeout=bound) as client:
            client.ping()
    except (redis.RedisError, OSError, ValueError) as error:
        raise LaunchError(
            f"the Redis at {public_url(url)} cannot be used ({error}): start it, mend redis.url (with its password) or "
            "redis.password_file, "
            "or leave redis.url out to have an embedded one"
        ) from error


def start(
    config: ClusterConfig,
    run_dir: RunDir,
    *,
    actors: str = "cluster.actors",
    attached: bool = False,
    keep: bool = False,
) -> Launched:
    """Start the supervisor in a session of its own; `attached`: it stops when this process ends.

    `keep`: SIGTERM leaves workers and routers running.
    """
    run_dir.create()
    write_private(run_dir.config_file, json.dumps(to_plain(config)))
    for name in ("cluster", "valkey", "ray"):
        run_dir.secret(name)
    argv = [sys.executable, "-m", "cluster.supervisor", str(run_dir.path), "--actors", actors]
    if attached:
        argv += ["--parent", str(os.getpid())]
    if keep:
        argv.append("--keep")
    read_end, write_end = os.pipe()
    with (run_dir.logs / "supervisor.err").open("wb") as errors:
        process = subprocess.Popen(
            [*argv, "--progress-fd", str(write_end)],
            env={**os.environ, **package_environment()},
            cwd=run_dir.path,
            stdin=subprocess.DEVNULL,
            stdout=errors,
            stderr=errors,
            pass_fds=[write_end],
            start_new_session=True,
        )
    os.close(write_end)
    return Launched(process, _events(read_end, run_dir))


def _events(read_end: int, run_dir: RunDir) -> Iterator[dict[str, Any]]:
    ended = False
    with os.fdopen(read_end) as lines:
        for line in lines:
            event = json.loads(line)
            ended = event["event"] in ("ready", "failed")
            yield event
    if not ended:
        tail = (run_dir.logs / "supervisor.err").read_text(errors="replace").splitlines()[-3:]
        yield {"event": "failed", "message": "\n".join(["the supervisor ended unasked", *tail])}


def stop(run_dir: RunDir, timeout_s: float) -> bool:
    """Drain and end what runs from a run directory; False if nothing did.

    After `timeout_s` the drain is cut short; what still lives `STOP_MARGIN_S` later is killed.
    """
    state = run_dir.read_state()
    if state is None:
        return False
    supervisor = state.supervisor
    was_alive = supervisor.is_alive()
    if was_alive:
        send_signal(supervisor, signal.SIGINT)
        if not wait_gone(supervisor, timeout_s):
            send_signal(supervisor, signal.SIGINT)
            wait_gone(supervisor, STOP_MARGIN_S)
    left = session_members(supervisor)
    for number, grace_s in ((signal.SIGTERM, KILL_GRACE_S), (signal.SIGKILL, KILL_GRACE_S)):
        for ref in left:
            send_signal(ref, number)
        until = time.monotonic() + grace_s
        left = [ref for ref in left if not wait_gone(ref, max(0.0, until - time.monotonic()))]
    try:
        with run_dir.hold():
            run_dir.clear(state)
    except AlreadyRunningError:
        return was_alive  # a new run has begun meanwhile; it is not ours to clear
    return was_alive or bool(left)


def wait_gone(ref: ProcessRef, timeout_s: float) -> bool:
    """Wait, at most `timeout_s` seconds, until that process has ended; whether it has."""
    try:
        descriptor = os.pidfd_open(ref.pid)
    except ProcessLookupError:
        return True
    try:
        if not ref.is_alive():
            return True
        poller = select.poll()
        poller.register(descriptor, select.POLLIN)
        return bool(poller.poll(timeout_s * 1000))
    finally:
        os.close(descriptor)


def default_config_file() -> Path:
    """`pdserve.yaml` here, else the demo's."""
    here = Path("pdserve.yaml")
    return here if here.is_file() else Path(__file__).resolve().parents[1] / "deploy" / "examples" / "cpu-demo.yaml"


def drain_bound(run_dir: RunDir) -> float:
    """How long the cluster that runs may drain, by the YAML that was last applied, in seconds."""
    try:
        return float(current_config(run_dir)["drain_s"])
    except (OSError, ValueError, KeyError):
        return 0.0
