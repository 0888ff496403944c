"""A Ray cluster on loopback whose autoscaler starts and ends nodes: Ray's own autoscaler (v2), fake machines.

`FakeNodes` starts `python -m tests.fake_nodes SETTINGS_FILE` in a session of its own. That process starts
the head (gcs_server, monitor, raylet) and waits for the end of its input; the monitor starts a raylet for
each node that pending places need. At exit every process of the session is ended, by its id. Ray's
`AutoscalingCluster` would do for one cluster on a machine: it ends all others with `ray stop --force`.

Processes find the token by RAY_AUTH_TOKEN_PATH, which they inherit; a driver needs `environment` before it
imports ray.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

from cluster.ray_node import package_environment
from cluster.run_dir import ProcessRef, session_members, write_private
from tests.real_valkey import free_port

HEAD = "ray.head.default"
HEAD_ID = "f" * 51 + "00000"
"""The id that Ray's fake provider gives a head."""
PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
COMMANDS = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
"""Ray's autoscaler insists on a list of each, although nothing is installed on a fake node."""
START_S = 60.0
END_S = 20.0
CALL_S = 60.0
OBJECT_STORE_BYTES = 80 * 1024 * 1024


Driver = Callable[..., Any]
"""Called with a function of a module, and its arguments: what it returns there."""


@dataclass(frozen=True, kw_only=True)
class NodeKind:
    """A kind of machine that the autoscaler can get."""

    num_cpus: int = 2
    num_gpus: int = 0
    """Said to be there; nothing computes on them."""
    resources: Mapping[str, int] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    max_nodes: int = 4

    def as_config(self, name: str) -> dict[str, Any]:
        """As Ray's autoscaler wants it; its nodes also have the label `kind`."""
        amounts = {"CPU": self.num_cpus, "GPU": self.num_gpus, "object_store_memory": OBJECT_STORE_BYTES}
        return {
            "resources": {**amounts, **self.resources},
            "labels": {**self.labels, "kind": name},
            "node_config": {},
            "min_workers": 0,
            "max_workers": self.max_nodes,
        }


@dataclass(frozen=True)
class FakeNodes:
    """A cluster that runs: see `fake_nodes`."""

    address: str
    """host:port of the GCS, for `ray.address`."""
    environment: Mapping[str, str]
    """What a driver or `pdserve up` needs beside its own environment."""
    directory: Path
    """Ray's session and logs."""

    def autoscaler_log(self) -> str:
        """The end of what Ray's autoscaler logged, for the message of a test that failed."""
        logs = self.directory / "ray" / "session_latest" / "logs"
        return "".join(path.read_text(errors="replace")[-3000:] for path in sorted(logs.glob("monitor.*")))


@contextlib.contextmanager
def fake_nodes(kinds: Mapping[str, NodeKind], *, head_cpus: int = 2, idle_s: float = 2.0) -> Iterator[FakeNodes]:
    """Run a cluster whose head has CPUs only, and whose autoscaler lets a node go that was idle for `idle_s`."""
    # Ray's unix sockets lie deep in it, and their path is bounded: a test's own directory is too long.
    directory = Path(tempfile.mkdtemp(prefix="nodes-", dir="/tmp"))
    leader: ProcessRef | None = None
    try:
        environment = _environment(directory)
        settings = directory / "settings.json"
        settings.write_text(json.dumps(_settings(directory, kinds, head_cpus, idle_s)))
        with (directory / "head.log").open("wb") as log:
            head = subprocess.Popen(
                [sys.executable, "-m", "tests.fake_nodes", str(settings)],
                env={**os.environ, **package_environment(), **environment, **_monitor_environment()},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        leader = ProcessRef.of(head.pid)
        with head:
            try:
                answer = _first_line(head.stdout, START_S)
                if not answer:
                    tail = (directory / "head.log").read_text(errors="replace")[-4000:]
                    raise AssertionError(f"the head did not start within {START_S:g} s; the end of its log:\n{tail}")
                yield FakeNodes(json.loads(answer)["address"], environment, directory)
            finally:
                _end_session(leader)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def ray_driver(nodes: FakeNodes, namespace: str) -> Iterator[Driver]:
    """A process that is connected to the cluster: Ray reads how to prove itself once in the life of a process."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_drive, args=(there, nodes, namespace), daemon=True)
    process.start()
    there.close()

    def call(function: Callable[..., Any], *arguments: Any) -> Any:
        here.send((function, arguments))
        if not here.poll(CALL_S):
            raise AssertionError(f"{function.__name__} did not return within {CALL_S:g} s")
        returned, error = here.recv()
        if error is not None:
            raise error
        return returned

    try:
        yield call
    finally:
        here.close()
        process.join(CALL_S)
        process.kill()
        process.join()


def _drive(calls: Connection, nodes: FakeNodes, namespace: str) -> None:
    os.environ.update(nodes.environment)
    ray: Any = importlib.import_module("ray")
    ray.init(address=nodes.address, namespace=namespace, log_to_driver=False, configure_logging=False)
    with contextlib.suppress(EOFError):
        while True:
            function, arguments = calls.recv()
            try:
                calls.send((function(*arguments), None))
            except Exception as error:
                error.add_note(traceback.format_exc())
                calls.send((None, error))
    ray.shutdown()


def living_kinds() -> list[str]:
    """The kinds of the nodes that live beside the head, in order; to be called in a driver."""
    ray: Any = importlib.import_module("ray")
    return sorted(node["Labels"]["kind"] for node in ray.nodes() if node["Alive"] and "kind" in node["Labels"])


def until(condition: Callable[[], Any], what: str, timeout_s: float, nodes: FakeNodes) -> float:
    """Wait until something is true; returns after how many seconds. AssertionError with the monitor's log."""
    start = time.monotonic()
    while not condition():
        if time.monotonic() - start > timeout_s:
            raise AssertionError(f"not within {timeout_s:g} s: {what}; the autoscaler says:\n{nodes.autoscaler_log()}")
        time.sleep(0.1)
    return time.monotonic() - start


def _environment(directory: Path) -> dict[str, str]:
    token = directory / "token"
    write_private(token, secrets.token_hex(32))
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # all nodes on loopback
        "RAY_enable_metrics_collection": "0",
        "RAY_task_events_report_interval_ms": "0",
        "RAY_num_workers_soft_limit": "0",
        "RAY_worker_niceness": "0",
    }


def _monitor_environment() -> dict[str, str]:
    return {
        "RAY_enable_autoscaler_v2": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "AUTOSCALER_METRIC_PORT": "0",
    }


def _settings(directory: Path, kinds: Mapping[str, NodeKind], head_cpus: int, idle_s: float) -> dict[str, Any]:
    port = free_port()
    autoscaling = {
        "cluster_name": "fake",
        "max_workers": sum(kind.max_nodes for kind in kinds.values()),
        "provider": {
            "type": "external",
            "module": PROVIDER,
            "gcs_address": f"127.0.0.1:{port}",
            "head_node_id": HEAD_ID,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
        },
        "available_node_types": {
            HEAD: {"resources": {"CPU": head_cpus}, "node_config": {}, "max_workers": 0},
            **{name: kind.as_config(name) for name, kind in kinds.items()},
        },
        "head_node_type": HEAD,
        "idle_timeout_minutes": idle_s / 60.0,
        "auth": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "rsync_exclude": [],
        "rsync_filter": [],
        **{f"{name}_commands": [] for name in COMMANDS},
    }
    config = directory / "autoscaling.json"
    config.write_text(json.dumps(autoscaling))
    return {"port": port, "head_cpus": head_cpus, "temp_dir": str(directory / "ray"), "autoscaling": str(config)}


def _first_line(stream: IO[bytes] | None, timeout_s: float) -> bytes:
    assert stream is not None
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        return stream.readline() if selector.select(timeout_s) else b""


def _end_session(leader: ProcessRef) -> None:
    give_up_at = time.monotonic() + END_S
    while members := session_members(leader):
        assert time.monotonic() < give_up_at, f"still there after {END_S:g} s: {members}"
        for member in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(member.pid, signal.SIGKILL)
        time.sleep(0.05)


def start_head(settings: Mapping[str, Any]) -> str:
    """Start the head's processes; returns the GCS's address."""
    params: Any = importlib.import_module("ray._private.parameter").RayParams
    node_class: Any = importlib.import_module("ray._private.node").Node

    class Head(node_class):  # type: ignore[misc]
        """A head without a dashboard."""

        def start_api_server(self, **_: Any) -> None:
            return

    wish = params(
        node_ip_address="127.0.0.1",
        gcs_server_port=settings["port"],
        num_cpus=settings["head_cpus"],
        num_gpus=0,
        object_store_memory=OBJECT_STORE_BYTES,
        temp_dir=settings["temp_dir"],
        autoscaling_config=settings["autoscaling"],
        include_log_monitor=False,
        include_dashboard=False,
        min_worker_port=0,
        max_worker_port=0,
        dashboard_agent_listen_port=0,
        env_vars={"RAY_NODE_TYPE_NAME": HEAD},
    )
    return str(Head(wish, head=True, shutdown_at_exit=False, spawn_reaper=False).gcs_address)


def main() -> None:
    """Start, answer on the real stdout, and stay until the input ends: then end the whole session."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    address = start_head(json.loads(Path(sys.argv[1]).read_text()))
    print(json.dumps({"address": address}), file=answer, flush=True)
    sys.stdin.buffer.read()
    for member in session_members(ProcessRef.of(os.getpid()))[1:]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(member.pid, signal.SIGKILL)
    shutil.rmtree(Path(sys.argv[1]).parent, ignore_errors=True)


if __name__ == "__main__":
    main()
