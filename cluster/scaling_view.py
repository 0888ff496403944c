"""How the pools stand against what is wanted, from what the controller keeps: for `pdserve status`. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Any

from cluster.change_plan import pools_of
from cluster.cluster_store import Wish
from cluster.members import Member, Phase

_COMING = (Phase.PLACING, Phase.STARTING)
_GOING = (Phase.DRAINING, Phase.STOPPING)


@dataclass(frozen=True)
class Pool:
    """One pool's workers, by where they are in their life."""

    name: str
    wanted: int
    ready: int
    starting: int
    """Those that wait for a node or start, and those that should be ready and start again."""
    draining: int
    """Those that drain or stop."""
    missing: int
    """Those that should be ready and are not to be seen."""
    advice: int | None = None
    """What the autoscaler wants; None where it says nothing."""


@dataclass(frozen=True)
class Used:
    """One budget."""

    used: float | None
    """None: not known."""
    limit: float | None
    """None: no limit."""


@dataclass(frozen=True)
class Scaling:
    """All of it."""

    generation: int
    """Of what is wanted."""
    by: str
    """Who changed it last."""
    mode: str
    settled: bool
    """Whether the controller says that all is as wanted."""
    waiting: list[str]
    """What is under way, or cannot be done and why."""
    pools: list[Pool]
    reason: str = ""
    """Of the autoscaler's advice."""
    budget: dict[str, Used] = field(default_factory=dict)
    """Of workers, gpus and nodes."""
    load: dict[str, Any] = field(default_factory=dict)
    """What the autoscaler last saw."""


def scaling_view(
    wish: Wish,
    members: Mapping[str, Member],
    report: dict[str, Any] | None,
    *,
    ready: Set[str],
    starting: Set[str] = frozenset(),
) -> Scaling:
    """`ready` and `starting`: ids of the members that are seen so; `report`: the controller's, None if it is silent."""
    said = report or {}
    scaling = wish.config["scaling"]
    advice = (said.get("advice") or {}) if scaling["mode"] != "off" else {}
    workers = [member for member in members.values() if member.kind == "worker"]
    return Scaling(
        generation=wish.generation,
        by=wish.by,
        mode=scaling["mode"],
        settled=said.get("generation", 0) >= wish.generation and bool(said.get("settled")),
        waiting=list(said.get("waiting") or []),
        pools=[
            _pool(name, wish.sizes.get(name, 0), workers, ready, starting, advice.get("sizes", {}).get(name))
            for name in pools_of(wish.config)
        ],
        reason=str(advice.get("reason", "")),
        budget={
            "workers": Used(float(len(workers)), scaling["max_workers"]),
            "gpus": Used(sum(member.gpus for member in members.values()), scaling["max_gpus"]),
            "nodes": Used(said.get("nodes"), scaling["max_nodes"]),
        },
        load=dict(said.get("load") or {}),
    )


def _pool(
    name: str, wanted: int, workers: list[Member], ready: Set[str], starting: Set[str], advice: int | None
) -> Pool:
    mine = [member for member in workers if member.pool == name]
    should_be = [member.member_id for member in mine if member.phase is Phase.READY]
    again = sum(member_id in starting for member_id in should_be)
    there = sum(member_id in ready for member_id in should_be)
    return Pool(
        name=name,
        wanted=wanted,
        ready=there,
        starting=sum(member.phase in _COMING for member in mine) + again,
        draining=sum(member.phase in _GOING for member in mine),
        missing=len(should_be) - there - again,
        advice=advice,
    )
