"""The members of a cluster, as its controller knows them: every worker and router, and where each is in its life.

    PLACING --Ray found a node--> STARTING --serves--> READY --unwanted, or replaced--> DRAINING --> STOPPING --> (gone)
       '------no node, or it failed------'---------------------------------------------------------'

The controller alone changes them; they outlive it in Redis (`cluster_store.py`).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, Literal

PoolName = Literal["prefill", "decode"]
Kind = Literal["worker", "router"]


class Phase(enum.Enum):
    """Where a member is in its life."""

    PLACING = "placing"
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPING = "stopping"


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One worker or router that the controller made, or is about to make."""

    member_id: str
    kind: Kind
    pool: PoolName | Literal[""]
    """Whose work a worker does now; empty: a router."""
    born: PoolName | Literal[""]
    """Whose settings it was started with."""
    phase: Phase
    digest: str
    """Of the settings it was started with."""
    gpus: float = 0.0
    """GPUs that it reserves in all."""
    num_ranks: int = 1
    """Engine processes of a worker."""
    since: float = 0.0
    """When it came into its phase, Unix time."""
    why: str = ""
    """Why it is in its phase, for people to read."""

    def to_plain(self) -> dict[str, Any]:
        """As JSON can say it."""
        return {**{name: getattr(self, name) for name in self.__dataclass_fields__}, "phase": self.phase.value}

    @classmethod
    def from_plain(cls, data: dict[str, Any]) -> Member:
        """The inverse of `to_plain`."""
        return cls(**{**data, "phase": Phase(data["phase"])})
