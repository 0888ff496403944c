"""Makes and removes the actors of one worker or router: the only place that creates Ray actors.

Everything is named and detached, and is made only where it is missing: doing it twice changes nothing.
Ray restarts an actor that dies (`max_restarts=-1`); a worker's processes share one placement group and so
one node. Tear-down goes front first, then ranks, then the placement group.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.nap import napping
from cluster.placement import ROUTER_CPUS, Bundle, WorkerPlan

NAMESPACE = "pdserve"
MAX_CONCURRENCY = 4
PLACEMENT_TIMEOUT_S = 30.0
QUEUES_OF_A_GPU = {"CUDA_DEVICE_MAX_CONNECTIONS": "32"}
"""Each pair has streams of its own: in the 8 hardware queues of CUDA's default one could wait behind another."""


class PlacementError(RuntimeError):
    """Ray has no room for a worker."""


@dataclass(frozen=True)
class ActorClasses:
    """The three kinds of processes, and what each is told; `cluster.actors` has the real ones."""

    engine: type
    front: type
    router: type
    worker_spec: type
    router_spec: type


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What every process of a cluster is told."""

    config: dict[str, Any]
    """The validated YAML as plain data."""
    run_dir: str
    redis_url: str


@dataclass(frozen=True)
class WorkerHandles:
    """The actors of one worker."""

    front: Any
    engines: tuple[Any, ...]


def create_worker(plan: WorkerPlan, classes: ActorClasses, around: Surroundings) -> WorkerHandles:
    """The worker's actors, made where they are missing; PlacementError if there is no room."""
    group = _placement_group(plan)
    spec = classes.worker_spec(
        worker_id=plan.worker_id,
        pool=plan.pool,
        role=plan.role,
        config=around.config,
        run_dir=around.run_dir,
        redis_url=around.redis_url,
    )
    environment = {**thread_limits(plan.threads), **QUEUES_OF_A_GPU}
    engines = tuple(
        _create(
            classes.engine, engine_name(plan.worker_id, rank), plan.bundles[1 + rank], environment, (group, 1 + rank)
        ).remote(spec, rank)
        for rank in range(len(plan.bundles) - 1)
    )
    front = _create(classes.front, front_name(plan.worker_id), plan.bundles[0], thread_limits(1), (group, 0))
    return WorkerHandles(front.remote(spec), engines)


def create_router(router_id: str, classes: ActorClasses, around: Surroundings) -> Any:
    """The router's actor, made if it is missing."""
    spec = classes.router_spec(
        router_id=router_id, config=around.config, run_dir=around.run_dir, redis_url=around.redis_url
    )
    bundle = {"CPU": ROUTER_CPUS, **around.config["router"]["resources"]}
    return _create(classes.router, router_id, bundle, thread_limits(1), None).remote(spec)


def remove_worker(plan: WorkerPlan) -> None:
    """End a worker's processes and give its place back; what is gone already is no error."""
    remove_actor(front_name(plan.worker_id))
    for rank in range(len(plan.bundles) - 1):
        remove_actor(engine_name(plan.worker_id, rank))
    with contextlib.suppress(ValueError):
        ray.util.remove_placement_group(ray.util.get_placement_group(_group_name(plan.worker_id)))


def remove_actor(name: str) -> None:
    """Kill an actor for good, if it exists."""
    with contextlib.suppress(ValueError):
        ray.kill(ray.get_actor(name, namespace=NAMESPACE), no_restart=True)


def front_name(worker_id: str) -> str:
    """Name of a worker's front actor."""
    return f"{worker_id}/front"


def engine_name(worker_id: str, rank: int) -> str:
    """Name of a rank's engine actor."""
    return f"{worker_id}/engine-{rank}"


def thread_limits(threads: int) -> dict[str, str]:
    """Environment that keeps a process to so many threads of tensor work, and its heap to few arenas."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {**dict.fromkeys(names, str(threads)), "MALLOC_ARENA_MAX": "2"}


def _group_name(worker_id: str) -> str:
    return f"pdserve/{worker_id}"


def _placement_group(plan: WorkerPlan) -> PlacementGroup:
    name = _group_name(plan.worker_id)
    group: PlacementGroup
    try:
        group = ray.util.get_placement_group(name)
    except ValueError:
        group = ray.util.placement_group(list(plan.bundles), strategy="STRICT_PACK", name=name, lifetime="detached")
    if not group.wait(PLACEMENT_TIMEOUT_S):
        raise PlacementError(
            f"Ray found no node with room for worker {plan.worker_id} within {PLACEMENT_TIMEOUT_S:g} s: "
            f"it needs {list(plan.bundles)} on one node"
        )
    return group


def _create(
    kind: type, name: str, bundle: Bundle, env: dict[str, str], place: tuple[PlacementGroup, int] | None
) -> Any:
    rest = {key: amount for key, amount in bundle.items() if key not in ("CPU", "GPU")}
    options: dict[str, Any] = {
        "name": name,
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "get_if_exists": True,
        "max_restarts": -1,
        "max_concurrency": MAX_CONCURRENCY,
        "num_cpus": bundle.get("CPU", 0.0),
        "num_gpus": bundle.get("GPU", 0.0),
        "resources": rest,
        "runtime_env": {"env_vars": env},
    }
    if place is not None:
        group, index = place
        options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
    return ray.remote(napping(kind)).options(**options)
