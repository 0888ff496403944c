"""What the controller does to Ray: begin things, and look whether they are done; nothing here waits.

`RayHands` makes, asks and removes actors through `cluster.pool`; tests use a double without Ray.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Protocol

import ray
from ray.exceptions import RayError

from cluster import pool
from cluster.members import Member
from cluster.placement import WorkerPlan

SET_ROLE_TIMEOUT_S = 10.0


class Pending(Protocol):
    """Something that has begun."""

    def poll(self) -> dict[str, Any] | None:
        """What came of it; None while it goes on. Raises what it failed with."""


class Hands(Protocol):
    """See the module. Calls are idempotent: a controller that was restarted begins everything again."""

    def place(self, plan: WorkerPlan) -> str | None:
        """Ask for a worker's place; the node that it is on, once it is there."""

    def start(self, member: Member, plan: WorkerPlan | None, config: dict[str, Any]) -> Pending:
        """Make a member's processes, for a worker in its place; done when it serves."""

    def drain(self, member: Member, timeout_s: float, move_after_s: float) -> Pending:
        """Have a member end its work; done when it has, or when its time is over."""

    def set_role(self, member: Member, role: str) -> Pending:
        """Have a worker do another pool's work."""

    def remove(self, member: Member) -> None:
        """End a member's processes and give its place back."""

    def ask(self, members: list[Member], timeout_s: float) -> Pending:
        """What each member says of itself, by id: fronts their status, routers their load; silent ones are left out."""


class RayHands:
    """The real ones."""

    def __init__(self, classes: pool.ActorClasses, run_dir: str, redis_url: str) -> None:
        self._classes = classes
        self._run_dir = run_dir
        self._redis_url = redis_url

    def place(self, plan: WorkerPlan) -> str | None:
        """Ask for a worker's place; the node that it is on, once it is there."""
        pool.ask_place(plan)
        return pool.node_of(plan.worker_id)

    def start(self, member: Member, plan: WorkerPlan | None, config: dict[str, Any]) -> Pending:
        """Make a member's processes, for a worker in its place; done when it serves."""
        around = pool.Surroundings(config=config, run_dir=self._run_dir, redis_url=self._redis_url)
        if plan is None:
            router = pool.create_router(member.member_id, self._classes, around)
            return _First([router.ready.remote()])
        worker = pool.create_worker(plan, self._classes, around)
        return _First([worker.front.ready.remote(), *(engine.ready.remote() for engine in worker.engines)])

    def drain(self, member: Member, timeout_s: float, move_after_s: float) -> Pending:
        """Have a member end its work; done when it has, or when its time is over."""
        if member.kind == "router":
            return _First([_actor(member).drain.remote(timeout_s)])
        return _First([_actor(member).drain.remote(timeout_s, move_after_s)])

    def set_role(self, member: Member, role: str) -> Pending:
        """Have a worker do another pool's work."""
        return _First([_actor(member).set_role.remote(role, SET_ROLE_TIMEOUT_S)])

    def remove(self, member: Member) -> None:
        """End a member's processes and give its place back."""
        if member.kind == "router":
            pool.remove_actor(member.member_id)
        else:
            pool.remove_worker(member.member_id, member.num_ranks)

    def ask(self, members: list[Member], timeout_s: float) -> Pending:
        """What each member says of itself, by id: fronts their status, routers their load; silent ones are left out."""
        refs: dict[str, Any] = {}
        for member in members:
            try:
                actor = _actor(member)
            except ValueError:
                continue
            refs[member.member_id] = (actor.load if member.kind == "router" else actor.status).remote()
        return _All(refs, timeout_s)


class _First:
    """Done when all refs are; tells what the first one gave. The first error ends it."""

    def __init__(self, refs: list[Any]) -> None:
        self._first = refs[0]
        self._left = refs

    def poll(self) -> dict[str, Any] | None:
        """See Pending."""
        done, self._left = ray.wait(self._left, num_returns=len(self._left), timeout=0)
        for ref in done:
            ray.get(ref)
        return None if self._left else dict(ray.get(self._first))


class _All:
    """Done when all refs are, or the time is over; leaves out what failed or is silent."""

    def __init__(self, refs: Mapping[str, Any], timeout_s: float) -> None:
        self._refs = refs
        self._until = time.monotonic() + timeout_s

    def poll(self) -> dict[str, Any] | None:
        """See Pending."""
        if not self._refs:
            return {}
        done, left = ray.wait(list(self._refs.values()), num_returns=len(self._refs), timeout=0)
        if left and time.monotonic() < self._until:
            return None
        answered = set(done)
        answers: dict[str, Any] = {}
        for name, ref in self._refs.items():
            if ref in answered:
                try:
                    answers[name] = ray.get(ref)
                except RayError:
                    continue
        return answers


def _actor(member: Member) -> Any:
    """A member's actor, or a worker's front; ValueError if there is none."""
    actor = pool.find_speaker(member)
    if actor is None:
        raise ValueError(f"{member.member_id} has no process that could be asked")
    return actor
