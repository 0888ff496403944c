"""What applying a configuration would do to the cluster that runs, in figures and in words. Pure.

Sizes follow the file only where its `workers` differ from the configuration that runs: a pool that the autoscaler or
`pdserve scale` has resized keeps its size when the rest of the file changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from cluster.cluster_store import Wish
from cluster.config import public_url
from cluster.config_diff import Change, Needs, diff

POOLS = ("prefill", "decode")
MAX_WORKERS = 1000
"""Of one pool; as much as the YAML allows."""
_MAX_NAMED = 4
_ORDER: tuple[Needs, ...] = ("hot", "drain", "restart")


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """How many workers of one pool are wanted."""

    now: int
    then: int
    file: int
    """What the file says."""
    running: int
    """What the configuration that runs says."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What applying would do."""

    changes: list[Change]
    config: dict[str, Any]
    sizes: dict[str, Size]
    """By pool; only those that run."""

    @property
    def needs(self) -> Needs | Literal["nothing"]:
        """The most that any change needs."""
        return max((change.needs for change in self.changes), key=_ORDER.index, default="nothing")

    @property
    def sizes_then(self) -> dict[str, int]:
        """Wanted workers afterwards."""
        return {pool: size.then for pool, size in self.sizes.items()}


def plan(wish: Wish, config: dict[str, Any]) -> Plan:
    """What applying `config` to this wish would do; both are settled (`cluster.launch.settle`)."""
    sizes = {}
    for pool in pools_of(config):
        file, running = config[pool]["workers"], wish.config[pool]["workers"]
        now = wish.sizes.get(pool, running if pool in pools_of(wish.config) else 0)
        sizes[pool] = Size(now=now, then=now if file == running else file, file=file, running=running)
    return Plan(changes=diff(wish.config, config), config=config, sizes=sizes)


def pools_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The pools that run in this mode."""
    return ("decode",) if config["mode"] == "colocated" else POOLS


def size_problem(config: Mapping[str, Any], sizes: Mapping[str, int]) -> str:
    """Why these sizes cannot be; empty if they can."""
    scaling = config["scaling"]
    for pool, size in sizes.items():
        if pool not in POOLS:
            return f"there is no pool {pool!r}: pools are prefill and decode"
        if pool not in pools_of(config):
            return "there is no prefill pool in mode colocated: its workers are those of decode"
        if not 1 <= size <= MAX_WORKERS:
            none = "; for no prefill workers set `mode: colocated` (a restart)" if pool == "prefill" else ""
            return f"{pool} must have from 1 to {MAX_WORKERS} workers, got {size}{none}"
    total, most = sum(sizes.values()), scaling["max_workers"]
    if most is not None and total > most:
        return f"{_sum_of(sizes)} are {total} workers, more than scaling.max_workers ({most}) allows"
    gpus, most_gpus = sum(size * _least_gpus(config[pool]) for pool, size in sizes.items()), scaling["max_gpus"]
    if most_gpus is not None and gpus > most_gpus + 1e-9:
        return f"{_sum_of(sizes)} need {gpus:g} GPUs, more than scaling.max_gpus ({most_gpus:g}) allows"
    return ""


def _sum_of(sizes: Mapping[str, int]) -> str:
    return " and ".join(f"{size} {pool}" for pool, size in sizes.items())


def _least_gpus(pool: Mapping[str, Any]) -> float:
    """GPUs that a worker of this pool is known to reserve; with device auto that is known only where it runs."""
    each = pool["num_gpus"] if pool["num_gpus"] is not None else float(pool["device"] == "cuda")
    return float(each * pool["tensor_parallel"])


def meaning(change: Change, plan: Plan) -> str:
    """What a change means, in words."""
    section, _, key = change.path.partition(".")
    if change.needs == "restart":
        return "all of it stops and starts: `pdserve down`, `pdserve up`"
    if change.needs == "drain":
        return _replaced(change, plan)
    if key == "workers":
        size = plan.sizes.get(section)
        if size is None:
            return "nothing: mode colocated has no prefill pool"
        if size.now == size.then:
            return f"nothing now: {section} has {size.now} already"
        return f"{section}: {size.now} -> {size.then} workers"
    if change.path == "router.replicas":
        return f"routers: {change.old} -> {change.new}"
    if section == "scaling":
        return _scaling(key, change.new, plan)
    return f"counts from the next {'start' if change.path == 'start_timeout_s' else 'drain'}"


def _replaced(change: Change, plan: Plan) -> str:
    pools = [pool for pool in POOLS if pool in change.touches and pool in plan.sizes]
    who = [f"each {pools[0]} worker" if len(pools) == 1 else "every worker"] if pools else []
    who += ["each router"] if "router" in change.touches else []
    if not who:
        return "nothing: mode colocated has no prefill pool"
    return f"{' and '.join(who)} is replaced, one after another"


_MODES = {
    "off": "sizes stay as they are until you change them",
    "advise": "the autoscaler says what it would do, and does nothing",
    "on": "the autoscaler decides the sizes from now on",
}


def _scaling(key: str, value: Any, plan: Plan) -> str:
    if key == "mode":
        return _MODES[value]
    if key in ("max_workers", "max_gpus", "max_nodes"):
        return f"budget: {'no limit' if value is None else f'at most {value:g}'} from now on"
    if key in ("role_change", "place_timeout_s"):
        return "counts from the next change of a size"
    if plan.config["scaling"]["mode"] == "off":
        return "counts once scaling.mode is advise or on"
    return "the autoscaler goes by it from its next decision"


def notes(plan: Plan) -> list[str]:
    """What else there is to know of an apply, a sentence each."""
    said = []
    for pool, size in plan.sizes.items():
        if size.then == size.now != size.file:
            said.append(
                f"{pool} has {size.now} workers wanted, the file says {size.file}: `pdserve scale` or the autoscaler "
                f"changed it, and apply leaves it at {size.now}; `pdserve scale {pool}={size.file}` would set it"
            )
        limits = plan.config["scaling"][pool]
        if plan.config["scaling"]["mode"] == "on" and not limits["min"] <= size.then <= limits["max"]:
            said.append(
                f"{pool} with {size.then} workers is outside scaling.{pool} ({limits['min']} to {limits['max']}): the "
                "autoscaler brings it there"
            )
    touched = {kind for change in plan.changes for kind in change.touches}
    if "router" in touched and plan.needs != "restart" and (gap := router_gap(plan.config)):
        said.append(gap)
    if plan.changes and plan.needs != "restart" and (problem := size_problem(plan.config, plan.sizes_then)):
        said.append(problem)
    return said


def router_gap(config: Mapping[str, Any]) -> str:
    """What replacing the routers means for clients; empty where they notice nothing."""
    if config["router"]["replicas"] > 1:
        return ""
    return (
        "there is one router, and its successor takes over its port: it ends what runs, and clients that come before "
        "the successor listens must try again; with `router.replicas: 2` they find the other one"
    )


def is_refused(plan: Plan) -> str:
    """Why `apply` does not do it; empty if it does."""
    restarts = [change.path for change in plan.changes if change.needs == "restart"]
    if restarts:
        return (
            f"{_named(restarts)} cannot change while the cluster runs: leave it as it is, or stop the cluster with "
            "`pdserve down` and start it with `pdserve up`"
        )
    if plan.config["scaling"]["mode"] != "on":
        return size_problem(plan.config, plan.sizes_then)
    return ""


def summary(plan: Plan) -> str:
    """The changes in one line, for the history."""
    changes = [f"{change.path} {shown(change.old)} -> {shown(change.new)}" for change in public(plan.changes)]
    return _named(changes, "; ")


def _named(names: list[str], comma: str = ", ") -> str:
    more = len(names) - _MAX_NAMED
    return comma.join(names[:_MAX_NAMED]) + (f" and {more} more" if more > 0 else "")


def public(changes: list[Change]) -> list[Change]:
    """The changes without the password of a URL."""
    return [
        Change(change.path, _public(change.old), _public(change.new), change.needs, change.touches)
        if change.path == "redis.url"
        else change
        for change in changes
    ]


def _public(url: Any) -> Any:
    return public_url(url) if isinstance(url, str) else url


def shown(value: Any) -> str:
    """A value as a person writes it in YAML."""
    match value:
        case None:
            return "-"
        case bool():
            return str(value).lower()
        case dict() if value:
            return "{" + ", ".join(f"{key}: {shown(each)}" for key, each in value.items() if each is not None) + "}"
        case list():
            return "[" + ", ".join(map(shown, value)) + "]"
        case float():
            return f"{value:g}"
    return str(value)
