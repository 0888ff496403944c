"""The controller: one detached actor that holds which pools the YAML wants, and makes what is missing.

States: NEW -> (deploy) DEPLOYED -> (drain) DRAINING -> (stop) STOPPED. Ray restarts it where it died; it
then deploys again by itself, which finds the living actors by name and makes only those that are gone.
Dead workers are restarted by Ray, not by the controller. Nothing that serves a request passes through it.
"""

from __future__ import annotations

import enum
import importlib
import logging
import time
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from cluster import metrics, pool
from cluster.config import from_plain
from cluster.nap import napping
from cluster.placement import WorkerPlan, router_ids, shortage, total, wanted_workers
from cluster.process import at_node, begin

CONTROLLER = "controller"
STATUS_TIMEOUT_S = 2.0

log = logging.getLogger(__name__)


class ControllerState(enum.Enum):
    """Where the controller is in its life."""

    NEW = "new"
    DEPLOYED = "deployed"
    DRAINING = "draining"
    STOPPED = "stopped"


@dataclass(frozen=True)
class Deployment:
    """What the controller is told once."""

    around: pool.Surroundings
    actors: str = "cluster.actors"
    """Module that has the actor classes."""


class Controller:
    """See the module."""

    def __init__(self, deployment: Deployment) -> None:
        self._around = deployment.around
        self._classes = _load_classes(deployment.actors)
        self._workers: dict[str, pool.WorkerHandles] = {}
        self._routers: dict[str, Any] = {}
        self._plans: list[WorkerPlan] = []
        self._state = ControllerState.NEW
        here = at_node(deployment.around)  # for this process alone: its workers may be on other nodes
        config = from_plain(here.config)
        begin("controller", "", config, here.run_dir, here.redis_url)
        collector = metrics.StatsCollector("controller", self._metric_values)
        self._metrics = metrics.serve([collector], host=config.observability.metrics_host)
        log.info("controller up", extra={"metrics": self._metrics.address})
        if ray.get_runtime_context().was_current_actor_reconstructed:
            self.deploy()

    def deploy(self) -> dict[str, str]:
        """Make what is missing; returns each member's id with `worker` or `router`. PlacementError if it cannot fit."""
        config = from_plain(self._around.config)
        there: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        self._plans = wanted_workers(config, gpus=there.get("GPU", 0.0))
        if missing := shortage(total(self._plans, config.router.replicas), there):
            raise pool.PlacementError(f"the Ray cluster is too small: {'; '.join(missing)}")
        for plan in self._plans:
            self._workers[plan.worker_id] = pool.create_worker(plan, self._classes, self._around)
        for router_id in router_ids(config):
            self._routers[router_id] = pool.create_router(router_id, self._classes, self._around)
        self._state = ControllerState.DEPLOYED
        log.info("deployed", extra={"workers": list(self._workers), "routers": list(self._routers)})
        return {**dict.fromkeys(self._workers, "worker"), **dict.fromkeys(self._routers, "router")}

    def _metric_values(self) -> dict[str, float]:
        return {"wanted_workers": len(self._plans), "workers": len(self._workers), "routers": len(self._routers)}

    def wait_ready(self, member_id: str, timeout_s: float) -> dict[str, Any]:
        """What a worker or router says of itself once it is ready; raises its error, or GetTimeoutError."""
        if member_id in self._routers:
            return dict(ray.get(self._routers[member_id].ready.remote(), timeout=timeout_s))
        worker = self._workers[member_id]
        front = worker.front.ready.remote()
        pending = [front, *(engine.ready.remote() for engine in worker.engines)]
        until = time.monotonic() + timeout_s
        while pending:
            done, pending = ray.wait(pending, num_returns=1, timeout=max(0.0, until - time.monotonic()))
            if not done:
                raise GetTimeoutError(f"worker {member_id} was not ready after {timeout_s:g} s")
            ray.get(done)  # the first error ends the wait
        return dict(ray.get(front))

    def status(self) -> dict[str, Any]:
        """State, and what each router and front says of itself; silent ones are `unreachable`."""
        fronts = {worker_id: handles.front for worker_id, handles in self._workers.items()}
        asked = {name: actor.status.remote() for name, actor in {**self._routers, **fronts}.items()}
        answered, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=STATUS_TIMEOUT_S)
        ready = set(answered)
        return {
            "state": self._state.value,
            "members": {
                name: _answer(ref) if ref in ready else {"state": "unreachable"} for name, ref in asked.items()
            },
        }

    def drain(self, timeout_s: float) -> dict[str, Any]:
        """Let running requests end: routers first, then fronts, together within the bound."""
        self._state = ControllerState.DRAINING
        until = time.monotonic() + timeout_s
        drained: dict[str, Any] = {}
        fronts = {worker_id: handles.front for worker_id, handles in self._workers.items()}
        for group in (self._routers, fronts):
            left = max(0.0, until - time.monotonic())
            asked = {name: actor.drain.remote(left) for name, actor in group.items()}
            if asked:
                answered, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=left + 1.0)
                ready = set(answered)
                drained.update({name: _answer(ref) for name, ref in asked.items() if ref in ready})
        return drained

    def stop(self) -> None:
        """End every worker and router and give their places back."""
        self._state = ControllerState.STOPPED
        for router_id in self._routers:
            pool.remove_actor(router_id)
        for plan in self._plans:
            pool.remove_worker(plan)


def create_controller(deployment: Deployment) -> Any:
    """The controller's handle; the actor is made if it is missing."""
    kind: Any = ray.remote(napping(Controller))
    return kind.options(
        name=CONTROLLER,
        namespace=pool.NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        max_restarts=-1,
        max_concurrency=pool.MAX_CONCURRENCY,
        num_cpus=0,
        runtime_env={"env_vars": pool.thread_limits(1)},
    ).remote(deployment)


def _load_classes(module_name: str) -> pool.ActorClasses:
    module = importlib.import_module(module_name)
    return pool.ActorClasses(
        engine=module.EngineActor,
        front=module.FrontActor,
        router=module.RouterActor,
        worker_spec=module.WorkerSpec,
        router_spec=module.RouterSpec,
    )


def _answer(ref: Any) -> dict[str, Any]:
    try:
        return dict(ray.get(ref))
    except RayActorError as error:
        return {"state": "restarting", "error": str(error).splitlines()[0]}
    except RayError as error:
        return {"state": "failed", "error": str(error).splitlines()[-1]}
