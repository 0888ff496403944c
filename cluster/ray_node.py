"""Ray as the supervisor sees it: our own on this machine, started, watched, restarted, ended; or another's, joined.

States: STOPPED -> (start) RUNNING -> RUNNING again after `restart_gcs` (Ray's processes reconnect within
60 s and go on) -> (stop) STOPPED. A dead raylet takes all actors with it: the owner stops what is left and
starts anew; the state in Redis then lets the GCS bring the actors back.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from cluster.children import Child, Children, end
from cluster.ray_head import HeadProcesses, HeadSettings, gcs_environment
from cluster.run_dir import RunDir, write_private

START_TIMEOUT_S = 60.0
ASK_EVERY_S = 1.0
ASK_TIMEOUT_S = 5.0
STOP_GRACE_S = 5.0


class RayError(RuntimeError):
    """Ray could not be started."""


@dataclass(frozen=True, kw_only=True)
class RayWish:
    """What kind of local Ray is wanted."""

    run_id: str
    """Names Ray's keys in Redis: one life of a cluster never sees another's actors."""
    redis_url: str
    port: int
    num_cpus: int
    num_gpus: int | None
    object_store_bytes: int
    sockets: str


def ray_environment(run_dir: RunDir, run_id: str) -> dict[str, str]:
    """Variables of every process that is part of our own Ray, or speaks to it."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(run_dir.secret_path("ray")),
        "RAY_external_storage_namespace": run_id,
        "RAY_USAGE_STATS_ENABLED": "0",
        # Else Ray replaces a loopback address by the machine's outward one, where nobody listens.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_enable_metrics_collection": "0",
        "RAY_task_events_report_interval_ms": "0",
        "RAY_num_workers_soft_limit": "0",
        "RAY_worker_niceness": "0",
        # A GCS that lost Redis cannot be helped but by a new one: let it end soon.
        "RAY_num_redis_request_retries": "1",
    }


class RayNode:
    """The head, and only node, of a Ray of our own."""

    def __init__(self, run_dir: RunDir, children: Children, wish: RayWish, env: Mapping[str, str]) -> None:
        self._run_dir = run_dir
        self._children = children
        self._env = dict(env)
        self._settings = _settings(run_dir, wish)
        self._gcs_argv: list[str] = []
        self.address = ""
        self.gcs: Child | None = None
        self.raylet: Child | None = None

    async def start(self, python: str) -> None:
        """Start gcs_server and raylet; RayError with the launcher's last words if they do not come up."""
        for name in ("plasma", "raylet"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{self._settings.socket_dir}/{name}")
        settings_file = self._run_dir.path / "secrets" / "ray_head.json"
        write_private(settings_file, json.dumps(asdict(self._settings)))
        log_path = self._run_dir.logs / "ray_head.log"
        with log_path.open("wb") as log:
            launcher = self._children.spawn(
                "ray_head", [python, "-m", "cluster.ray_head", str(settings_file)], env=self._env, log=log, pipe=True
            )
        reader = await launcher.read_stdout()
        answer = b""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(START_TIMEOUT_S):
                answer = await reader.readline()
        await end(launcher, grace_s=STOP_GRACE_S if answer else 0.0)
        settings_file.unlink(missing_ok=True)
        if not answer:
            tail = "\n".join(log_path.read_text(errors="replace").splitlines()[-5:])
            raise RayError(f"Ray did not start within {START_TIMEOUT_S:g} s; the end of {log_path}:\n{tail}")
        started = HeadProcesses(**json.loads(answer))
        self.address, self._gcs_argv = started.address, started.gcs_argv
        self.gcs = self._children.adopt("gcs_server", started.gcs_pid)
        self.raylet = self._children.adopt("raylet", started.raylet_pid)

    def restart_gcs(self) -> Child:
        """Run the same GCS again: same port, and its state from Redis."""
        with (self._run_dir.logs / "ray_head.log").open("ab") as log:
            env = {**self._env, **gcs_environment(self._settings)}
            self.gcs = self._children.spawn("gcs_server", self._gcs_argv, env=env, log=log)
        return self.gcs

    async def stop(self) -> None:
        """End the node: raylet first, which ends its agents and workers."""
        for child in (self.raylet, self.gcs):
            if child is not None:
                await end(child, grace_s=STOP_GRACE_S)


def _settings(run_dir: RunDir, wish: RayWish) -> HeadSettings:
    url = urlsplit(wish.redis_url)
    scheme = "rediss://" if url.scheme == "rediss" else ""
    return HeadSettings(
        gcs_port=wish.port,
        redis_address=f"{scheme}{url.hostname}:{url.port or 6379}",
        redis_username=unquote(url.username or ""),
        redis_password=unquote(url.password or ""),
        num_cpus=wish.num_cpus,
        num_gpus=wish.num_gpus,
        object_store_bytes=wish.object_store_bytes,
        temp_dir=str(run_dir.path / "ray"),
        socket_dir=wish.sockets,
    )


def package_environment() -> dict[str, str]:
    """Variables with which any child finds this package, installed or not."""
    root = str(Path(__file__).resolve().parent.parent)
    return {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))}


async def wait_for_ray(address: str, timeout_s: float) -> None:
    """Wait until a Ray that is not ours answers at host:port; RayError if it does not in time."""
    host, _, port = address.rpartition(":")
    reason = "nothing was tried"
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            while True:
                try:
                    async with asyncio.timeout(ASK_TIMEOUT_S):
                        _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
                except (OSError, TimeoutError) as error:
                    reason = str(error) or f"no answer in {ASK_TIMEOUT_S:g} s"
                else:
                    writer.close()
                    return
                await asyncio.sleep(ASK_EVERY_S)
    raise RayError(f"no Ray head answers at {address} after {timeout_s:g} s ({reason}): start it, or mend ray.address")


def address_towards(address: str | None) -> str:
    """This machine's address on the way to a Ray head at host:port; loopback where there is none."""
    if address is None:
        return "127.0.0.1"
    host, _, port = address.rpartition(":")
    try:
        family, kind, _, _, target = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)  # sends nothing
            return str(probe.getsockname()[0])
    except OSError:
        return "127.0.0.1"
