"""What runs and how it is, gathered from outside within a bound, whatever part of it is dead.

Sources: the run directory (supervisor, Valkey, Ray), the registry in Redis (workers, routers), and each
process's /metrics. No Ray driver is needed.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import json
import urllib.request
from dataclasses import dataclass, field
from typing import Any, Literal

from prometheus_client.core import Sample
from prometheus_client.parser import text_string_to_metric_families

from cluster.config import ClusterConfig, from_plain, public_url
from cluster.metrics import PREFIX
from cluster.pairs import Pair, pairs_of
from cluster.placement import router_ids, wanted_workers
from cluster.run_dir import RunDir, RunState
from router.errors import StoreUnavailableError
from router.store import RedisStore, RouterRecord, WorkerRecord

TIMEOUT_S = 2.0
MAX_METRICS_BYTES = 4 * 1024 * 1024

Numbers = dict[str, float]


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
    state: Literal["ready", "starting", "missing", "silent"]
    """starting: its engine is not up (again) yet; missing: not in the registry; silent: in the registry, but its
    metrics do not answer."""
    pool: str = ""
    role: str = ""
    epoch: int = 0
    address: str = ""
    metrics_address: str = ""
    paced: bool = False
    """Whether its steps take the time of other hardware."""
    numbers: Numbers = field(default_factory=dict)
    pairs: list[Pair] = field(default_factory=list)
    """Those over which it sends KV."""


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


def gather(run_dir: RunDir) -> Report:
    """Ask everything at once; takes a few times TIMEOUT_S at most."""
    state = run_dir.read_state()
    if state is None:
        return Report(Health.NOT_RUNNING, "not running", str(run_dir.path))
    config = from_plain(json.loads(run_dir.config_file.read_text()))
    return asyncio.run(_gather(run_dir, state, config))


async def _gather(run_dir: RunDir, state: RunState, config: ClusterConfig) -> Report:
    url = config.redis.url or f"redis://:{run_dir.secret('valkey')}@{state.redis_url.removeprefix('redis://')}"
    records, ray = await asyncio.gather(_records(url), _listens(state.ray_address))
    registered: dict[str, WorkerRecord | RouterRecord] = records or {}
    wanted = {plan.worker_id: (plan.pool, plan.role) for plan in wanted_workers(config, gpus=0.0)}
    routers = router_ids(config)
    members = await asyncio.gather(
        *(_member(name, "worker", pool, role, registered.get(name)) for name, (pool, role) in wanted.items()),
        *(_member(name, "router", "", "", registered.get(name)) for name in routers),
    )
    alive = state.supervisor.is_alive()
    good = alive and ray and records is not None and all(member.state == "ready" for member in members)
    valkey_up = state.valkey.is_alive() if state.valkey else records is not None
    return Report(
        health=Health.READY if good and state.phase.value == "ready" else Health.DEGRADED,
        phase=state.phase.value if alive else "left behind by a supervisor that died",
        run_dir=str(run_dir.path),
        mode=config.mode,
        supervisor=f"pid {state.supervisor.pid}" if alive else "down",
        valkey=("answers" if records is not None else "silent" if valkey_up else "down")
        + f", {state.redis_url or public_url(url)}",
        ray=f"{'answers' if ray else 'down'}, {state.ray_address}",
        restarts=state.restarts,
        members=list(members),
    )


async def _records(url: str) -> dict[str, WorkerRecord | RouterRecord] | None:
    """The registry by id; None if it does not answer."""
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
