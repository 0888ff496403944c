"""Keeps the workers on no more nodes than the budget allows: who would open one too many is kept to those in use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from cluster.hands import Hands
from cluster.members import Member, Phase
from cluster.placement import WorkerPlan

NODE_ID = "ray.io/node-id"
"""Ray's own label of every node."""


class NodeBudget:
    """Knows where each worker has its place, as far as that was asked."""

    def __init__(self, hands: Hands) -> None:
        self._hands = hands
        self._nodes: dict[str, str] = {}
        self._opening: set[str] = set()
        """Workers that wait for a place on whatever node."""
        self._labels: dict[str, dict[str, str]] = {}
        """What a worker's place was first asked with: later it cannot be changed."""

    def place(
        self, plan: WorkerPlan, members: Sequence[Member], plan_of: Callable[[Member], WorkerPlan], limit: int | None
    ) -> bool:
        """Ask for a worker's place, within `limit` nodes; whether it has it."""
        name = plan.worker_id
        if limit is not None and name not in self._labels:
            used = self._used(members, plan_of)
            if used and len(used) + len(self._opening) >= limit:
                self._labels[name] = {**plan.labels, NODE_ID: f"in({','.join(used)})"}
            elif len(self._opening) >= limit:
                return False
            else:
                self._labels[name] = plan.labels
                self._opening.add(name)
        node = self._hands.place(replace(plan, labels=self._labels.get(name, plan.labels)))
        if node is not None:
            self._nodes[name] = node
            self._opening.discard(name)
        return node is not None

    def forget(self, worker_id: str) -> None:
        """A worker has given its place back."""
        self._nodes.pop(worker_id, None)
        self._labels.pop(worker_id, None)
        self._opening.discard(worker_id)

    def _used(self, members: Sequence[Member], plan_of: Callable[[Member], WorkerPlan]) -> list[str]:
        """The nodes that have workers; those that an earlier life of the controller placed are asked for."""
        placed = [member for member in members if member.kind == "worker" and member.phase is not Phase.PLACING]
        for member in placed:
            node = self._nodes.get(member.member_id) or self._hands.place(plan_of(member))
            if node is not None:
                self._nodes[member.member_id] = node
        return sorted(set(self._nodes.values()))
