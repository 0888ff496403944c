"""The receiver's book of open tickets: who may write where, until when, and how each ends.

States as in `ticket`. `grant` opens a ticket; the data thread of the pair that brings the first piece of some
heads becomes their holder and alone writes them, between `begin_write` and `end_write`. With unequal tensor
parallelism several pairs hold one ticket, each for other heads. Whoever ends a ticket meanwhile (an abort, the
lease, a lost peer) only marks it; the writes in progress finish first, and the end is told after them. Ended
tickets are remembered for a while, so that a late piece or question gets the true verdict.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from kv_transfer.errors import TicketError, TransferIntegrityError
from kv_transfer.layout import KVLayout
from kv_transfer.staging import SlotIds, slots_of
from kv_transfer.ticket import ReceivedKV, TicketGrant, TicketState
from kv_transfer.timers import Janitor, run_safely
from protos.transfer_pb2 import PieceAnnounced
from protos.worker_pb2 import TokenOutput

_MAX_REMEMBERED = 4096
GRANT_WAIT_S = 1.0
"""How long a rank other than 0 waits, once a ticket, for the word that it was granted, when KV comes before it. Well
below the time after which the sender, whose other pieces wait meanwhile, takes this end for lost."""


@dataclass(frozen=True, slots=True)
class SlotWrite:
    """Where a piece goes."""

    grant: TicketGrant
    first_token: int
    num_tokens: int
    block_size: int

    @property
    def key(self) -> tuple[str, int, int]:
        """Writes with equal keys go to the same slots."""
        return (self.grant.ticket_id, self.first_token, self.num_tokens)

    @property
    def after(self) -> Any:
        """The event that the write must come after; None: it may come now."""
        return self.grant.after

    @property
    def is_free(self) -> bool:
        """Whether that event has come."""
        return self.after is None or bool(self.after.query())

    @property
    def slot_ids(self) -> SlotIds:
        """Where each of the tokens goes."""
        first = self.first_token - self.grant.first_token
        return slots_of(self.grant.block_ids, self.block_size, first, self.num_tokens)


class Holder(Protocol):
    """A pair that a ticket's KV comes over."""

    @property
    def heads(self) -> range:
        """The heads that come over it, in this rank's numbering."""

    def tell_settled(self, ticket_id: str, state: TicketState, reason: str) -> None:
        """Tell the sender how its ticket ended; must not block."""


@dataclass(slots=True, eq=False)
class _Ticket:
    """An open ticket."""

    grant: TicketGrant
    expires_at: float
    missing: int
    """(layer, token, head) places whose KV is not home."""
    state: TicketState = TicketState.RESERVED
    holders: list[Holder] = field(default_factory=list)
    num_complete: int = 0
    """Heads whose holder has said that all was announced."""
    first: TokenOutput | None = None
    computed_at: float = 0.0
    """When the first token was computed, on the monotonic clock."""
    home: dict[tuple[int, int], int] = field(default_factory=dict)
    """(layer, a holder's first head) -> bit t set: token first_token + t is home, or being written."""
    num_writing: int = 0
    doom: tuple[TicketState, str] | None = None
    """How it ends once the write in progress is over."""
    busy_s: float = 0.0
    num_bytes: int = 0
    last_home: float = 0.0


class TicketLedger:
    """All open tickets of one node; every method may be called from any thread and none blocks."""

    def __init__(self, layout: KVLayout, janitor: Janitor, lease_s: float) -> None:
        self._layout = layout
        self._janitor = janitor
        self._lease_s = lease_s
        self._lock = threading.Lock()
        self._granted = threading.Condition(self._lock)
        self._open: dict[str, _Ticket] = {}
        self._blocks: set[int] = set()
        self._ended: OrderedDict[str, tuple[TicketState, str]] = OrderedDict()
        self._alarm_set = False
        self._stopped: str | None = None

    @property
    def num_open(self) -> int:
        """Tickets that have not ended."""
        return len(self._open)

    # -- for the owner of the blocks

    def grant(self, grant: TicketGrant) -> None:
        """Open a ticket; TicketError if its blocks or its name cannot be right."""
        self._check_grant(grant)
        with self._lock:
            if self._stopped is not None:
                raise TicketError(f"nothing can be granted: {self._stopped}")
            if grant.ticket_id in self._open or grant.ticket_id in self._ended:
                raise TicketError(f"ticket {grant.ticket_id} was granted before: a ticket's name is used once")
            if shared := self._blocks.intersection(grant.block_ids):
                raise TicketError(f"blocks {sorted(shared)} belong to another open ticket")
            self._blocks.update(grant.block_ids)
            missing = self._num_places(grant)
            self._open[grant.ticket_id] = _Ticket(grant, time.monotonic() + self._lease_s, missing)
            self._granted.notify_all()
            self._set_alarm()

    def renew(self, owner: str) -> None:
        """Let the leases of all tickets of an owner run anew from now."""
        with self._lock:
            expires_at = time.monotonic() + self._lease_s
            for ticket in self._open.values():
                if ticket.grant.owner == owner:
                    ticket.expires_at = expires_at

    def end(self, ticket_id: str, state: TicketState, reason: str) -> bool:
        """End a ticket that is open; False if it is not, or is ending already."""
        with self._lock:
            ticket = self._open.get(ticket_id)
            if ticket is None or ticket.doom is not None:
                return False
            self._end(ticket, state, reason)
            return True

    def stop(self, reason: str) -> None:
        """Abort every ticket, and grant nothing any more."""
        with self._lock:
            self._stopped = reason
        self.end_all(reason)

    def end_all(self, reason: str) -> None:
        """Abort every ticket."""
        with self._lock:
            for ticket in list(self._open.values()):
                if ticket.doom is None:
                    self._end(ticket, TicketState.ABORTED, reason)

    # -- for the pairs' data threads

    def begin_write(self, holder: Holder, piece: PieceAnnounced) -> SlotWrite | None:
        """Where a piece goes; None if it must be dropped.

        After places were given, end_write must follow. A piece that does not fit its ticket ends the ticket.
        """
        with self._lock:
            ticket = self._held(holder, piece.ticket_id)
            if ticket is None:
                return None
            if objection := self._objection(ticket, holder, piece):
                self._end(ticket, TicketState.ABORTED, objection)
                return None
            ticket.state = TicketState.RECEIVING
            mask, first_head = self._mask(ticket, piece), holder.heads.start
            for layer in range(piece.first_layer, piece.first_layer + piece.num_layers):
                ticket.home[layer, first_head] = ticket.home.get((layer, first_head), 0) | mask
            ticket.num_writing += 1
            return SlotWrite(ticket.grant, piece.first_token, piece.num_tokens, self._layout.block_size)

    def end_write(self, piece: PieceAnnounced, num_heads: int, busy_s: float, failure: str | None = None) -> None:
        """The write of a piece is over; `failure` says why it did not succeed."""
        with self._lock:
            ticket = self._open[piece.ticket_id]
            ticket.num_writing -= 1
            ticket.busy_s += busy_s
            ticket.num_bytes += piece.num_bytes
            ticket.last_home = time.monotonic()
            ticket.missing -= piece.num_layers * piece.num_tokens * num_heads
            if failure is not None and ticket.doom is None:
                ticket.doom = (TicketState.ABORTED, failure)
            if ticket.doom is not None and not ticket.num_writing:
                self._close(ticket, *ticket.doom)

    def complete(self, holder: Holder, ticket_id: str, first: TokenOutput | None, computed_at: float) -> None:
        """A sender has announced everything, and all of it was handled: abort if KV is missing, deliver with the last.

        `first` comes from rank 0 to rank 0 alone.
        """
        with self._lock:
            ticket = self._held(holder, ticket_id)
            if ticket is None:
                return
            if objection := self._incomplete(ticket, holder, first):
                self._end(ticket, TicketState.ABORTED, objection)
                return
            ticket.num_complete += len(holder.heads)
            if first is not None:
                ticket.first, ticket.computed_at = first, computed_at
            if ticket.num_complete < self._layout.num_local_heads:
                return
            if ticket.missing:
                self._end(ticket, TicketState.ABORTED, "a sender said twice that all of its part was announced")
                return
            self._close(ticket, TicketState.DELIVERED, "")
        tail_s = max(0.0, ticket.last_home - ticket.computed_at) if ticket.first is not None else 0.0
        received = ReceivedKV(
            ticket_id, ticket.first, ticket.busy_s, ticket.num_bytes, tail_s, ticket.computed_at, ticket.last_home
        )
        run_safely(partial(ticket.grant.on_ready, received), "on_ready")

    # -- invariants

    def check_integrity(self, idle: bool) -> None:
        """Raise TransferIntegrityError if the book contradicts itself, or is not empty when idle."""
        with self._lock:
            owned = [block for ticket in self._open.values() for block in ticket.grant.block_ids]
            if len(owned) != len(set(owned)) or set(owned) != self._blocks:
                raise TransferIntegrityError(
                    f"blocks {sorted(owned)} of open tickets, but {sorted(self._blocks)} booked"
                )
            if self._open and not self._alarm_set:
                raise TransferIntegrityError("tickets are open and nobody watches their leases")
            for ticket in self._open.values():
                self._check_ticket(ticket)
            if idle and self._open:
                raise TransferIntegrityError(f"tickets {sorted(self._open)} are open on an idle node")

    def _check_ticket(self, ticket: _Ticket) -> None:
        grant = ticket.grant
        places = self._num_places(grant)
        widths = {holder.heads.start: len(holder.heads) for holder in ticket.holders}
        claimed = sum(mask.bit_count() * widths[first_head] for (_, first_head), mask in ticket.home.items())
        if not ticket.num_writing and claimed + ticket.missing != places:
            raise TransferIntegrityError(
                f"ticket {grant.ticket_id}: {claimed} places home and {ticket.missing} missing make not {places}"
            )
        if ticket.state not in (TicketState.RESERVED, TicketState.RECEIVING):
            raise TransferIntegrityError(f"ticket {grant.ticket_id} is open in state {ticket.state.value}")

    def _check_grant(self, grant: TicketGrant) -> None:
        block_size = self._layout.block_size
        if grant.first_token < 0 or grant.first_token % block_size:
            raise TicketError(f"first_token must be a multiple of the block size {block_size}, got {grant.first_token}")
        if grant.num_tokens <= grant.first_token:
            raise TicketError(f"no token to receive in [{grant.first_token}, {grant.num_tokens})")
        needed = -(-(grant.num_tokens - grant.first_token) // block_size)
        if len(grant.block_ids) != needed:
            raise TicketError(f"{needed} blocks are needed for the tokens, got {len(grant.block_ids)}")
        if len(set(grant.block_ids)) != needed or min(grant.block_ids) < 0:
            raise TicketError(f"block ids must be distinct and not negative, got {list(grant.block_ids)}")

    # -- below, the lock is held

    def _held(self, holder: Holder, ticket_id: str) -> _Ticket | None:
        """The open ticket, now held by that pair; None if it ends or has ended, and its sender is told the verdict."""
        if self._layout.tp_rank > 0:  # rank 0 grants, and its word may still be on the way
            self._granted.wait_for(lambda: ticket_id in self._open or ticket_id in self._ended, GRANT_WAIT_S)
        ticket = self._open.get(ticket_id)
        if ticket is None:
            if ticket_id not in self._ended and self._layout.tp_rank > 0:
                self._remember(ticket_id, TicketState.ABORTED, "no such ticket")  # its next piece does not wait again
            state, reason = self._ended.get(ticket_id, (TicketState.ABORTED, "no such ticket"))
            holder.tell_settled(ticket_id, state, reason)
            return None
        if holder not in ticket.holders:
            taken = {head for other in ticket.holders for head in other.heads}
            if not taken.isdisjoint(holder.heads):
                holder.tell_settled(ticket_id, TicketState.ABORTED, "another pair brings this ticket's KV")
                return None
            ticket.holders.append(holder)
        return ticket if ticket.doom is None else None

    def _incomplete(self, ticket: _Ticket, holder: Holder, first: TokenOutput | None) -> str | None:
        """Why a holder cannot have sent all of its part."""
        grant = ticket.grant
        wanted = (1 << (grant.num_tokens - grant.first_token)) - 1
        homes = [ticket.home.get((layer, holder.heads.start), 0) for layer in range(self._layout.num_layers)]
        if missing := sum((wanted & ~home).bit_count() for home in homes):
            return f"KV of {missing} (layer, token) places never came"
        if first is not None and first.request_id != grant.request_id:
            return f"the first token is of request {first.request_id}, the ticket of {grant.request_id}"
        if first is None and self._layout.tp_rank == 0 and holder.heads.start == 0:
            return "the first token never came"
        return None

    def _num_places(self, grant: TicketGrant) -> int:
        return (grant.num_tokens - grant.first_token) * self._layout.num_layers * self._layout.num_local_heads

    def _objection(self, ticket: _Ticket, holder: Holder, piece: PieceAnnounced) -> str | None:
        grant, layout = ticket.grant, self._layout
        tokens = f"tokens [{piece.first_token}, {piece.first_token + piece.num_tokens})"
        layers = f"layers [{piece.first_layer}, {piece.first_layer + piece.num_layers})"
        if piece.num_tokens < 1 or piece.num_layers < 1:
            return f"an empty piece: {tokens} of {layers}"
        if piece.first_token < grant.first_token or piece.first_token + piece.num_tokens > grant.num_tokens:
            return f"{tokens} are outside the ticket's [{grant.first_token}, {grant.num_tokens})"
        if piece.first_layer < 0 or piece.first_layer + piece.num_layers > layout.num_layers:
            return f"{layers} are outside the model's [0, {layout.num_layers})"
        num_bytes = piece.num_layers * piece.num_tokens * len(holder.heads) * layout.bytes_per_head
        if piece.num_bytes != num_bytes:
            return f"{tokens} of {layers} are {num_bytes} bytes, {piece.num_bytes} came"
        mask, first_head = self._mask(ticket, piece), holder.heads.start
        if any(
            ticket.home.get((layer, first_head), 0) & mask
            for layer in range(piece.first_layer, piece.first_layer + piece.num_layers)
        ):
            return f"{tokens} of {layers} came twice"
        return None

    @staticmethod
    def _mask(ticket: _Ticket, piece: PieceAnnounced) -> int:
        return ((1 << piece.num_tokens) - 1) << (piece.first_token - ticket.grant.first_token)

    def _end(self, ticket: _Ticket, state: TicketState, reason: str) -> None:
        if ticket.num_writing:
            ticket.doom = (state, reason)
        else:
            self._close(ticket, state, reason)

    def _close(self, ticket: _Ticket, state: TicketState, reason: str) -> None:
        ticket.state = state
        grant = ticket.grant
        del self._open[grant.ticket_id]
        self._blocks.difference_update(grant.block_ids)
        self._remember(grant.ticket_id, state, reason)
        for holder in ticket.holders:
            holder.tell_settled(grant.ticket_id, state, reason)
        if state is not TicketState.DELIVERED:
            self._janitor.call_soon(partial(grant.on_end, state, reason))

    def _remember(self, ticket_id: str, state: TicketState, reason: str) -> None:
        self._ended[ticket_id] = (state, reason)
        if len(self._ended) > _MAX_REMEMBERED:
            self._ended.popitem(last=False)

    def _set_alarm(self) -> None:
        """Have the leases looked at when the first of them may end."""
        if self._open and not self._alarm_set:
            self._alarm_set = True
            self._janitor.call_at(min(ticket.expires_at for ticket in self._open.values()), self._expire)

    def _expire(self) -> None:
        with self._lock:
            self._alarm_set = False
            now = time.monotonic()
            for ticket in [ticket for ticket in self._open.values() if ticket.expires_at <= now]:
                if ticket.doom is None:
                    self._end(ticket, TicketState.EXPIRED, f"nobody renewed the lease for {self._lease_s:g} s")
            self._set_alarm()
