"""What Ray runs: one front and one engine process per worker, and the routers.

Plain classes; `pool` makes them Ray actors. Each is a process of its own: when one dies Ray starts it
again (`max_restarts`), and the worker comes back with a new epoch. SIGTERM drains, within `drain_s`.
No token ever passes through a Ray call.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from cluster import metrics, pairs
from cluster.config import ClusterConfig, PoolConfig, from_plain
from cluster.front import FrontOptions, FrontState, WorkerFront
from cluster.loop_thread import LoopThread
from cluster.model_load import LoadTeller
from cluster.process import begin
from cluster.run_dir import RunDir
from cluster.sigterm import on_sigterm
from engine.ipc import socket_path
from protos import worker_pb2 as pb
from router.app import RouterApp
from router.store import RedisStore

log = logging.getLogger(__name__)

START_S = 60.0
STOP_S = 15.0
EXIT_DRAINED = 0
EXIT_FAILED = 1

WORKER_COUNTERS = (
    "steps",
    "computed_tokens",
    "cached_tokens",
    "generated_tokens",
    "preemptions",
    "sent_bytes",
    "received_bytes",
    "digest_mismatches",
    "lost_peers",
    "slow_pairs",
    "retired_pairs",
)
ROUTER_COUNTERS = ("outcomes", "prompt_tokens", "cached_prompt_tokens", "generated_tokens", "failed_attempts")


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerSpec:
    """One worker, as its processes need to know it."""

    worker_id: str
    pool: Literal["prefill", "decode"]
    role: Literal["prefill", "decode", "both"]
    config: dict[str, Any]
    """The validated YAML as plain data."""
    run_dir: str
    redis_url: str

    def pool_config(self, config: ClusterConfig) -> PoolConfig:
        """The settings of this worker's pool."""
        return config.prefill if self.pool == "prefill" else config.decode


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterSpec:
    """One router, as its process needs to know it."""

    router_id: str
    config: dict[str, Any]
    run_dir: str
    redis_url: str


def _stats(message: pb.WorkerStats) -> dict[str, float]:
    return {field.name: getattr(message, field.name) for field in pb.WorkerStats.DESCRIPTOR.fields}


@contextlib.contextmanager
def _exit_at_the_end() -> Iterator[None]:
    """End the process after a drain, also after one that failed: nobody else would."""
    code = EXIT_FAILED
    try:
        yield
        code = EXIT_DRAINED
    except Exception:
        log.exception("the drain failed")
    finally:
        os._exit(code)


class EngineActor:
    """One rank of a worker: the model, its KV cache, its transfers."""

    def __init__(self, spec: WorkerSpec, rank: int = 0) -> None:
        """Load the model and warm the kernels; raises ModelError for a model that cannot be used."""
        from cluster.engine_host import EngineHost
        from engine.engine import Engine

        config = from_plain(spec.config)
        secret = begin(f"engine{rank}", spec.worker_id, config, spec.run_dir, spec.redis_url)
        pool = spec.pool_config(config)
        load = LoadTeller(RunDir(Path(spec.run_dir)), spec.worker_id if rank == 0 else f"{spec.worker_id}/{rank}")
        engine = Engine(config.model, config.cache, pool, on_progress=load)
        self._drain_s = config.drain_s
        self._host = EngineHost(
            engine,
            role=spec.role,
            model_name=config.model.name or engine.runner.source.name,
            max_running=pool.max_running,
            decode=config.admission,
            transfer=config.transfer,
            secret=secret,
            socket_path=socket_path(spec.run_dir, spec.worker_id),
        )
        self._host.start()
        collector = metrics.StatsCollector(
            "engine", lambda: {**_stats(self._host.stats()), **load.stats()}, counters=WORKER_COUNTERS
        )
        self._metrics = metrics.serve([collector], host=config.observability.metrics_host)
        on_sigterm(self._on_sigterm)
        log.info("engine ready", extra={"num_blocks": engine.pool.num_blocks, "metrics": self._metrics.address})

    def ready(self) -> dict[str, Any]:
        """Answers once the engine is up."""
        return {"pid": os.getpid(), "metrics_address": self._metrics.address}

    def stop(self) -> None:
        """End everything; the process may be killed afterwards."""
        self._host.stop()

    def _on_sigterm(self) -> None:
        log.info("SIGTERM: draining the engine")
        with _exit_at_the_end():
            self._host.drain(self._drain_s)
            self._host.stop()


class FrontActor:
    """A worker's front process."""

    def __init__(self, spec: WorkerSpec, engine_socket: str) -> None:
        config = from_plain(spec.config)
        secret = begin("front", spec.worker_id, config, spec.run_dir, spec.redis_url)
        collector = metrics.StatsCollector(
            "worker", self._metric_values, counters=WORKER_COUNTERS, key_labels=pairs.KEY_LABELS
        )
        self._metrics = metrics.serve([collector], host=config.observability.metrics_host)
        self._drain_s = config.drain_s
        self._start_s = config.start_timeout_s
        self._loop = LoopThread("front")
        options = FrontOptions(
            worker_id=spec.worker_id,
            pool=spec.pool,
            role=spec.role,
            host=spec.pool_config(config).host,
            socket_path=engine_socket,
            secret=secret,
            metrics_address=self._metrics.address,
        )
        self._front = self._loop.run(_make_front(options, _store(spec.redis_url, config)), START_S)
        on_sigterm(self._on_sigterm)

    def ready(self) -> dict[str, Any]:
        """Answers once the worker serves."""
        self._loop.run(self._front.ready(self._start_s), self._start_s + START_S)
        return {**self._front.status(), "pid": os.getpid()}

    def drain(self, timeout_s: float) -> dict[str, Any]:
        """Take nothing new, wait for what runs, leave the registry; says what was left."""
        finished = self._loop.run(self._front.drain(timeout_s), timeout_s + STOP_S)
        status = self._front.status()
        self._loop.run(self._front.stop(), STOP_S)
        return {"finished": finished, **status}

    def status(self) -> dict[str, Any]:
        """State, identity, stats."""
        return {**self._front.status(), "pid": os.getpid()}

    def _metric_values(self) -> dict[str, Any]:
        front = self._front
        return {
            **_stats(front.link.stats),
            **pairs.gauges(front.link.pairs),
            "epoch": front.link.epoch,
            "ready": float(front.state is FrontState.SERVING),
        }

    def _on_sigterm(self) -> None:
        log.info("SIGTERM: draining the worker")
        with _exit_at_the_end():
            self.drain(self._drain_s)


class RouterActor:
    """A router process."""

    def __init__(self, spec: RouterSpec) -> None:
        config = from_plain(spec.config)
        secret = begin("router", spec.router_id, config, spec.run_dir, spec.redis_url)
        self._drain_s = config.drain_s
        self._loop = LoopThread("router")
        self._app: RouterApp | None = None
        collector = metrics.StatsCollector(
            "router",
            self._metric_values,
            counters=ROUTER_COUNTERS,
            key_labels={"outcomes": "outcome", "workers": "state"},
        )
        observability = config.observability
        self._metrics = metrics.serve([collector], host=observability.metrics_host, port=observability.metrics_port)
        self._app, self._address = self._loop.run(_make_router(spec, config, secret, self._metrics.address), START_S)
        on_sigterm(self._on_sigterm)

    def ready(self) -> dict[str, Any]:
        """Answers once the router listens."""
        return {**self._names(), "pid": os.getpid()}

    def drain(self, timeout_s: float) -> dict[str, Any]:
        """Take nothing new, wait for what runs, then stop listening."""
        app = self._running()
        self._loop.run(app.drain(timeout_s), timeout_s + STOP_S)
        self._loop.run(app.stop(), STOP_S)
        return self._names()

    def status(self) -> dict[str, Any]:
        """Workers as this router sees them, requests in flight."""
        return {**self._names(), **self._running().status(), "pid": os.getpid()}

    def _running(self) -> RouterApp:
        assert self._app is not None, "set by the constructor"
        return self._app

    def _names(self) -> dict[str, Any]:
        return {"address": self._address, "metrics_address": self._metrics.address}

    def _metric_values(self) -> dict[str, Any]:
        return asdict(self._app.stats()) if self._app is not None else {}

    def _on_sigterm(self) -> None:
        log.info("SIGTERM: draining the router")
        with _exit_at_the_end():
            self.drain(self._drain_s)


# Outside the classes: Ray takes a class with a coroutine method for an asyncio actor, and
# constructs that away from the main thread, where SIGTERM cannot be taken over.


def _store(redis_url: str, config: ClusterConfig) -> RedisStore:
    return RedisStore(redis_url, timeout_s=config.router.store_timeout_s)


async def _make_front(options: FrontOptions, store: RedisStore) -> WorkerFront:
    front = WorkerFront(options, store)
    await front.start()
    return front


async def _make_router(
    spec: RouterSpec, config: ClusterConfig, secret: bytes, metrics_address: str
) -> tuple[RouterApp, str]:
    app = RouterApp(
        config=config.router,
        model=config.model,
        mode=config.mode,
        store=_store(spec.redis_url, config),
        secret=secret,
        router_id=spec.router_id,
    )
    return app, await app.start(metrics_address)


__all__ = ["EngineActor", "FrontActor", "RouterActor", "RouterSpec", "WorkerSpec"]
