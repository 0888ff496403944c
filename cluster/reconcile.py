"""What the controller is to do next, so that what is there becomes what is wanted: a pure function, no Ray.

`plan` looks at a moment's members and gives the actions that can begin now, and why others wait. It is called again and
again; what it says depends on nothing else. Its order of business, for each pool:

1. A surplus goes: members that are not ready yet first, then those with the least to do. Where the other pool lacks one
   and the two are compatible, a ready worker changes its role instead.
2. What is missing is started, as far as the budget has room. The budget counts every worker that is not gone, those
   that stop included: so it holds in the middle of a change, whichever half of it fails.
3. Members with settings of old are replaced one at a time: the new one first where the budget has room for one more,
   else an old one goes first; never the last that serves.

Routers have fixed ports, so an old one goes before its successor comes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from cluster.members import Member, Phase, PoolName

ALIVE = (Phase.PLACING, Phase.STARTING, Phase.READY)
POOLS: tuple[PoolName, PoolName] = ("prefill", "decode")


@dataclass(frozen=True, kw_only=True, slots=True)
class Want:
    """What is wanted, and what it costs."""

    sizes: Mapping[PoolName, int]
    """Workers by pool; a pool that is not named has none."""
    routers: int
    digests: Mapping[str, str]
    """Of the settings that a member is to have: by pool, and of `router`."""
    gpus: Mapping[PoolName, float] = field(default_factory=dict)
    """GPUs of a new worker."""
    max_workers: int | None = None
    max_gpus: float | None = None
    can_change_role: bool = False


@dataclass(frozen=True, slots=True)
class Start:
    """Make a new member, in a pool or (empty) as a router."""

    member_id: str
    pool: PoolName | None
    why: str


@dataclass(frozen=True, slots=True)
class Drain:
    """Let a member end its work, then stop it."""

    member_id: str
    why: str


@dataclass(frozen=True, slots=True)
class Cancel:
    """Stop a member that never served."""

    member_id: str
    why: str


@dataclass(frozen=True, slots=True)
class ChangeRole:
    """Have a worker do the other pool's work."""

    member_id: str
    pool: PoolName
    why: str


Action = Start | Drain | Cancel | ChangeRole


@dataclass(frozen=True, slots=True)
class Plan:
    """What can begin now, and in words what cannot or is under way."""

    actions: list[Action]
    waiting: list[str]


def plan(
    want: Want,
    members: Sequence[Member],
    *,
    load: Mapping[str, float] | None = None,
    held_back: Mapping[str, str] | None = None,
) -> Plan:
    """See the module.

    `load`: what each worker has to do; `held_back`: why a pool, or `router`, may start nothing now.
    """
    return _Planner(want, members, load or {}, held_back or {}).plan()


class _Planner:
    """Works on a copy of the members, which each action changes as it will when it has begun."""

    def __init__(
        self, want: Want, members: Sequence[Member], load: Mapping[str, float], held_back: Mapping[str, str]
    ) -> None:
        self._want = want
        self._members = {member.member_id: member for member in members}
        self._load = load
        self._held_back = held_back
        self._actions: list[Action] = []
        self._waiting = [
            f"{member.member_id} is {member.phase.value}{f': {member.why}' if member.why else ''}"
            for member in members
            if member.phase is not Phase.READY
        ]

    def plan(self) -> Plan:
        for pool in POOLS:
            self._cancel_old(pool)
        self._change_roles()
        for pool in POOLS:
            self._shrink(pool)
        for pool in POOLS:
            self._grow(pool)
        for pool in POOLS:
            self._replace(pool)
        self._routers()
        return Plan(self._actions, self._waiting)

    def _in(self, pool: PoolName, *phases: Phase) -> list[Member]:
        return [member for member in self._members.values() if member.pool == pool and member.phase in phases]

    def _is_old(self, member: Member) -> bool:
        return member.digest != self._want.digests[member.born or "router"]

    def _surplus(self, pool: PoolName) -> int:
        """Members too many; one more than wanted is none while an old one is being replaced."""
        alive = self._in(pool, *ALIVE)
        size = self._want.sizes.get(pool, 0)
        replacing = 1 if size and any(map(self._is_old, alive)) else 0
        return len(alive) - size - replacing

    def _cancel_old(self, pool: PoolName) -> None:
        """What does not serve yet and has settings of old need not go on."""
        for member in self._in(pool, Phase.PLACING, Phase.STARTING):
            if self._is_old(member):
                self._do(Cancel(member.member_id, "its settings have changed meanwhile"))

    def _change_roles(self) -> None:
        if not self._want.can_change_role:
            return
        for giver, taker in (POOLS, POOLS[::-1]):
            while len(self._in(giver, *ALIVE)) > self._want.sizes.get(giver, 0) and self._lacks(taker):
                ready = self._in(giver, Phase.READY)
                if len(ready) <= self._want.sizes.get(giver, 0):
                    break
                there = [member for member in ready if member.born == taker] or ready  # settings of its own pool
                self._do(
                    ChangeRole(self._idlest(there).member_id, taker, f"{giver} has one too many, {taker} lacks one")
                )

    def _lacks(self, pool: PoolName) -> bool:
        return len(self._in(pool, *ALIVE)) < self._want.sizes.get(pool, 0)

    def _shrink(self, pool: PoolName) -> None:
        size = self._want.sizes.get(pool, 0)
        while self._surplus(pool) > 0:
            coming = self._in(pool, Phase.PLACING, Phase.STARTING)
            if coming:
                self._do(Cancel(coming[-1].member_id, f"{pool} is to have {size}"))
            else:
                ready = self._in(pool, Phase.READY)
                old = [member for member in ready if self._is_old(member)]
                self._do(Drain(self._idlest(old or ready).member_id, f"{pool} is to have {size}"))

    def _grow(self, pool: PoolName) -> None:
        size = self._want.sizes.get(pool, 0)
        while self._lacks(pool):
            if problem := self._cannot_start(pool):
                self._waiting.append(f"{pool} lacks {size - len(self._in(pool, *ALIVE))}: {problem}")
                return
            self._start(pool, f"{pool} is to have {size}")

    def _replace(self, pool: PoolName) -> None:
        """One step of a rolling replacement, if all others of the pool serve."""
        size = self._want.sizes.get(pool, 0)
        ready = self._in(pool, Phase.READY)
        old = [member for member in ready if self._is_old(member)]
        if not old or self._in(pool, Phase.PLACING, Phase.STARTING, Phase.DRAINING, Phase.STOPPING):
            return
        why = "its settings have changed"
        if len(ready) > size:
            self._do(Drain(self._idlest(old).member_id, why))
        elif not (problem := self._cannot_start(pool)):
            self._start(pool, f"{old[0].member_id} is to be replaced: {why}")
        elif len(ready) > 1 and pool not in self._held_back:
            self._do(Drain(self._idlest(old).member_id, f"{why}; {problem}"))
        else:
            self._waiting.append(f"{old[0].member_id} is to be replaced: {why}; {problem}")

    def _cannot_start(self, pool: PoolName) -> str:
        """Why no worker of this pool can be started now; empty: one can."""
        if pool in self._held_back:
            return self._held_back[pool]
        want, workers = self._want, [member for member in self._members.values() if member.kind == "worker"]
        if want.max_workers is not None and len(workers) + 1 > want.max_workers:
            return f"{len(workers)} workers of a budget of {want.max_workers} are there"
        gpus, more = sum(member.gpus for member in workers), want.gpus.get(pool, 0.0)
        if want.max_gpus is not None and more and gpus + more > want.max_gpus + 1e-6:
            return f"it needs {more:g} GPUs, and {gpus:g} of a budget of {want.max_gpus:g} are in use"
        return ""

    def _routers(self) -> None:
        there = {member.member_id: member for member in self._members.values() if member.kind == "router"}
        wanted = [f"router-{index}" for index in range(self._want.routers)]
        for member in there.values():
            if member.member_id not in wanted and member.phase in ALIVE:
                self._end(member, f"{self._want.routers} routers are wanted")
        for name in wanted:
            if name not in there:
                if "router" in self._held_back:
                    self._waiting.append(f"{name} is missing: {self._held_back['router']}")
                else:
                    self._do(Start(name, None, f"{self._want.routers} routers are wanted"))
        present = [member for member in self._members.values() if member.kind == "router"]
        old = [member for member in present if member.phase in ALIVE and self._is_old(member)]
        if old and all(member.phase is Phase.READY or member in old for member in present):
            self._end(old[0], "its settings have changed")

    def _end(self, member: Member, why: str) -> None:
        self._do(Drain(member.member_id, why) if member.phase is Phase.READY else Cancel(member.member_id, why))

    def _start(self, pool: PoolName, why: str) -> None:
        numbers = (f"{pool}-{number}" for number in range(len(self._members) + 1))
        self._do(Start(next(name for name in numbers if name not in self._members), pool, why))

    def _idlest(self, members: Sequence[Member]) -> Member:
        return min(members, key=lambda member: (self._load.get(member.member_id, 0.0), member.member_id))

    def _do(self, action: Action) -> None:
        self._actions.append(action)
        self._members[action.member_id] = after(action, self._members.get(action.member_id), self._want)


def after(action: Action, member: Member | None, want: Want) -> Member:
    """The member once an action has begun."""
    if isinstance(action, Start):
        pool = action.pool
        return Member(
            member_id=action.member_id,
            kind="router" if pool is None else "worker",
            pool=pool or "",
            born=pool or "",
            phase=Phase.STARTING if pool is None else Phase.PLACING,
            digest=want.digests[pool or "router"],
            gpus=want.gpus.get(pool, 0.0) if pool else 0.0,
            why=action.why,
        )
    assert member is not None, "only a start has no member yet"
    if isinstance(action, ChangeRole):
        return replace(member, pool=action.pool, why=action.why)
    return replace(member, phase=Phase.DRAINING if isinstance(action, Drain) else Phase.STOPPING, why=action.why)


def is_settled(want: Want, members: Sequence[Member]) -> bool:
    """Whether all that is wanted is there, as it is wanted, and nothing else."""
    counts = {pool: sum(member.pool == pool for member in members) for pool in POOLS}
    return (
        all(member.phase is Phase.READY for member in members)
        and all(counts[pool] == want.sizes.get(pool, 0) for pool in POOLS)
        and sum(member.kind == "router" for member in members) == want.routers
        and all(member.digest == want.digests[member.born or "router"] for member in members)
    )
