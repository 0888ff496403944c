"""A world without Ray for the controller's mind: members start, drain and fail when the test says so."""

from __future__ import annotations

from typing import Any

from cluster.hands import Pending
from cluster.members import Member
from cluster.node_budget import NODE_ID
from cluster.placement import WorkerPlan


class Step:
    """Something that has begun; ends when it is told how."""

    def __init__(self) -> None:
        self.outcome: dict[str, Any] | Exception | None = None

    def poll(self) -> dict[str, Any] | None:
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


class FakeHands:
    """Everything succeeds at once, but what is named in `stuck` or `broken`."""

    def __init__(self, room: int = 100) -> None:
        self.room = room
        """Workers that there are places for."""
        self.free_nodes = [f"node-{number // 2}" for number in range(100)]
        """Each has room for two workers."""
        self.placed: dict[str, str] = {}
        self.roles: dict[str, str] = {}
        self.alive: dict[str, Member] = {}
        self.stuck: set[tuple[str, str]] = set()
        """(what, member id) that has begun and does not end, such as ("drain", "decode-0")."""
        self.broken: dict[tuple[str, str], Exception] = {}
        """The same, that fails."""
        self.log: list[tuple[str, str]] = []
        self.most_workers = 0
        self.loads: dict[str, int] = {}
        self.unremovable = False

    def place(self, plan: WorkerPlan) -> str | None:
        if plan.worker_id not in self.placed and len(self.placed) < self.room:
            allowed = plan.labels.get(NODE_ID, "").removeprefix("in(").removesuffix(")").split(",")
            nodes = [node for node in self.free_nodes if allowed == [""] or node in allowed]
            if not nodes:
                return None
            self.free_nodes.remove(nodes[0])
            self.placed[plan.worker_id] = nodes[0]
            self.most_workers = max(self.most_workers, len(self.placed))
        return self.placed.get(plan.worker_id)

    def start(self, member: Member, plan: WorkerPlan | None, config: dict[str, Any]) -> Pending:
        assert plan is None or plan.worker_id in self.placed
        self.alive[member.member_id] = member
        self.roles.setdefault(member.member_id, member.pool)
        return self._begin("start", member, {"address": f"{member.member_id}:1"})

    def drain(self, member: Member, timeout_s: float, move_after_s: float) -> Pending:
        return self._begin("drain", member, {"finished": True})

    def set_role(self, member: Member, role: str) -> Pending:
        step = self._begin("role", member, {"role": role})
        if isinstance(step.outcome, dict):
            self.roles[member.member_id] = role
        return step

    def remove(self, member: Member) -> None:
        if self.unremovable:
            raise ConnectionError("Ray is away")
        self.log.append(("remove", member.member_id))
        if node := self.placed.pop(member.member_id, None):
            self.free_nodes.append(node)
        self.alive.pop(member.member_id, None)
        self.roles.pop(member.member_id, None)

    def ask(self, members: list[Member], timeout_s: float) -> Pending:
        step = Step()
        step.outcome = {
            member.member_id: {} if member.kind == "router" else self._status(member.member_id)
            for member in members
            if member.member_id in self.alive
        }
        return step

    def _status(self, name: str) -> dict[str, Any]:
        return {"role": self.roles[name], "stats": {"num_running": self.loads.get(name, 0)}}

    def _begin(self, what: str, member: Member, outcome: dict[str, Any]) -> Step:
        self.log.append((what, member.member_id))
        step = Step()
        if (what, member.member_id) not in self.stuck:
            step.outcome = self.broken.get((what, member.member_id), outcome)
        return step
