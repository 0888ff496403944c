"""Makes and removes the actors of one worker or router: the only place that creates Ray actors.

Everything is named and detached, and is made only where it is missing: doing it twice changes nothing.
Ray restarts an actor that dies (`max_restarts=-1`); a worker's processes share one placement group, its
place, and so one node. Tear-down goes front first, then ranks, then the place. Nothing here waits for a node or for a
process: only for answers of the GCS, which Ray bounds.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.members import Member
from cluster.nap import napping
from cluster.placement import ROUTER_CPUS, Bundle, WorkerPlan, no_room

NAMESPACE = "pdserve"
MAX_CONCURRENCY = 4
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


def ask_place(plan: WorkerPlan) -> None:
    """Ask Ray for a place for a worker, unless that has been done; where there is no room it stays pending.

    A pending place is what Ray's autoscaler starts a node for.
    """
    if _find_place(plan.worker_id) is None:
        ray.util.placement_group(
            list(plan.bundles),
            strategy="STRICT_PACK",
            name=_place_name(plan.worker_id),
            lifetime="detached",
            bundle_label_selector=[plan.labels] * len(plan.bundles) if plan.labels else None,
        )


def node_of(worker_id: str) -> str | None:
    """Id of the node that has the worker's place; None: there is no such place (yet, or its node is lost)."""
    place = _find_place(worker_id)
    table = {} if place is None else ray.util.placement_group_table(place)
    return str(table["bundles_to_node_id"][0]) if table.get("state") == "CREATED" else None


def create_worker(plan: WorkerPlan, classes: ActorClasses, around: Surroundings) -> WorkerHandles:
    """The worker's actors, made where they are missing; PlacementError if its place is not there."""
    place = _find_place(plan.worker_id)
    if place is None or node_of(plan.worker_id) is None:
        raise PlacementError(no_room(plan))
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
        _create(classes.engine, name, plan.bundles[1 + rank], environment, (place, 1 + rank)).remote(spec, rank)
        for rank, name in enumerate(_engine_names(plan.worker_id, len(plan.bundles) - 1))
    )
    front = _create(classes.front, front_name(plan.worker_id), plan.bundles[0], thread_limits(1), (place, 0))
    return WorkerHandles(front.remote(spec), engines)


def find_speaker(member: Member) -> Any | None:
    """The actor that speaks for a member: the router, or a worker's front; None if there is none."""
    try:
        return ray.get_actor(
            member.member_id if member.kind == "router" else front_name(member.member_id), namespace=NAMESPACE
        )
    except ValueError:
        return None


def exists(member: Member) -> bool:
    """Whether a member has an actor or a place."""
    return find_speaker(member) is not None or _find_place(member.member_id) is not None


def create_router(router_id: str, classes: ActorClasses, around: Surroundings) -> Any:
    """The router's actor, made if it is missing."""
    spec = classes.router_spec(
        router_id=router_id, config=around.config, run_dir=around.run_dir, redis_url=around.redis_url
    )
    bundle = {"CPU": ROUTER_CPUS, **around.config["router"]["resources"]}
    return _create(classes.router, router_id, bundle, thread_limits(1), None).remote(spec)


def remove_worker(worker_id: str, num_ranks: int) -> None:
    """End a worker's processes and give its place back, also one that is pending; what is gone is no error."""
    for name in (front_name(worker_id), *_engine_names(worker_id, num_ranks)):
        remove_actor(name)
    if (place := _find_place(worker_id)) is not None:
        ray.util.remove_placement_group(place)


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


def _engine_names(worker_id: str, num_ranks: int) -> list[str]:
    return [engine_name(worker_id, rank) for rank in range(num_ranks)]


def _place_name(worker_id: str) -> str:
    return f"pdserve/{worker_id}"


def _find_place(worker_id: str) -> PlacementGroup | None:
    try:
        place: PlacementGroup = ray.util.get_placement_group(_place_name(worker_id))
    except ValueError:
        return None
    return place


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
