"""What Ray runs: one front per worker and one engine process per rank of it, and the routers.

Plain classes; `pool` makes them Ray actors. Each is a process of its own: when one dies Ray starts it
again (`max_restarts`), and the worker comes back with a new epoch. The ranks of a worker end together.
SIGTERM drains, within `drain_s`.
No token ever passes through a Ray call.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cluster import metrics, niceness, pairs
from cluster.config import ClusterConfig, PoolConfig, from_plain
from cluster.counters import ROUTER_COUNTERS, WORKER_COUNTERS
from cluster.front import FrontOptions, FrontState, WorkerFront
from cluster.loop_thread import LoopThread
from cluster.model_load import LoadTeller
from cluster.placement import port_of
from cluster.process import at_node, begin
from cluster.run_dir import RunDir
from cluster.sigterm import on_sigterm
from engine.errors import RankLostError
from engine.ipc import rank_socket_path, socket_path
from protos import worker_pb2 as pb
from router.app import RouterApp
from router.store import RedisStore

if TYPE_CHECKING:
    from cluster.engine_host import EngineHost
    from cluster.rank_host import FollowerHost

log = logging.getLogger(__name__)

Numbers = Callable[[], dict[str, float]]
"""What a process says to its metrics."""
Drain = Callable[[], bool]
"""Lets what runs end; False if time was up first."""

START_S = 60.0
STOP_S = 15.0
EXIT_DRAINED = 0
EXIT_FAILED = 1
SPLIT_PROMPT_SHARE = 0.25
"""Of a decode worker's steps, where there are prefill workers for the rest."""


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
        if self.pool == "prefill":
            return config.prefill
        return replace(config.decode, prompt_share=self.prompt_share(config, self.role))

    def prompt_share(self, config: ClusterConfig, role: str) -> float | None:
        """What prompts get at most of a step that also generates, while it has that role; None: all of it."""
        own = (config.prefill if self.pool == "prefill" else config.decode).prompt_share
        return SPLIT_PROMPT_SHARE if own is None and role == "decode" and config.mode == "split" else own


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


@contextlib.contextmanager
def _exit_if_lost() -> Iterator[None]:
    """A rank that lost another at the start ends its process, which Ray starts again; not so a failed constructor."""
    try:
        yield
    except RankLostError:
        log.exception("this rank starts again, as another one is lost")
        os._exit(EXIT_FAILED)


class EngineActor:
    """One rank of a worker: the model, its KV cache; with rank 0 goes what a front talks to."""

    def __init__(self, spec: WorkerSpec, rank: int = 0) -> None:
        """Load the model and warm the kernels; raises ModelError for a model that cannot be used.

        A rank of several that is lost later ends this process, and so all ranks of the worker start again.
        """
        spec = at_node(spec)
        config = from_plain(spec.config)
        secret = begin(f"engine{rank}", spec.worker_id, config, spec.run_dir, spec.redis_url)
        load = LoadTeller(RunDir(Path(spec.run_dir)), spec.worker_id if rank == 0 else f"{spec.worker_id}/{rank}")
        self._drains = threading.Lock()
        """Taken by the one drain that this process does."""
        with _exit_if_lost():
            self._host: EngineHost | FollowerHost
            self._host, numbers, self._drain = (
                self._lead(spec, config, secret, load) if rank == 0 else _follow(spec, rank, secret, load)
            )
            self._host.start()
        from engine.runner import choose_device

        if choose_device(spec.pool_config(config).device).type == "cpu":
            niceness.engine_gives_way()
        collector = metrics.StatsCollector("engine", lambda: {**numbers(), **load.stats()}, counters=WORKER_COUNTERS)
        self._metrics = metrics.serve([collector], host=config.observability.metrics_host)
        on_sigterm(self._on_sigterm)
        log.info("engine ready", extra={"num_blocks": numbers()["num_blocks"], "metrics": self._metrics.address})

    def ready(self) -> dict[str, Any]:
        """Answers once the engine is up."""
        return {"pid": os.getpid(), "metrics_address": self._metrics.address}

    def stop(self) -> None:
        """End everything; the process may be killed afterwards."""
        self._host.stop()

    def _lead(
        self, spec: WorkerSpec, config: ClusterConfig, secret: bytes, load: LoadTeller
    ) -> tuple[EngineHost, Numbers, Drain]:
        """Rank 0."""
        from cluster.engine_host import EngineHost
        from engine.engine import Engine
        from engine.ranks import RankGroup

        pool, ranks = spec.pool_config(config), None
        if pool.tensor_parallel > 1:
            path = rank_socket_path(spec.run_dir, spec.worker_id)
            ranks = RankGroup(path, pool.tensor_parallel, timeout_s=pool.rank_timeout_s)
            ranks.on_lost = lambda rank, reason: os._exit(EXIT_FAILED)
            ranks.on_leave = lambda rank: threading.Thread(target=self._on_sigterm, name="leave", daemon=True).start()
        engine = Engine(config.model, config.cache, pool, on_progress=load, ranks=ranks)
        host = EngineHost(
            engine,
            role=spec.role,
            model_name=config.model.name or engine.runner.source.name,
            max_running=pool.max_running,
            decode=config.admission,
            transfer=config.transfer,
            secret=secret,
            socket_path=socket_path(spec.run_dir, spec.worker_id),
        )
        return host, lambda: _stats(host.stats()), lambda: host.drain(config.drain_s)

    def _on_sigterm(self) -> None:
        if not self._drains.acquire(blocking=False):
            return
        log.info("SIGTERM, here or at another rank: draining the engine")
        with _exit_at_the_end():
            self._drain()
            self._host.stop()


def _follow(spec: WorkerSpec, rank: int, secret: bytes, load: LoadTeller) -> tuple[FollowerHost, Numbers, Drain]:
    """A rank other than 0; its process ends with rank 0's."""
    from cluster.rank_host import FollowerHost, make_transfers
    from engine.follower import Follower
    from engine.model_source import fingerprint
    from engine.runner import ModelRunner, choose_device

    config = from_plain(spec.config)
    pool = spec.pool_config(config)
    path = rank_socket_path(spec.run_dir, spec.worker_id)
    follower = Follower(path, rank, pool.tensor_parallel, timeout_s=pool.rank_timeout_s)
    follower.on_lost = lambda reason: os._exit(EXIT_FAILED)
    try:
        parallel = follower.connect(choose_device(pool.device))
        runner = ModelRunner(config.model, config.cache, pool, parallel=parallel, on_progress=load)
    except BaseException:
        follower.close()
        raise
    model_hash = fingerprint(runner.source, config.model.load_format)
    transfers = make_transfers(follower, runner, model_hash=model_hash, config=config.transfer, secret=secret)
    host = FollowerHost(
        follower, runner, transfers, on_end=lambda well: os._exit(EXIT_DRAINED if well else EXIT_FAILED)
    )
    return host, host.numbers, lambda: host.drain(config.drain_s + STOP_S)


class FrontActor:
    """A worker's front process."""

    def __init__(self, spec: WorkerSpec) -> None:
        spec = at_node(spec)
        config = from_plain(spec.config)
        secret = begin("front", spec.worker_id, config, spec.run_dir, spec.redis_url)
        collector = metrics.StatsCollector(
            "worker", self._metric_values, counters=WORKER_COUNTERS, key_labels=pairs.KEY_LABELS
        )
        self._metrics = metrics.serve([collector], host=config.observability.metrics_host)
        self._drain_s = config.drain_s
        self._move_after_s = config.move_within(config.drain_s)
        self._start_s = config.start_timeout_s
        self._loop = LoopThread("front")
        options = FrontOptions(
            worker_id=spec.worker_id,
            pool=spec.pool,
            role=spec.role,
            host=spec.pool_config(config).host,
            socket_path=socket_path(spec.run_dir, spec.worker_id),
            secret=secret,
            metrics_address=self._metrics.address,
            prompt_shares={role: spec.prompt_share(config, role) or 1.0 for role in ("prefill", "decode")},
            move_after_s=config.move_after_s,
            move_at_end_after_s=config.move_within(config.drain_s),
        )
        self._front = self._loop.run(_make_front(options, _store(spec.redis_url, config)), START_S)
        gc.freeze()  # as the engine does: no request waits while the collector looks through Ray and gRPC
        on_sigterm(self._on_sigterm)

    def ready(self) -> dict[str, Any]:
        """Answers once the worker serves."""
        self._loop.run(self._front.ready(self._start_s), self._start_s + START_S)
        return {**self._front.status(), "pid": os.getpid()}

    def set_role(self, role: str, timeout_s: float) -> dict[str, Any]:
        """Have it do another pool's work from now on, its next lives too; its status afterwards. Idempotent."""
        self._loop.run(self._front.set_role(role, timeout_s), timeout_s)
        return self.status()

    def drain(self, timeout_s: float, move_after_s: float | None = None) -> dict[str, Any]:
        """Take nothing new, wait for what runs, leave the registry; says what was left. Idempotent.

        After `move_after_s` what still generates goes on at other workers, if there are some (None: nothing does).
        """
        self._drain_s = max(self._drain_s, timeout_s)
        moving = math.inf if move_after_s is None else move_after_s
        return self._loop.run(self._front.leave(timeout_s, moving), self._drain_s + STOP_S)

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
            "paced": float(front.link.description.paced),
        }

    def _on_sigterm(self) -> None:
        log.info("SIGTERM: draining the worker")
        with _exit_at_the_end():
            self.drain(self._drain_s, self._move_after_s)


class RouterActor:
    """A router process."""

    def __init__(self, spec: RouterSpec) -> None:
        spec = at_node(spec)
        config = from_plain(spec.config)
        secret = begin("router", spec.router_id, config, spec.run_dir, spec.redis_url)
        self._drain_s = config.drain_s
        self._loop = LoopThread("router")
        self._app: RouterApp | None = None
        collector = metrics.StatsCollector(
            "router",
            self._metric_values,
            counters=ROUTER_COUNTERS,
            key_labels={"outcomes": "outcome", "refused": "reason", "workers": "state"},
        )
        observability = config.observability
        port = port_of(observability.metrics_port, spec.router_id, same=config.router.same_port)
        self._metrics = metrics.serve([collector], host=observability.metrics_host, port=port)
        self._app, self._address = self._loop.run(_make_router(spec, config, secret, self._metrics.address), START_S)
        gc.freeze()
        niceness.poller_gives_way()
        on_sigterm(self._on_sigterm)

    def ready(self) -> dict[str, Any]:
        """Answers once the router listens."""
        return {**self._names(), "pid": os.getpid()}

    def drain(self, timeout_s: float) -> dict[str, Any]:
        """Take nothing new and wait for what runs; whoever asks is refused until the process is ended."""
        app = self._running()
        self._loop.run(app.drain(timeout_s), timeout_s + STOP_S)
        self._loop.run(app.stop(closes_port=False), STOP_S)
        return self._names()

    def status(self) -> dict[str, Any]:
        """Workers as this router sees them, requests in flight."""
        return {**self._names(), **self._running().status(), "pid": os.getpid()}

    def load(self) -> dict[str, Any]:
        """Its counters, histograms and gauges as plain data: see RouterStats."""
        return asdict(self._running().stats())

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
        config=replace(config.router, port=port_of(config.router.port, spec.router_id, same=config.router.same_port)),
        model=config.model,
        mode=config.mode,
        store=_store(spec.redis_url, config),
        secret=secret,
        router_id=spec.router_id,
    )
    return app, await app.start(metrics_address)


__all__ = ["EngineActor", "FrontActor", "RouterActor", "RouterSpec", "WorkerSpec"]
