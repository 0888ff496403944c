"""Tickets that decode workers have brought before their prompts came, and those that come too late.

A ticket is kept until its prompt comes, its router ends the request or goes, or it expires. One that is brought behind
the end of its request is dropped: a request of the same name may have begun anew, and has another ticket. All of this
only saves time, for the router's own copy of a ticket comes behind the prompt in any case.
"""

from __future__ import annotations

import time
from collections import OrderedDict

from kv_transfer.handshake import Identity
from kv_transfer.ticket import KVTicket

MAX_KEPT = 1024
"""Most tickets, and most ends of requests, that are remembered; the oldest go first."""
ENDED_S = 10.0
"""How long the end of a request is remembered: longer than a ticket needs over a pair."""

Key = tuple[str, int]
"""request_id and attempt."""


class EarlyTickets:
    """Those of one prefill worker; the engine loop's thread calls everything."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Key, tuple[KVTicket, float]] = OrderedDict()
        """With the moment when each expires."""
        self._ended: OrderedDict[str, tuple[int, float]] = OrderedDict()
        """Requests that were ended: up to which attempt, and until when that is remembered."""

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, ticket: KVTicket) -> None:
        """Keep a ticket whose prompt has not come."""
        now = time.monotonic()
        if self.is_over(ticket):
            return
        while self._kept and (len(self._kept) >= MAX_KEPT or next(iter(self._kept.values()))[1] <= now):
            self._kept.popitem(last=False)
        key = (ticket.request_id, ticket.attempt)
        self._kept.pop(key, None)
        self._kept[key] = (ticket, now + ticket.expires_in_s)

    def take(self, owner: str, receiver: Identity, key: Key) -> KVTicket | None:
        """The ticket for a prompt of that router, if that worker has brought one."""
        ticket, expires_at = self._kept.pop(key, (None, 0.0))
        if ticket is None or expires_at <= time.monotonic() or ticket.owner != owner:
            return None
        return ticket if Identity(ticket.worker_id, ticket.epoch) == receiver else None

    def is_over(self, ticket: KVTicket) -> bool:
        """Whether its request was ended a moment ago."""
        attempt, until = self._ended.get(ticket.request_id, (-1, 0.0))
        return ticket.attempt <= attempt and time.monotonic() < until

    def drop(self, request_id: str, attempt: int) -> None:
        """A request is over, up to this attempt."""
        for key in [key for key in self._kept if key[0] == request_id and key[1] <= attempt]:
            del self._kept[key]
        now = time.monotonic()
        while self._ended and (len(self._ended) >= MAX_KEPT or next(iter(self._ended.values()))[1] <= now):
            self._ended.popitem(last=False)
        self._ended.pop(request_id, None)
        self._ended[request_id] = (attempt, now + ENDED_S)

    def drop_owner(self, owner: str) -> None:
        """A router is gone."""
        for key in [key for key, (ticket, _) in self._kept.items() if ticket.owner == owner]:
            del self._kept[key]
