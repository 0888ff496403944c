"""The controller's mind: follows the wish in Redis, and moves every member towards it. Knows Ray only as `Hands`.

A tick never waits for a member: it reads the wish, looks what has come of what was begun, has `reconcile.plan` say what
is next, begins that, and says how things are. Every change of a member is in Redis before its effect can be seen, so
that a controller that starts anew begins again what was under way. While Redis is away nothing new is begun.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from cluster import reconcile
from cluster.cluster_store import ClusterStore, ClusterStoreError, Decision, Wish, WishChangedError
from cluster.config import ClusterConfig, can_change_role, from_plain
from cluster.config_diff import KINDS, settings_digest
from cluster.hands import Hands, Pending
from cluster.members import Member, Phase, PoolName
from cluster.node_budget import NodeBudget
from cluster.placement import WorkerPlan, gpus_of, no_room, plan_worker
from cluster.ray_errors import explain
from cluster.roll_call import RollCall
from cluster.scaler import Scaler

log = logging.getLogger(__name__)

DRAIN_MARGIN_S = 15.0
"""A drain that has not ended so long after its time is ended by force."""
FIRST_PAUSE_S = 2.0
"""After a member failed to start; it doubles with each failure in a row."""
LONGEST_PAUSE_S = 60.0
ASK_EVERY_S = 5.0
"""How often members are asked how they are."""
REPORT_EVERY_S = 2.0
REPORT_TTL_S = 20.0
BUSY_S = 0.2
"""Pause between two ticks while something is under way."""
IDLE_S = 2.0


@dataclass(frozen=True, slots=True)
class _Failure:
    """The last start of a pool (or router) failed."""

    why: str
    count: int
    until: float


class Overseer:
    """See the module. One thread calls `tick`; the others may call what says so."""

    def __init__(
        self, store: ClusterStore, hands: Hands, *, on_gpu: bool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`on_gpu`: workers whose YAML says `auto` take GPUs."""
        self._store = store
        self._hands = hands
        self._on_gpu = on_gpu
        self._clock = clock
        self._wish: Wish | None = None
        self._config: ClusterConfig | None = None
        self._want = reconcile.Want(sizes={}, routers=0, digests={})
        self._members: dict[str, Member] = {}
        self._pending: dict[str, Pending] = {}
        """What was begun for a member in its phase."""
        self._role_changes: dict[str, tuple[str, Pending]] = {}
        self._role_ended: dict[str, float] = {}
        """When the last change of a worker's role came to its end; what was asked before is of no account."""
        self._nodes = NodeBudget(hands)
        self._entered: dict[str, float] = {}
        """When each member came into its phase, on our clock."""
        self._failures: dict[str, _Failure] = {}
        self._roll_call = RollCall(hands)
        self._scaler = Scaler()
        self._waiting: list[str] = []
        self._reported_at = float("-inf")
        self._reported: dict[str, Any] = {}
        self._changed = threading.Condition()
        self._told: dict[str, dict[str, Any]] = {}
        self._errors: dict[str, Exception] = {}

    # ---- any thread ----

    @property
    def members(self) -> list[Member]:
        """All members, as they are now."""
        with self._changed:
            return list(self._members.values())

    def wait_ready(self, member_id: str, timeout_s: float) -> dict[str, Any]:
        """What a member said when it was ready (nothing, if that was in an earlier life of the controller).

        Raises what it failed with, or TimeoutError.
        """

        def is_decided() -> bool:
            member = self._members.get(member_id)
            return member_id in self._errors or (member is not None and member.phase is Phase.READY)

        with self._changed:
            if not self._changed.wait_for(is_decided, timeout_s):
                phase = self._members[member_id].phase.value if member_id in self._members else "not there any more"
                raise TimeoutError(f"{member_id} was not ready after {timeout_s:g} s: it is {phase}")
            if member_id in self._errors:
                raise self._errors[member_id]
            return self._told.get(member_id, {})

    # ---- the loop's thread ----

    def take_up(self) -> None:
        """Find the members that an earlier life of the controller left; ClusterStoreError if Redis is away."""
        found = self._store.members()
        with self._changed:
            self._members = found
        self._entered = dict.fromkeys(found, self._clock())

    def tick(self) -> float:
        """One round; returns how long the next may wait, in seconds."""
        try:
            self._read_wish()
            if self._wish is None or self._config is None:
                return IDLE_S
            self._look()
            self._hear()
            self._act()
            self._scale()
            self._report()
        except ClusterStoreError as error:
            log.warning("nothing new is begun while Redis is away: %s", error)
            return IDLE_S
        moving = any(member.phase is not Phase.READY for member in self._members.values())
        if moving or self._pending or self._role_changes or self._roll_call.is_asking:
            return BUSY_S
        return min(IDLE_S, self._ask_every_s())

    def _ask_every_s(self) -> float:
        scaling = self._given[1].scaling
        return ASK_EVERY_S if scaling.mode == "off" else min(ASK_EVERY_S, scaling.interval_s)

    def _read_wish(self) -> None:
        wish = self._store.wish()
        if wish is None or (self._wish is not None and wish.generation == self._wish.generation):
            return
        try:
            config = from_plain(wish.config)
        except ValueError as error:
            log.error("generation %d of the wish cannot be used: %s", wish.generation, error)
            return
        self._scaler.sizes_changed(self._wish.sizes if self._wish else {}, wish.sizes, self._clock())
        self._wish, self._config = wish, config
        self._want = self._wanted()

    @property
    def _given(self) -> tuple[Wish, ClusterConfig]:
        assert self._wish is not None, "a tick without a wish ends early"
        assert self._config is not None
        return self._wish, self._config

    def _wanted(self) -> reconcile.Want:
        wish, config = self._given
        pools: tuple[PoolName, ...] = ("decode",) if config.mode == "colocated" else reconcile.POOLS
        return reconcile.Want(
            sizes={pool: wish.sizes[pool] for pool in pools},
            routers=config.router.replicas,
            digests={kind: settings_digest(wish.config, kind, wish.turns.get(kind, 0)) for kind in KINDS},
            gpus={pool: gpus_of(self._plan(pool, pool)) for pool in pools},
            max_workers=config.scaling.max_workers,
            max_gpus=config.scaling.max_gpus,
            can_change_role=can_change_role(config),
        )

    def _plan_of(self, member: Member) -> WorkerPlan:
        return self._plan(member.born or "decode", member.member_id)

    def _plan(self, pool: PoolName, worker_id: str) -> WorkerPlan:
        return plan_worker(self._given[1], pool, worker_id, on_gpu=self._on_gpu)

    # What has come of what was begun.

    def _look(self) -> None:
        for member in list(self._members.values()):
            try:
                {
                    Phase.PLACING: self._look_at_placing,
                    Phase.STARTING: self._look_at_starting,
                    Phase.DRAINING: self._look_at_draining,
                    Phase.STOPPING: self._stop,
                }.get(member.phase, lambda _: None)(member)
            except ClusterStoreError:
                raise
            except Exception as error:
                if member.phase is Phase.STOPPING:
                    log.warning("not stopped yet: %s", explain(error), extra={"member": member.member_id})
                else:
                    self._failed(member, error)
        for member_id, (role, pending) in list(self._role_changes.items()):
            self._look_at_role(member_id, role, pending)

    def _look_at_placing(self, member: Member) -> None:
        scaling, plan = self._given[1].scaling, self._plan_of(member)
        if self._nodes.place(plan, list(self._members.values()), self._plan_of, scaling.max_nodes):
            self._enter(replace(member, phase=Phase.STARTING, num_ranks=len(plan.bundles) - 1))
        elif self._clock() > self._entered[member.member_id] + scaling.place_timeout_s:
            raise TimeoutError(f"{no_room(plan)}; waited {scaling.place_timeout_s:g} s")

    def _look_at_starting(self, member: Member) -> None:
        wish, config = self._given
        if member.member_id not in self._pending:
            plan = self._plan_of(member) if member.kind == "worker" else None
            self._pending[member.member_id] = self._hands.start(member, plan, wish.config)
        told = self._pending[member.member_id].poll()
        took_s = self._clock() - self._entered[member.member_id]
        if told is not None:
            self._failures.pop(member.pool or "router", None)
            if member.kind == "worker":
                self._scaler.started(took_s)
            with self._changed:
                self._told[member.member_id] = told
            self._enter(replace(member, phase=Phase.READY, why=""))
            self._note(f"{member.member_id} started", member.why, seconds=took_s)
        elif took_s > config.start_timeout_s:
            raise TimeoutError(f"it was not ready after {config.start_timeout_s:g} s")

    def _look_at_draining(self, member: Member) -> None:
        config, name = self._given[1], member.member_id
        drained: dict[str, Any] | None = None
        try:
            if name not in self._pending:
                self._pending[name] = self._hands.drain(member, config.drain_s, config.move_within(config.drain_s))
            drained = self._pending[name].poll()
        except Exception as error:
            drained = {"finished": False, "error": explain(error)}
        took_s = self._clock() - self._entered[name]
        if drained is None and took_s > config.drain_s + DRAIN_MARGIN_S:
            drained = {"finished": False, "error": f"it did not end within {took_s:.0f} s"}
        if drained is not None:
            how = "" if drained.get("finished", True) else f", not to its end: {drained.get('error', 'time was up')}"
            self._enter(replace(member, phase=Phase.STOPPING))
            self._note(f"{name} drained{how}", member.why, seconds=took_s)

    def _stop(self, member: Member) -> None:
        self._hands.remove(member)
        self._store.drop(member.member_id)
        with self._changed:
            del self._members[member.member_id]
            self._told.pop(member.member_id, None)
            self._changed.notify_all()
        self._forget(member.member_id)
        self._entered.pop(member.member_id, None)
        self._nodes.forget(member.member_id)
        log.info("stopped", extra={"member": member.member_id, "why": member.why})

    def _look_at_role(self, member_id: str, role: str, pending: Pending) -> None:
        try:
            told = pending.poll()
        except Exception as error:  # it is asked again when it next says that it has the old one
            log.warning("the role of %s was not changed: %s", member_id, explain(error))
            self._end_role_change(member_id)
            return
        if told is not None:
            self._end_role_change(member_id)
            member = self._members.get(member_id)
            self._note(f"{member_id} is {role} now", member.why if member else "")

    def _failed(self, member: Member, error: Exception) -> None:
        """A member that never served: it is stopped, and its like wait for a while."""
        why, kind = explain(error), member.pool or "router"
        before = self._failures.get(kind)
        count = before.count + 1 if before else 1
        pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (count - 1))
        self._failures[kind] = _Failure(why, count, self._clock() + pause_s)
        with self._changed:
            self._errors[member.member_id] = error
        log.error("did not start: %s", why, extra={"member": member.member_id})
        self._enter(replace(member, phase=Phase.STOPPING, why=f"it did not start: {why}"))
        self._note(f"{member.member_id} did not start", why, pause_s=pause_s)

    def _hear(self) -> None:
        """What members say of themselves: correct the role of who has another one than it should."""
        config, now = self._given[1], self._clock()
        ready = [member for member in self._members.values() if member.phase is Phase.READY]
        if not self._roll_call.hear(ready, self._ask_every_s(), now):
            return
        for member, status in self._roll_call.fronts(ready):
            is_settled = self._role_ended.get(member.member_id, float("-inf")) < self._roll_call.asked_at
            if is_settled and status.get("role") not in (None, self._role(member)):
                self._begin_role_change(member)
        if config.scaling.mode != "off":
            fronts = {member.member_id: status for member, status in self._roll_call.fronts(ready)}
            self._scaler.hear(self._roll_call.routers(ready), fronts, now)

    def _role(self, member: Member) -> str:
        return "both" if self._given[1].mode == "colocated" else member.pool

    def _begin_role_change(self, member: Member) -> None:
        role = self._role(member)
        self._role_ended[member.member_id] = float("inf")  # it goes on
        try:
            self._role_changes[member.member_id] = (role, self._hands.set_role(member, role))
        except Exception as error:
            log.warning("the role of %s was not changed: %s", member.member_id, explain(error))
            self._end_role_change(member.member_id)

    def _end_role_change(self, member_id: str) -> None:
        self._role_changes.pop(member_id, None)
        self._role_ended[member_id] = self._clock()

    def _act(self) -> None:
        want = self._want
        found = reconcile.plan(
            want, list(self._members.values()), load=self._roll_call.load(), held_back=self._held_back()
        )
        self._waiting = found.waiting
        for action in found.actions:
            log.info("begins: %s", action)
            self._enter(reconcile.after(action, self._members.get(action.member_id), want))
            if isinstance(action, reconcile.ChangeRole):
                self._begin_role_change(self._members[action.member_id])

    def _held_back(self) -> dict[str, str]:
        now = self._clock()
        return {
            kind: f"the last start failed ({failure.why}), again in {failure.until - now:.0f} s"
            for kind, failure in self._failures.items()
            if failure.until > now
        }

    def _scale(self) -> None:
        wish, config = self._given
        if config.scaling.mode == "off":
            self._scaler.advice = None
            return
        outcome = self._scaler.decide(
            wish.sizes, config, gpus=self._want.gpus, can_change_role=can_change_role(config), now=self._clock()
        )
        if outcome is None:
            return
        what = ", ".join(
            f"{pool} {wish.sizes[pool]} -> {size}" for pool, size in outcome.sizes.items() if size != wish.sizes[pool]
        )
        by = "autoscaler"
        decision = Decision(at=time.time(), by=by, what=what, reason=outcome.reason, details=dict(outcome.details))
        if config.scaling.mode == "advise":
            self._store.note(replace(decision, what=f"advises {what}"))
            return
        log.info("scales: %s", what, extra={"reason": outcome.reason})
        try:
            self._store.change(wish.generation, decision, sizes={**wish.sizes, **outcome.sizes})
        except WishChangedError as error:
            log.info("not scaled: %s", error)

    def _report(self) -> None:
        """Tell how things are, when that has changed and now and then."""
        wish, config = self._given
        settled = not self._role_changes and reconcile.is_settled(self._want, list(self._members.values()))
        report = {
            "state": "deployed",
            "generation": wish.generation,
            "settled": settled,
            "waiting": self._waiting + [f"{name} becomes {role}" for name, (role, _) in self._role_changes.items()],
            "mode": config.scaling.mode,
            "sizes": wish.sizes,
            "can_change_role": can_change_role(config),
            "advice": self._scaler.advice,
            "load": self._scaler.figures(),
        }
        now = self._clock()
        if report != self._reported or now >= self._reported_at + REPORT_EVERY_S:
            self._store.say(report, REPORT_TTL_S)
            self._reported, self._reported_at = report, now

    def _enter(self, member: Member) -> None:
        """A member comes into being, or into another phase or pool."""
        known = self._members.get(member.member_id)
        if known is None or known.phase is not member.phase:
            member = replace(member, since=time.time())
            self._entered[member.member_id] = self._clock()
            self._forget(member.member_id)
        self._store.put(member)
        with self._changed:
            self._members[member.member_id] = member
            if known is None:
                self._errors.pop(member.member_id, None)
            self._changed.notify_all()

    def _forget(self, member_id: str) -> None:
        for book in (self._pending, self._role_changes, self._role_ended):
            book.pop(member_id, None)

    def _note(self, what: str, reason: str, **figures: float) -> None:
        details = {name: round(value, 3) for name, value in figures.items()}
        self._store.note(Decision(at=time.time(), by="controller", what=what, reason=reason, details=details))
