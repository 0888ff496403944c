"""Who of those that wait goes first, and how much is ahead of whom. A structure without clocks, futures or workers.

    priority class (lower first) -> fair shares of its tenants, by tokens -> a tenant's earliest deadline

Fair shares are start-time fair queueing (Goyal, Vin, Cheng 1996): each tenant has a tag, which grows with each of its
requests that goes by the tokens of the request over the tenant's weight; the least tag is next. A tenant that
comes back starts where the others are, so that nobody saves up a claim and nobody pays for what it had while no other
wanted it. Those marked as first go before all others of their class, by arrival.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar


@dataclass(frozen=True, slots=True)
class Claim:
    """What a request's standing depends on."""

    priority: int = 0
    """Lower goes first, whatever else."""
    tenant: str = "default"
    num_tokens: int = 1
    """Of its prompt, and of the answer that is expected."""
    deadline: float = float("inf")
    """When it must have ended, on the line's clock."""
    admit_by: float = float("inf")
    """When it must have its place at the latest, to be of use; on the line's clock."""
    for_slo: bool = False
    """Whether that is for the time to its first token, rather than for its deadline."""


class Waiting(Protocol):
    """Something that waits."""

    @property
    def claim(self) -> Claim:
        """Its standing, which does not change."""

    @property
    def number(self) -> int:
        """Of its arrival; no two are alike."""


W = TypeVar("W", bound=Waiting)


class _Tenant(Generic[W]):
    """What waits of one tenant, in one class."""

    def __init__(self, weight: float, tag: float) -> None:
        self.weight = weight
        self.tag = tag
        self.items: list[W] = []
        self.num_tokens = 0

    def add(self, item: W) -> None:
        bisect.insort(self.items, item, key=_by_deadline)
        self.num_tokens += item.claim.num_tokens

    def remove(self, item: W) -> None:
        self.items.remove(item)
        self.num_tokens -= item.claim.num_tokens

    def tokens_before(self, tag: float) -> float:
        """Tokens of those of its requests that start at a lower tag."""
        if not self.items or self.tag > tag:
            return 0.0
        return min(self.num_tokens, max(self.items[0].claim.num_tokens, (tag - self.tag) * self.weight))


class _Class(Generic[W]):
    """What waits of one priority."""

    def __init__(self, weight_of: Callable[[str], float]) -> None:
        self.first: list[W] = []
        self._weight_of = weight_of
        self._tenants: dict[str, _Tenant[W]] = {}
        self._virtual = 0.0
        """The tag at which the latest one started."""

    def tenant(self, name: str) -> _Tenant[W]:
        """A tenant's share; one that has nothing here begins where the others are."""
        tenant = self._tenants.get(name)
        if tenant is None:
            tenant = self._tenants[name] = _Tenant(self._weight_of(name), self._virtual)
        elif not tenant.items:
            tenant.tag = max(tenant.tag, self._virtual)
        return tenant

    def charge(self, claim: Claim) -> None:
        """One of a tenant's requests goes."""
        tenant = self.tenant(claim.tenant)
        self._virtual = max(self._virtual, tenant.tag)
        tenant.tag += claim.num_tokens / tenant.weight
        if not tenant.items:
            self._forget_idle()

    def remove(self, item: W) -> None:
        """Take one out."""
        if item in self.first:
            self.first.remove(item)
            return
        self._tenants[item.claim.tenant].remove(item)
        self._forget_idle()

    def head(self) -> W | None:
        """Who is next."""
        if self.first:
            return self.first[0]
        active = [tenant for tenant in self._tenants.values() if tenant.items]
        best = min(active, key=lambda tenant: (tenant.tag, _by_deadline(tenant.items[0])), default=None)
        return best.items[0] if best is not None else None

    def num_tokens(self) -> int:
        """Of all that wait here."""
        return _total(self.first) + sum(tenant.num_tokens for tenant in self._tenants.values())

    def tokens_ahead(self, name: str, index: int | None, deadline: float) -> float:
        """Tokens that go before a tenant's request: the one at an index of its own, or one that is still to come."""
        own = self._tenants.get(name)
        weight, tag, before = (own.weight, own.tag, 0.0) if own is not None else (1.0, self._virtual, 0.0)
        if own is not None and own.items:
            place = bisect.bisect_right(own.items, (deadline, float("inf")), key=_by_deadline)
            before = own.num_tokens * (place if index is None else index) / len(own.items)
        tag = max(tag, self._virtual) + before / weight
        others = sum(tenant.tokens_before(tag) for tenant in self._tenants.values() if tenant is not own)
        return _total(self.first) + before + others

    def items(self) -> Iterator[W]:
        """All that wait here, in no particular order."""
        yield from self.first
        for tenant in self._tenants.values():
            yield from tenant.items

    def position(self, item: W) -> int:
        """How many of its own tenant's are before one that is not marked as first."""
        return bisect.bisect_left(self._tenants[item.claim.tenant].items, _by_deadline(item), key=_by_deadline)

    def _forget_idle(self) -> None:
        """Those that would begin anew just where they are."""
        for name in [
            name for name, tenant in self._tenants.items() if not tenant.items and tenant.tag <= self._virtual
        ]:
            del self._tenants[name]


class FairQueue(Generic[W]):
    """All that wait."""

    def __init__(self, weight_of: Callable[[str], float] = lambda tenant: 1.0) -> None:
        self._weight_of = weight_of
        self._classes: dict[int, _Class[W]] = {}
        self._num_of: dict[str, int] = {}
        self._len = 0

    def __len__(self) -> int:
        return self._len

    def __iter__(self) -> Iterator[W]:
        for group in self._classes.values():
            yield from group.items()

    def num_of(self, tenant: str) -> int:
        """How many of a tenant's wait."""
        return self._num_of.get(tenant, 0)

    def add(self, item: W, *, first: bool = False) -> None:
        """Let it wait; `first`: before all others of its class but those marked so before."""
        claim = item.claim
        group = self._classes.get(claim.priority)
        if group is None:
            group = self._classes[claim.priority] = _Class(self._weight_of)
        if first:
            bisect.insort(group.first, item, key=lambda other: other.number)
        else:
            group.tenant(claim.tenant).add(item)
        self._len += 1
        self._num_of[claim.tenant] = self.num_of(claim.tenant) + 1

    def remove(self, item: W) -> None:
        """It waits no more. When nobody of its class does, what was had of the class's shares is forgotten."""
        group = self._classes[item.claim.priority]
        group.remove(item)
        if next(group.items(), None) is None:  # clients choose priorities: none may stay behind
            del self._classes[item.claim.priority]
        self._len -= 1
        self._num_of[item.claim.tenant] -= 1
        if not self._num_of[item.claim.tenant]:
            del self._num_of[item.claim.tenant]

    def mark_first(self, item: W) -> None:
        """From here on it goes before all others of its class."""
        group = self._classes[item.claim.priority]
        if item not in group.first:
            group.remove(item)
            bisect.insort(group.first, item, key=lambda other: other.number)

    def charge(self, claim: Claim) -> None:
        """A request that waits goes: its tenant has had so much."""
        self._classes[claim.priority].charge(claim)

    def head(self) -> W | None:
        """Who is next."""
        for priority in sorted(self._classes):
            if (head := self._classes[priority].head()) is not None:
                return head
        return None

    def num_tokens(self) -> int:
        """Of all that wait."""
        return sum(group.num_tokens() for group in self._classes.values())

    def tokens_before(self, claim: Claim) -> float:
        """Tokens that would go before a request that came now; of the claim its size does not matter."""
        group = self._classes.get(claim.priority)
        own = group.tokens_ahead(claim.tenant, None, claim.deadline) if group is not None else 0.0
        return self._tokens_above(claim.priority) + own

    def tokens_ahead_of(self, item: W) -> float:
        """Tokens that go before one that waits."""
        group, claim = self._classes[item.claim.priority], item.claim
        above = self._tokens_above(claim.priority)
        if item in group.first:
            return above + _total(group.first[: group.first.index(item)])
        return above + group.tokens_ahead(claim.tenant, group.position(item), claim.deadline)

    def _tokens_above(self, priority: int) -> int:
        return sum(group.num_tokens() for other, group in self._classes.items() if other < priority)


def _by_deadline(item: Waiting) -> tuple[float, float]:
    return (item.claim.deadline, item.number)


def _total(items: list[W]) -> int:
    return sum(item.claim.num_tokens for item in items)
