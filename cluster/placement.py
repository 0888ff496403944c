"""What each process reserves of a machine: arithmetic only, no Ray.

A worker takes one placement group: bundle 0 for its front, bundle 1 + r for rank r, all on one node.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from cluster.config import ClusterConfig, PoolConfig

PoolName = Literal["prefill", "decode"]
Role = Literal["prefill", "decode", "both"]
Bundle = dict[str, float]

FRONT_CPUS = 0.1
"""A front moves messages; it computes nothing."""
ROUTER_CPUS = 0.2
CONTROLLER_CPUS = 0.0
ACCELERATOR_SHARE = 0.001
"""How much Ray's own `accelerator_type` option takes of a node's accelerator_type:NAME, of which there is 1."""
LEAST_CPUS = 256


@dataclass(frozen=True)
class WorkerPlan:
    """One worker: what it is, and what it takes of a node."""

    worker_id: str
    pool: PoolName
    role: Role
    bundles: tuple[Bundle, ...]
    """Of the front, then of each rank."""
    threads: int
    labels: dict[str, str] = field(default_factory=dict)
    """What Ray's labels of its node must be: a value, or a condition such as in(a, b)."""


def plan_worker(config: ClusterConfig, pool: PoolName, worker_id: str, *, on_gpu: bool) -> WorkerPlan:
    """A worker with the settings of a pool; `on_gpu`: device auto means a GPU (see `auto_on_gpu`)."""
    settings = config.prefill if pool == "prefill" else config.decode
    rank = rank_bundle(settings, enough_gpus=on_gpu)
    return WorkerPlan(
        worker_id=worker_id,
        pool=pool,
        role=pool if config.mode == "split" else "both",
        bundles=({"CPU": FRONT_CPUS}, *[rank] * settings.tensor_parallel),
        threads=settings.threads,
        labels=dict(settings.labels),
    )


def wanted_workers(config: ClusterConfig, gpus: float) -> list[WorkerPlan]:
    """The workers of a configuration, given how many GPUs there are in all."""
    on_gpu = auto_on_gpu(config, gpus)
    return [
        plan_worker(config, name, f"{name}-{index}", on_gpu=on_gpu)
        for name, pool in _pools(config)
        for index in range(pool.workers)
    ]


def auto_on_gpu(config: ClusterConfig, gpus: float) -> bool:
    """Whether device auto means a GPU: only where there is one for every rank that the YAML wants."""
    return gpus >= sum(pool.workers * pool.tensor_parallel for _, pool in _pools(config))


def rank_bundle(pool: PoolConfig, *, enough_gpus: bool) -> Bundle:
    """What one rank reserves; a pool with an accelerator type is on GPUs unless its device is cpu."""
    auto_is_gpu = enough_gpus or pool.accelerator_type is not None
    on_gpu = pool.device == "cuda" or (pool.device == "auto" and auto_is_gpu)
    gpus = pool.num_gpus if pool.num_gpus is not None else float(on_gpu)
    bundle = {"CPU": float(pool.threads if pool.num_cpus is None else pool.num_cpus)}
    if gpus:
        bundle["GPU"] = gpus
    if pool.accelerator_type is not None:
        bundle[f"accelerator_type:{pool.accelerator_type}"] = ACCELERATOR_SHARE
    return bundle | {name: amount for name, amount in pool.resources.items() if amount}


def gpus_of(plan: WorkerPlan) -> float:
    """GPUs that a worker reserves in all."""
    return sum(bundle.get("GPU", 0.0) for bundle in plan.bundles)


def no_room(plan: WorkerPlan) -> str:
    """In words, what a worker whose place is not there waits for."""
    labels = f" with the labels {plan.labels}" if plan.labels else ""
    return f"Ray has no node with room for worker {plan.worker_id}: it needs {list(plan.bundles)} on one node{labels}"


def total(plans: list[WorkerPlan], num_routers: int) -> Bundle:
    """What a whole cluster reserves."""
    needed: Bundle = {"CPU": num_routers * ROUTER_CPUS + CONTROLLER_CPUS}
    for plan in plans:
        for bundle in plan.bundles:
            for name, amount in bundle.items():
                needed[name] = needed.get(name, 0.0) + amount
    return needed


def logical_cpus(config: ClusterConfig) -> int:
    """CPUs to give a Ray of our own, so that they bound nothing: they are a budget for placement, not cores.

    Room for pools of the greatest size that the YAML or the autoscaler may ask for, and one more worker of each,
    which replaces another. Any of them may have been started by the pool whose workers take more: a worker that
    changes its role keeps its place. Settings change while Ray runs, so it is never less than LEAST_CPUS.
    """
    limits = {"prefill": config.scaling.prefill.max, "decode": config.scaling.decode.max}
    num_workers = sum(max(pool.workers, limits[name]) + 1 for name, pool in _pools(config))
    largest = max(
        sum(bundle["CPU"] for bundle in plan_worker(config, name, name, on_gpu=False).bundles)
        for name, _ in _pools(config)
    )
    needed = num_workers * largest + (config.router.replicas + 1) * ROUTER_CPUS + CONTROLLER_CPUS
    return max(LEAST_CPUS, math.ceil(needed - 1e-9))


def router_ids(config: ClusterConfig) -> list[str]:
    """The routers that the YAML wants."""
    return [f"router-{index}" for index in range(config.router.replicas)]


def port_of(base: int, router_id: str, *, same: bool = False) -> int:
    """The port of a router, given that of the first one; 0: any free one. `same`: each has a machine of its own."""
    return base + int(router_id.rpartition("-")[2]) if base and not same else base


def shortage(needed: Bundle, there: Bundle) -> list[str]:
    """In words, each resource of which there is too little."""
    return [
        f"{name}: {amount:g} needed, {there.get(name, 0.0):g} there"
        for name, amount in sorted(needed.items())
        if amount > there.get(name, 0.0) + 1e-9
    ]


def _pools(config: ClusterConfig) -> list[tuple[PoolName, PoolConfig]]:
    pools: list[tuple[PoolName, PoolConfig]] = [("decode", config.decode)]
    return [("prefill", config.prefill), *pools] if config.mode == "split" else pools
