"""The controller: one detached actor that makes the cluster what its wish says, on a thread of its own (`overseer.py`).

States: NEW -> (deploy) DEPLOYED -> (drain) DRAINING -> (stop) STOPPED. Ray restarts it where it died; it then finds its
wish and its members in Redis and goes on. Dead processes are restarted by Ray, not by the controller. No request passes
through it: without it the cluster serves on, as it is.
"""

from __future__ import annotations

import enum
import importlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from cluster import metrics, pool
from cluster.cluster_store import ClusterStore, ClusterStoreError, Decision, Wish
from cluster.config import ClusterConfig, from_plain
from cluster.hands import RayHands
from cluster.members import Member
from cluster.nap import napping
from cluster.overseer import Overseer
from cluster.placement import auto_on_gpu, shortage, total, wanted_workers
from cluster.process import at_node, begin

CONTROLLER = "controller"
STATUS_TIMEOUT_S = 2.0
STOP_TIMEOUT_S = 10.0
RETRY_S = 1.0

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
        around = deployment.around
        here = at_node(around)  # for this process alone: its workers may be on other nodes
        config = from_plain(here.config)
        begin("controller", "", config, here.run_dir, here.redis_url)
        self._state = ControllerState.NEW
        self._store = ClusterStore(here.redis_url, timeout_s=config.router.store_timeout_s)
        self._hands = RayHands(_load_classes(deployment.actors), around.run_dir, around.redis_url)
        there: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        self._overseer = Overseer(self._store, self._hands, on_gpu=auto_on_gpu(config, there.get("GPU", 0.0)))
        self._over = threading.Event()
        self._turn = threading.Lock()
        """Held for each tick."""
        self._loop = threading.Thread(target=self._follow, name="overseer", daemon=True)
        collector = metrics.StatsCollector("controller", self._metric_values, key_labels={"members": "phase"})
        self._metrics = metrics.serve([collector], host=config.observability.metrics_host)
        log.info("controller up", extra={"metrics": self._metrics.address})
        if ray.get_runtime_context().was_current_actor_reconstructed:
            self._state = ControllerState.DEPLOYED
            self._loop.start()

    def deploy(self, config: dict[str, Any]) -> dict[str, str]:
        """Make this configuration the wish, and begin; each member's id with `worker` or `router`.

        PlacementError if it cannot fit into a Ray of our own.
        """
        wanted = from_plain(config)
        _check_room(wanted)
        self._forget_the_dead()
        known = self._store.wish()
        sizes = _sizes(wanted, known if self._store.members() else None)
        decision = Decision(at=time.time(), by="up", what=_in_words(sizes), reason="the cluster is started")
        self._store.change(known.generation if known else 0, decision, config=config, sizes=sizes)
        self._state = ControllerState.DEPLOYED
        with self._turn:
            self._overseer.take_up()
            self._overseer.tick()
        if not self._loop.is_alive():
            self._loop.start()
        return {member.member_id: member.kind for member in self._overseer.members}

    def wait_ready(self, member_id: str, timeout_s: float) -> dict[str, Any]:
        """What a worker or router says of itself once it is ready; raises its error, or TimeoutError."""
        told = self._overseer.wait_ready(member_id, timeout_s)
        if told:
            return told
        (member,) = [member for member in self._overseer.members if member.member_id == member_id]
        ((_, actor),) = _living([member])
        return dict(ray.get(actor.ready.remote(), timeout=timeout_s))

    def status(self) -> dict[str, Any]:
        """State, and what each router and front says of itself; silent ones are `unreachable`."""
        members = self._overseer.members
        refs = {member.member_id: actor.status.remote() for member, actor in _living(members)}
        answered, _ = (
            ray.wait(list(refs.values()), num_returns=len(refs), timeout=STATUS_TIMEOUT_S) if refs else ([], [])
        )
        ready = set(answered)
        silent = {"state": "unreachable"}
        return {
            "state": self._state.value,
            "members": {
                member.member_id: _answer(refs[member.member_id])
                if member.member_id in refs and refs[member.member_id] in ready
                else silent
                for member in members
            },
        }

    def drain(self, timeout_s: float) -> dict[str, Any]:
        """Let running requests end: routers first, then fronts, together within the bound. Scaling is over."""
        self._end_loop(ControllerState.DRAINING)
        until = time.monotonic() + timeout_s
        drained: dict[str, Any] = {}
        for kind in ("router", "worker"):
            left = max(0.0, until - time.monotonic())
            going = _living([member for member in self._overseer.members if member.kind == kind])
            asked = {member.member_id: actor.drain.remote(left) for member, actor in going}
            if asked:
                answered, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=left + 1.0)
                ready = set(answered)
                drained.update({name: _answer(ref) for name, ref in asked.items() if ref in ready})
        return drained

    def stop(self) -> None:
        """End every worker and router, give their places back, and forget them."""
        self._end_loop(ControllerState.STOPPED)
        for member in sorted(self._overseer.members, key=lambda member: member.kind):  # routers first
            self._hands.remove(member)
        try:
            self._store.forget()
        except ClusterStoreError as error:
            log.warning("what was wanted is left in Redis: %s", error)

    def _follow(self) -> None:
        """Tick until it is over; woken by changes in Redis."""
        taken_up = self._state is not ControllerState.DEPLOYED
        while not self._over.is_set():
            try:
                with self._turn:
                    if not taken_up:
                        self._overseer.take_up()
                        taken_up = True
                    pause_s = self._overseer.tick()
                self._store.wait(pause_s)
            except ClusterStoreError as error:
                log.warning("waiting for Redis: %s", error)
                self._over.wait(RETRY_S)
            except Exception:
                log.exception("a tick failed")
                self._over.wait(RETRY_S)

    def _end_loop(self, state: ControllerState) -> None:
        self._state = state
        self._over.set()
        if self._loop.is_alive():
            self._loop.join(STOP_TIMEOUT_S)

    def _forget_the_dead(self) -> None:
        """Members of an earlier Ray are gone with it: what has neither actors nor a place is no member any more."""
        for member in self._store.members().values():
            if not pool.exists(member):
                self._store.drop(member.member_id)

    def _metric_values(self) -> dict[str, Any]:
        return {"members": dict(Counter(member.phase.value for member in self._overseer.members))}


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


def _check_room(config: ClusterConfig) -> None:
    """A Ray of our own grows no nodes: what does not fit now never will."""
    if config.ray.address is not None:
        return
    there: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    plans = wanted_workers(config, gpus=there.get("GPU", 0.0))
    if missing := shortage(total(plans, config.router.replicas), there):
        raise pool.PlacementError(f"the Ray cluster is too small: {'; '.join(missing)}")


def _sizes(wanted: ClusterConfig, known: Wish | None) -> dict[str, int]:
    """The YAML's; where its number is that of a wish that stands, what the autoscaler or a person made of it."""
    sizes = {"decode": wanted.decode.workers}
    if wanted.mode == "split":
        sizes["prefill"] = wanted.prefill.workers
    if known is None:
        return sizes
    return {
        pool: known.sizes.get(pool, size) if known.config[pool]["workers"] == size else size
        for pool, size in sizes.items()
    }


def _in_words(sizes: dict[str, int]) -> str:
    return ", ".join(f"{pool} {size}" for pool, size in sorted(sizes.items(), reverse=True))


def _living(members: Sequence[Member]) -> list[tuple[Member, Any]]:
    """The router or front actor of each member that has one."""
    found = [(member, pool.find_speaker(member)) for member in members]
    return [(member, actor) for member, actor in found if actor is not None]


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
