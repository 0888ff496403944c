"""The supervisor: one process that starts a cluster on this machine, restarts what dies, and ends it all.

`python -m cluster.supervisor RUN_DIR`, in a session of its own; the configuration is the run directory's
config.json. It holds no Ray driver and no request: while it is down, everything else goes on.

    STARTING --all ready--> READY --SIGTERM or SIGINT--> STOPPING --> exit 0
       |                      ^ |
       |                      +-+ Valkey, gcs_server or raylet died: started again
       +--something did not start, or a signal--> STOPPING --> exit 1

A second signal while STOPPING skips what is left of the drain. With --keep, which is for a Ray that is not ours,
SIGTERM ends the supervisor alone: workers and routers go on, and the next `up` finds them. SIGINT still ends all.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import secrets
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Set
from pathlib import Path
from typing import Any

import redis.asyncio
from redis.exceptions import RedisError

from cluster import logs, metrics, model_load
from cluster.children import Child, Children, describe_exit, die_with_parent, end
from cluster.config import NODE_HOST, ClusterConfig, from_plain
from cluster.launch import drain_bound
from cluster.orders import DeployOrder, OrderError, carry_out
from cluster.placement import logical_cpus
from cluster.progress import Progress
from cluster.ray_node import (
    RayError,
    RayNode,
    RayWish,
    address_towards,
    package_environment,
    ray_environment,
    wait_for_ray,
)
from cluster.run_dir import AlreadyRunningError, Phase, ProcessRef, RunDir, RunState, session_members
from cluster.valkey import Valkey, ValkeyError, free_port

log = logging.getLogger("cluster.supervisor")

DRAIN_MARGIN_S = 15.0
SWEEP_GRACE_S = 2.0
REDIS_TIMEOUT_S = 5.0
SECRETS = ("cluster", "valkey", "ray")
RESTART_PAUSE_S = 1.0
"""Least time between two starts of the same process, so that one that cannot live does not spin."""

StartError = (ValkeyError, RayError, OrderError, RedisError, OSError)


class Supervisor:
    """One cluster's life on this machine."""

    def __init__(
        self,
        run_dir: RunDir,
        config: ClusterConfig,
        progress: Progress,
        children: Children,
        actors: str,
        *,
        keep: bool = False,
    ) -> None:
        self._run_dir = run_dir
        self._config = config
        self._progress = progress
        self._actors = actors
        self._children = children
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._over = asyncio.Event()
        self._watches: dict[str, asyncio.Task[None]] = {}
        self._deployed = False
        self._keep = keep and config.ray.address is not None
        self._valkey: Valkey | None = None
        self._ray: RayNode | None = None
        self._redis_url = config.redis.url or ""
        run_id = f"pdserve{secrets.token_hex(4)}"
        self._env = {**os.environ, **package_environment()}
        self._state = RunState(
            phase=Phase.STARTING,
            run_id=run_id,
            supervisor=ProcessRef.of(os.getpid()),
            sockets=str(run_dir.make_socket_dir()),
        )

    async def run(self) -> int:
        """Start, watch, stop; returns the exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._asked_to_stop, number)
        page = self._serve_metrics()
        self._save()
        try:
            started = await self._start_unless_stopped()
            if started:
                await self._stop.wait()
        finally:
            await self._shut_down()
            page.close()
        return 0 if started else 1

    def _serve_metrics(self) -> metrics.MetricsServer:
        collector = metrics.StatsCollector(
            "supervisor",
            lambda: {"restarts": dict(self._state.restarts), "ready": float(self._state.phase is Phase.READY)},
            counters=("restarts",),
            key_labels={"restarts": "process"},
        )
        page = metrics.serve([collector], host=self._metrics_host())
        self._state.metrics_address = page.address
        return page

    def _metrics_host(self) -> str:
        host = self._config.observability.metrics_host
        return address_towards(self._config.ray.address) if host == NODE_HOST else host

    def _asked_to_stop(self, number: int) -> None:
        self._keep = self._keep and number == signal.SIGTERM
        (self._hurry if self._stop.is_set() else self._stop).set()

    async def _start_unless_stopped(self) -> bool:
        starting = asyncio.create_task(self._start())
        stopping = asyncio.create_task(self._stop.wait())
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not starting.done():
            starting.cancel()
            await asyncio.wait({starting})
            self._progress.failed("stopped before everything was ready")
            return False
        try:
            starting.result()
        except StartError as error:
            log.error("start failed", exc_info=error)
            self._progress.failed(str(error))
            return False
        return True

    async def _start(self) -> None:
        if not self._redis_url:
            with self._progress.step("Valkey (registry)"):
                await self._start_valkey()
        with self._progress.step("Ray" if self._config.ray.address is None else f"Ray at {self._config.ray.address}"):
            await self._start_ray()
        began = time.monotonic()
        self._deployed = True
        with model_load.listen(self._run_dir.load_socket, self._progress.load):
            async for event in self._driver("up", timeout_s=self._config.start_timeout_s):
                if event["event"] == "ready":
                    self._note_ready(event, time.monotonic() - began)
        self._state.phase = Phase.READY
        self._save()
        self._progress.ready(self._state.routers)
        log.info("ready", extra={"routers": self._state.routers})

    def _note_ready(self, event: dict[str, Any], seconds: float) -> None:
        self._progress.done(f"{event['id']} at {event.get('address', '?')}", seconds)
        log.info("member ready", extra={"member": event["id"], "address": event.get("address", "")})
        if event["kind"] == "router":
            self._state.routers.append(str(event["address"]))

    async def _start_valkey(self) -> None:
        self._valkey = Valkey(self._run_dir, self._children, self._config.redis.port)
        child = await self._valkey.start()
        self._redis_url = self._valkey.url
        self._state.redis_url, self._state.valkey = self._valkey.public_url, child.ref
        self._save()
        await forget_ray(self._redis_url, "RAYpdserve")
        self._watch(child, self._valkey_again)

    async def _start_ray(self) -> None:
        if self._config.ray.address is not None:
            self._state.ray_address, self._state.ray_is_ours = self._config.ray.address, False
            await wait_for_ray(self._config.ray.address, self._config.start_timeout_s)
            return  # how to speak to it, such as its token, is in the environment of `up`
        self._env |= ray_environment(self._run_dir, self._state.run_id)
        wish = RayWish(
            run_id=self._state.run_id,
            redis_url=self._redis_url,
            port=self._config.ray.port or free_port(),
            num_cpus=logical_cpus(self._config),
            num_gpus=self._config.ray.num_gpus,
            object_store_bytes=self._config.ray.object_store_mib * 1024 * 1024,
            sockets=self._state.sockets,
        )
        self._ray = RayNode(self._run_dir, self._children, wish, self._env)
        await self._ray_up(self._ray)

    async def _ray_up(self, ray: RayNode) -> None:
        await ray.start(sys.executable)
        assert ray.gcs is not None
        assert ray.raylet is not None
        self._state.ray_address = ray.address
        self._state.ray = {"gcs_server": ray.gcs.ref, "raylet": ray.raylet.ref}
        self._save()
        self._watch(ray.gcs, self._gcs_again)
        self._watch(ray.raylet, self._raylet_again)

    def _watch(self, child: Child, again: Callable[[], Awaitable[None]]) -> None:
        task = asyncio.create_task(self._restart_when_dead(child, again, time.monotonic()))
        task.add_done_callback(self._watch_ended)
        self._watches[child.name] = task

    def _watch_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.critical("a watch failed, stopping", exc_info=error)
            self._stop.set()

    async def _restart_when_dead(self, child: Child, again: Callable[[], Awaitable[None]], since: float) -> None:
        status = await asyncio.shield(child.exited)
        log.error("process died", extra={"child": child.name, "pid": child.ref.pid, "how": describe_exit(status)})
        self._state.restarts[child.name] = self._state.restarts.get(child.name, 0) + 1
        pause = max(0.0, RESTART_PAUSE_S - (time.monotonic() - since))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._over.wait(), pause)
        if self._over.is_set():
            return
        try:
            await again()
        except StartError:
            log.exception("restart failed, stopping", extra={"child": child.name})
            self._stop.set()
            return
        self._save()
        log.info("process restarted", extra={"child": child.name})

    async def _valkey_again(self) -> None:
        assert self._valkey is not None
        child = await self._valkey.start()
        self._state.valkey = child.ref
        self._watch(child, self._valkey_again)

    async def _gcs_again(self) -> None:
        assert self._ray is not None
        child = self._ray.restart_gcs()
        self._state.ray["gcs_server"] = child.ref
        self._watch(child, self._gcs_again)

    async def _raylet_again(self) -> None:
        assert self._ray is not None
        self._watches["gcs_server"].cancel()
        await self._ray.stop()
        keep = {self._state.valkey.pid} if self._state.valkey else set()
        await sweep(self._state.supervisor, self._children, keep)
        await self._ray_up(self._ray)

    def _driver(self, command: Any, timeout_s: float) -> Any:
        order = DeployOrder(
            address=self._state.ray_address,
            around={
                "config": json.loads(self._run_dir.config_file.read_text()),
                "run_dir": str(self._run_dir.path),
                "redis_url": self._redis_url,
            },
            actors=self._actors,
            timeout_s=timeout_s,
        )
        return carry_out(
            command,
            order,
            run_dir=self._run_dir,
            children=self._children,
            argv=(sys.executable, "-m", "cluster.deploy"),
            env=self._env,
        )

    async def _shut_down(self) -> None:
        self._state.phase = Phase.STOPPING
        self._save()
        log.info("stopping")
        if self._deployed and not self._keep:
            await self._end_deployment()
        self._over.set()
        for task in self._watches.values():
            task.cancel()
        if self._ray is not None:
            await self._ray.stop()
        if self._redis_url and self._state.ray_is_ours:
            with contextlib.suppress(RedisError, OSError):
                await forget_ray(self._redis_url, f"RAY{self._state.run_id}@")
        if self._valkey is not None:
            await self._valkey.stop()
        await sweep(self._state.supervisor, self._children)
        self._run_dir.clear(self._state)
        self._children.close()
        log.info("stopped")

    async def _end_deployment(self) -> None:
        """Drain (not what never came up) and end the actors, within the bound; a second signal cuts it short."""
        drain_s = await asyncio.to_thread(drain_bound, self._run_dir) if self._state.routers else 0.0
        ending = asyncio.create_task(self._run_down(drain_s))
        hurry = asyncio.create_task(self._hurry.wait())
        bound = drain_s + DRAIN_MARGIN_S
        done, pending = await asyncio.wait({ending, hurry}, timeout=bound, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        await asyncio.wait({ending, hurry})
        if ending not in done:
            log.warning("drain cut short", extra={"bound_s": bound, "asked": hurry in done})
        elif ending.exception() is not None:
            log.warning("drain failed", exc_info=ending.exception())

    async def _run_down(self, drain_s: float) -> None:
        async for event in self._driver("down", timeout_s=drain_s):
            log.info("down", extra={"driver": event})

    def _save(self) -> None:
        self._run_dir.write_state(self._state)


async def forget_ray(url: str, prefix: str) -> None:
    """Delete what a finished Ray left in Redis, so that its actors never come back."""
    client = redis.asyncio.Redis.from_url(url, socket_timeout=REDIS_TIMEOUT_S, socket_connect_timeout=REDIS_TIMEOUT_S)
    async with client:
        keys = [key async for key in client.scan_iter(match=f"{prefix}*", count=1000)]
        if keys:
            await client.unlink(*keys)


async def sweep(leader: ProcessRef, children: Children, keep: Set[int] = frozenset()) -> None:
    """End whatever is left of a session, but its leader and the pids to keep: ask, then kill."""
    refs = [ref for ref in session_members(leader) if ref != leader and ref.pid not in keep]
    left = [child for ref in refs if (child := children.try_adopt(ref))]
    if left:
        log.warning("processes left over", extra={"pids": [child.ref.pid for child in left]})
        await asyncio.gather(*(end(child, grace_s=SWEEP_GRACE_S) for child in left))


async def supervise(run_dir: RunDir, progress: Progress, actors: str, *, keep: bool = False) -> int:
    """Run one cluster from a run directory; AlreadyRunningError if one runs from it."""
    with run_dir.hold():
        config = from_plain(json.loads(run_dir.config_file.read_text()))
        children = Children()
        children.start()
        if (old := run_dir.read_state()) is not None:
            await sweep(old.supervisor, children)
            run_dir.clear(old)
        return await Supervisor(run_dir, config, progress, children, actors, keep=keep).run()


def main() -> int:
    """Entry point of the process; see the module."""
    parser = argparse.ArgumentParser(prog="cluster.supervisor")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--progress-fd", type=int)
    parser.add_argument("--parent", type=int, help="end when this process, which must be the parent, ends")
    parser.add_argument("--actors", default="cluster.actors")
    parser.add_argument("--keep", action="store_true", help="SIGTERM leaves workers and routers running")
    given = parser.parse_args()
    if given.parent is not None:
        die_with_parent(given.parent)
    run_dir = RunDir(given.run_dir)
    progress = Progress(given.progress_fd)
    config = from_plain(json.loads(run_dir.config_file.read_text()))
    logs.configure(
        "supervisor",
        level=config.observability.log_level,
        target=log_directory(config, run_dir) / "supervisor.log",
        secrets=[run_dir.secret(name) for name in SECRETS],
    )
    try:
        return asyncio.run(supervise(run_dir, progress, given.actors, keep=given.keep))
    except (AlreadyRunningError, PermissionError) as error:
        progress.failed(str(error))
        return 1
    except Exception as error:
        log.exception("the supervisor failed")
        progress.failed(f"the supervisor failed: {error!r}; see {run_dir.logs / 'supervisor.log'}")
        raise


def log_directory(config: ClusterConfig, run_dir: RunDir) -> Path:
    """Where the processes of a cluster log."""
    return Path(config.observability.log_dir) if config.observability.log_dir else run_dir.logs


if __name__ == "__main__":
    sys.exit(main())
