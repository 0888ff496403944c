"""What each process reserves of a machine: arithmetic only, no Ray.

A worker takes one placement group: bundle 0 for its front, bundle 1 + r for rank r, all on one node.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from cluster.config import ClusterConfig, PoolConfig

PoolName = Literal["prefill", "decode"]
Role = Literal["prefill", "decode", "both"]
Bundle = dict[str, float]

FRONT_CPUS = 0.1
"""A front moves messages; it computes nothing."""
ROUTER_CPUS = 0.2
CONTROLLER_CPUS = 0.0


@dataclass(frozen=True)
class WorkerPlan:
    """One worker that the YAML wants."""

    worker_id: str
    pool: PoolName
    role: Role
    bundles: tuple[Bundle, ...]
    """Of the front, then of each rank."""
    threads: int


def wanted_workers(config: ClusterConfig, gpus: float) -> list[WorkerPlan]:
    """The workers of a configuration, given how many GPUs there are in all."""
    pools: list[tuple[PoolName, Role, PoolConfig]] = [("decode", "both", config.decode)]
    if config.mode == "split":
        pools = [("prefill", "prefill", config.prefill), ("decode", "decode", config.decode)]
    ranks = sum(pool.workers * pool.tensor_parallel for _, _, pool in pools)
    return [
        WorkerPlan(
            worker_id=f"{name}-{index}",
            pool=name,
            role=role,
            bundles=({"CPU": FRONT_CPUS}, *[rank_bundle(pool, enough_gpus=gpus >= ranks)] * pool.tensor_parallel),
            threads=pool.threads,
        )
        for name, role, pool in pools
        for index in range(pool.workers)
    ]


def rank_bundle(pool: PoolConfig, *, enough_gpus: bool) -> Bundle:
    """What one rank reserves; device auto takes a GPU only where there is one for every rank of the cluster."""
    on_gpu = pool.device == "cuda" or (pool.device == "auto" and enough_gpus)
    gpus = pool.num_gpus if pool.num_gpus is not None else float(on_gpu)
    bundle = {"CPU": float(pool.threads if pool.num_cpus is None else pool.num_cpus)}
    if gpus:
        bundle["GPU"] = gpus
    return bundle | {name: amount for name, amount in pool.resources.items() if amount}


def total(plans: list[WorkerPlan], num_routers: int) -> Bundle:
    """What a whole cluster reserves."""
    needed: Bundle = {"CPU": num_routers * ROUTER_CPUS + CONTROLLER_CPUS}
    for plan in plans:
        for bundle in plan.bundles:
            for name, amount in bundle.items():
                needed[name] = needed.get(name, 0.0) + amount
    return needed


def logical_cpus(plans: list[WorkerPlan], num_routers: int) -> int:
    """CPUs to give a Ray of our own, so that what the YAML asks for fits on a machine with fewer cores."""
    return math.ceil(total(plans, num_routers)["CPU"] + 1e-9)


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
