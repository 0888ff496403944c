"""What runs and how it is, gathered from outside within a bound, whatever part of it is dead.

Sources: the run directory (supervisor, Valkey, Ray), what the controller keeps in Redis (members, what is wanted, its
report), the registry there (workers, routers), and each process's /metrics. No Ray driver is needed.

A member that is placed, starts, drains or stops is on its way, and no fault; one that should be ready and is not is.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import re
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from prometheus_client.core import Sample
from prometheus_client.parser import text_string_to_metric_families

from cluster import members
from cluster.cluster_store import ClusterStore, ClusterStoreError, Wish
from cluster.config import ClusterConfig, from_plain, public_url
from cluster.connect import TIMEOUT_S, redis_url, running_config
from cluster.metrics import PREFIX
from cluster.pairs import Pair, pairs_of
from cluster.placement import router_ids, wanted_workers
from cluster.run_dir import RunDir, RunState
from cluster.scaling_view import Scaling, scaling_view
from router.errors import StoreUnavailableError
from router.store import RedisStore, RouterRecord, WorkerRecord

MAX_METRICS_BYTES = 4 * 1024 * 1024

Numbers = dict[str, float]


State = Literal["ready", "starting", "missing", "silent", "placing", "draining", "stopping"]


class Health(enum.Enum):
    """The whole in one word; the value is the exit code of `pdserve status`."""

    READY = 0
    DEGRADED = 1
    NOT_RUNNING = 3


@dataclass(frozen=True)
class Member:
    """A worker or a router as far as it can be seen."""

    member_id: str
    kind: Literal["worker", "router"]
    state: State
    """placing, starting, draining, stopping: as the controller says, on its way. Of one that should be ready:
    starting: its engine is not up again yet; missing: not in the registry; silent: in the registry, but its metrics do
    not answer."""
    pool: str = ""
    """Whose work it does."""
    role: str = ""
    epoch: int = 0
    address: str = ""
    metrics_address: str = ""
    paced: bool = False
    """Whether its steps take the time of other hardware."""
    numbers: Numbers = field(default_factory=dict)
    pairs: list[Pair] = field(default_factory=list)
    """Those over which it sends KV."""
    born: str = ""
    """The pool whose settings it was started with; empty where that is not known."""
    is_on_its_way: bool = False
    """Whether it need not be ready now: the controller places, starts, drains or stops it."""
    why: str = ""
    """Why it is on its way."""
    since: float = 0.0
    """When it came where it is in its life, Unix time; 0: not known."""


@dataclass(frozen=True)
class Report:
    """All that `status` shows."""

    health: Health
    phase: str
    run_dir: str
    mode: str = ""
    supervisor: str = "down"
    valkey: str = "down"
    ray: str = "down"
    restarts: dict[str, int] = field(default_factory=dict)
    members: list[Member] = field(default_factory=list)
    controller: str = ""
    """What the controller says of itself; empty where nothing was wanted of it yet."""
    scaling: Scaling | None = None
    """Pools, advice, budget; None where the controller's store says nothing."""


@dataclass(frozen=True)
class _Kept:
    """What the controller keeps in Redis."""

    wish: Wish | None = None
    members: Mapping[str, members.Member] = field(default_factory=dict)
    report: dict[str, Any] | None = None


def gather(run_dir: RunDir) -> Report:
    """Ask everything at once; takes a few times TIMEOUT_S at most."""
    state = run_dir.read_state()
    if state is None:
        return Report(Health.NOT_RUNNING, "not running", str(run_dir.path))
    return asyncio.run(_gather(run_dir, state))


async def _gather(run_dir: RunDir, state: RunState) -> Report:
    started_with = running_config(run_dir)
    url = redis_url(run_dir, state, started_with)
    records, kept, ray = await asyncio.gather(_records(url), asyncio.to_thread(_kept, url), _listens(state.ray_address))
    config = from_plain(started_with if kept.wish is None else kept.wish.config)
    registered: dict[str, WorkerRecord | RouterRecord] = records or {}
    found = await asyncio.gather(*(_member(*known, registered.get(known[0])) for known in _known(config, kept)))
    seen = [_on_its_way(member, kept.members.get(member.member_id)) for member in found]
    view = _view(kept, seen)
    alive = state.supervisor.is_alive()
    as_they_should = all(member.state == "ready" or member.is_on_its_way for member in seen)
    good = alive and ray and records is not None and as_they_should
    steered = kept.wish is None or kept.report is not None
    served = view is None or all(pool.ready for pool in view.pools)
    valkey_up = state.valkey.is_alive() if state.valkey else records is not None
    return Report(
        health=Health.READY if good and steered and served and state.phase.value == "ready" else Health.DEGRADED,
        phase=state.phase.value if alive else "left behind by a supervisor that died",
        run_dir=str(run_dir.path),
        mode=config.mode,
        supervisor=f"pid {state.supervisor.pid}" if alive else "down",
        valkey=("answers" if records is not None else "silent" if valkey_up else "down")
        + f", {state.redis_url or public_url(url)}",
        ray=f"{'answers' if ray else 'down'}, {state.ray_address}",
        restarts=state.restarts,
        members=seen,
        controller="" if kept.wish is None else str(kept.report.get("state", "up")) if kept.report else "silent",
        scaling=view,
    )


def _kept(url: str) -> _Kept:
    """What the controller keeps; nothing where Redis does not answer."""
    if not url:
        return _Kept()
    store = ClusterStore(url, timeout_s=TIMEOUT_S)
    try:
        return _Kept(store.wish(), store.members(), store.report())
    except ClusterStoreError:
        return _Kept()
    finally:
        store.close()


Known = tuple[str, Literal["worker", "router"], str, str]
"""Id, kind, pool and role."""


def _known(config: ClusterConfig, kept: _Kept) -> list[Known]:
    """Those that there are by the controller, workers first; without its word, those that the YAML wants."""
    if not kept.members:
        plans = wanted_workers(config, gpus=0.0)
        workers: list[Known] = [(plan.worker_id, "worker", plan.pool, plan.role) for plan in plans]
        return [*workers, *((name, "router", "", "") for name in router_ids(config))]
    both = config.mode == "colocated"
    known: list[Known] = [
        (each.member_id, each.kind, each.pool, "both" if both and each.kind == "worker" else each.pool)
        for each in kept.members.values()
    ]
    return sorted(known, key=lambda one: (one[1] == "router", not one[0].startswith("prefill"), _natural(one[0])))


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts decode-10 behind decode-9."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


def _on_its_way(member: Member, kept: members.Member | None) -> Member:
    """With what the controller says of it, which counts for all that need not be ready."""
    if kept is None:
        return member
    if kept.phase is members.Phase.READY:
        return replace(member, born=kept.born, since=kept.since)
    state: Any = kept.phase.value
    return replace(member, state=state, is_on_its_way=True, born=kept.born, why=kept.why, since=kept.since)


def _view(kept: _Kept, seen: list[Member]) -> Scaling | None:
    if kept.wish is None:
        return None
    ids: dict[str, set[str]] = {"ready": set(), "starting": set()}
    for member in seen:
        ids.setdefault(member.state, set()).add(member.member_id)
    return scaling_view(kept.wish, kept.members, kept.report, ready=ids["ready"], starting=ids["starting"])


async def _records(url: str) -> dict[str, WorkerRecord | RouterRecord] | None:
    """The registry by id; None if it does not answer."""
    if not url:
        return None
    store = RedisStore(url, timeout_s=TIMEOUT_S)
    try:
        async with asyncio.timeout(2 * TIMEOUT_S):
            workers, routers = await asyncio.gather(store.workers(), store.routers())
    except (StoreUnavailableError, TimeoutError):
        return None
    finally:
        await store.close()
    return {**{record.worker_id: record for record in workers}, **{record.router_id: record for record in routers}}


async def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    if not host:
        return False
    try:
        async with asyncio.timeout(TIMEOUT_S):
            _, writer = await asyncio.open_connection(host, int(port))
    except (OSError, TimeoutError):
        return False
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return True


async def _member(
    name: str, kind: Literal["worker", "router"], pool: str, role: str, record: WorkerRecord | RouterRecord | None
) -> Member:
    if record is None:
        return Member(name, kind, "missing", pool=pool, role=role)
    page = await asyncio.to_thread(_scrape, record.metrics_address) if record.metrics_address else []
    numbers, epoch = None if page is None else _numbers(page), getattr(record, "epoch", 0)
    return Member(
        name,
        kind,
        _state(numbers),
        pool=pool,
        role=getattr(record, "role", role),
        epoch=epoch,
        address=record.address,
        metrics_address=record.metrics_address,
        paced=bool(numbers and numbers.get("paced")),
        numbers=numbers or {},
        pairs=pairs_of(f"{name}/{epoch}", page or []),
    )


def _state(numbers: Numbers | None) -> Literal["ready", "starting", "silent"]:
    if numbers is None:
        return "silent"
    return "ready" if numbers.get("ready", 1.0) else "starting"


def _scrape(address: str) -> list[Sample] | None:
    """Our samples on a /metrics page; None if it does not answer."""
    try:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=TIMEOUT_S) as answer:
            text = answer.read(MAX_METRICS_BYTES).decode()
    except (OSError, ValueError):
        return None
    families: Any = text_string_to_metric_families(text)
    return [sample for family in families if family.name.startswith(f"{PREFIX}_") for sample in family.samples]


def _numbers(page: list[Sample]) -> Numbers:
    """The samples without labels, by their names without prefix."""
    return {
        sample.name.removeprefix(f"{PREFIX}_").partition("_")[2]: sample.value for sample in page if not sample.labels
    }
