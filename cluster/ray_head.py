"""Starts a Ray head for one machine, on loopback, and exits: `python -m cluster.ray_head SETTINGS_FILE`.

`ray start --head` would do, but for three things: it moves a loopback address to the machine's outward
one, it puts the Redis password into the arguments of every process, and it starts a dashboard server and
an autoscaler that nobody here asks. So this uses the class beneath it, `ray._private.node.Node`; Ray's
version is pinned for that reason. What it starts is left running: gcs_server (whose state is in Redis) and
raylet, which minds its own agents and workers. Prints one line of JSON: a `HeadProcesses`.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PASSWORD_FLAG = "redis_password"


@dataclass(frozen=True, kw_only=True)
class HeadSettings:
    """What the launcher needs to know."""

    gcs_port: int
    redis_address: str
    """host:port, or rediss://host:port for TLS."""
    redis_username: str
    redis_password: str
    num_cpus: int
    """Logical CPUs: a budget for placement, not a count of cores."""
    num_gpus: int | None
    object_store_bytes: int
    temp_dir: str
    """Ray's session and logs."""
    socket_dir: str


@dataclass(frozen=True, kw_only=True)
class HeadProcesses:
    """What was started."""

    address: str
    gcs_pid: int
    gcs_argv: list[str]
    """Run again with the same environment, this is the same GCS: its port is fixed and its state in Redis."""
    raylet_pid: int


def gcs_environment(settings: HeadSettings) -> dict[str, str]:
    """Variables that a gcs_server needs beside those of its parent."""
    return {f"FLAGS_{PASSWORD_FLAG}": settings.redis_password} if settings.redis_password else {}


def start(settings: HeadSettings) -> HeadProcesses:
    """Start gcs_server and raylet, and return once the node is known to the GCS."""
    gcs_argv: list[str] = []
    node = _head_class(settings, gcs_argv)(_parameters(settings), head=True, shutdown_at_exit=False, spawn_reaper=False)
    pids = {kind: infos[0].process.pid for kind, infos in node.all_processes.items()}
    return HeadProcesses(
        address=node.gcs_address,
        gcs_pid=pids["gcs_server"],
        gcs_argv=gcs_argv,
        raylet_pid=pids["raylet"],
    )


def _head_class(settings: HeadSettings, gcs_argv: list[str]) -> Any:
    """Ray's node, without what nobody here asks; notes how it starts the GCS in `gcs_argv`."""
    services: Any = importlib.import_module("ray._private.services")
    node_class: Any = importlib.import_module("ray._private.node").Node

    class Head(node_class):  # type: ignore[misc]
        """A head without dashboard and autoscaler, whose arguments carry no password."""

        def start_head_processes(self) -> None:
            self._ray_params.redis_password = None
            spawn = services.start_ray_process

            def spawn_with_password(command: list[str], *args: Any, **kwargs: Any) -> Any:
                gcs_argv.extend([*command, f"--fromenv={PASSWORD_FLAG}"] if settings.redis_password else command)
                kwargs["env_updates"] = {**(kwargs.get("env_updates") or {}), **gcs_environment(settings)}
                return spawn(gcs_argv, *args, **kwargs)

            services.start_ray_process = spawn_with_password
            try:
                self.start_gcs_server()
            finally:
                services.start_ray_process = spawn
            self.get_gcs_client()
            self._write_cluster_info_to_kv()

    return Head


def _parameters(settings: HeadSettings) -> Any:
    params: Any = importlib.import_module("ray._private.parameter").RayParams
    return params(
        node_ip_address="127.0.0.1",
        gcs_server_port=settings.gcs_port,
        external_addresses=[settings.redis_address, settings.redis_address],
        num_redis_shards=1,
        redis_username=settings.redis_username,
        redis_password=settings.redis_password,
        num_cpus=settings.num_cpus,
        num_gpus=settings.num_gpus,
        object_store_memory=settings.object_store_bytes,
        temp_dir=settings.temp_dir,
        plasma_store_socket_name=f"{settings.socket_dir}/plasma",
        raylet_socket_name=f"{settings.socket_dir}/raylet",
        include_log_monitor=False,
        no_monitor=True,
        include_dashboard=False,
        min_worker_port=0,
        max_worker_port=0,
    )


def main() -> None:
    """Start, and answer on the real stdout; Ray's own prints go to stderr."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    started = start(HeadSettings(**json.loads(Path(sys.argv[1]).read_text())))
    print(json.dumps(dataclasses.asdict(started)), file=answer, flush=True)


if __name__ == "__main__":
    main()
