"""The transfers of a worker with several ranks, seen from rank 0: one ticket, one verdict.

Each rank has a node of its own and its own pairs. Rank 0 decides and orders (`RankOrder`), the others obey
(`rank_transfer`) and report. A ticket is DELIVERED when every rank's part is; the first part that ends otherwise
ends the rest, and the owner of the blocks hears of it when the last part has ended, for only then does nothing
write to (or read from) them on any rank.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

from kv_transfer.context import PairInfo, TransferStats
from kv_transfer.errors import TicketError, TransferError
from kv_transfer.fan_out import OnSettled, Outlet
from kv_transfer.layout import KVLayout
from kv_transfer.node import TransferNode
from kv_transfer.staging import SlotIds
from kv_transfer.ticket import KVTicket, ReceivedKV, SendResult, TicketGrant, TicketState
from protos.transfer_pb2 import (
    NodeStart,
    NodeStop,
    RankEnd,
    RankGrant,
    RankMeet,
    RankOrder,
    RankReport,
    RankSend,
    RankTicketEnded,
)
from protos.worker_pb2 import TokenOutput, WorkerIdentity

_log = logging.getLogger(__name__)

RANK_START_S = 30.0
"""Bound of the wait for the other ranks' listeners."""
RANK_STOP_S = 15.0
"""Bound of the wait for the other ranks' tickets to end."""


class Transfers(Protocol):
    """What the crafts ask of a node or a group of them; see `TransferNode`."""

    def open_send(self, ticket: KVTicket, on_settled: OnSettled) -> Outlet:
        """Begin sending under a ticket."""

    def grant(self, grant: TicketGrant) -> KVTicket:
        """Give leave to write into blocks."""

    def abort(self, ticket_id: str, reason: str) -> bool:
        """End a granted ticket."""

    def tell_granted(self, worker_id: str, epoch: int, ticket: KVTicket) -> None:
        """Bring a ticket to the worker that is to send under it."""

    def renew(self, owner: str) -> None:
        """Let an owner's leases run anew."""

    def call_later(self, delay_s: float, call: Callable[[], None]) -> None:
        """Have a transfer thread make a call."""


@dataclass(slots=True)
class _Parts:
    """The parts of a ticket that have not ended, by rank."""

    open: set[int]
    finish: Callable[[_Parts], None]
    """Called once with these parts, when the last has ended."""
    cancel: Callable[[str], None]
    """Ends the parts that are open."""
    state: TicketState = TicketState.DELIVERED
    reason: str = ""
    received: list[ReceivedKV] = field(default_factory=list)


class TransferGroup:
    """Rank 0's node and the orders to the others. Methods may be called from any thread and do not block."""

    def __init__(self, node: TransferNode, num_ranks: int, order: Callable[[bytes], None]) -> None:
        """`order` brings a message to every other rank, in order with the steps."""
        self._node = node
        self._num_ranks = num_ranks
        self._send_order = order
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._addresses: dict[int, str] = {}
        self._error: str | None = None
        self._granted: dict[str, _Parts] = {}
        self._sending: dict[str, _Parts] = {}

    def start(self) -> None:
        """Start every rank's node; TransferError if one does not start in time, and then none is left started."""
        try:
            self._start()
        except TransferError:
            self.stop()
            raise

    def _start(self) -> None:
        self._order(start=NodeStart(identity=self._node.identity.to_proto()))
        address = self._node.start()
        with self._changed:
            self._addresses[0] = address
            everybody = self._changed.wait_for(
                lambda: self._error is not None or len(self._addresses) == self._num_ranks, RANK_START_S
            )
            if self._error is not None or not everybody:
                missing = sorted(set(range(self._num_ranks)) - set(self._addresses))
                raise TransferError(self._error or f"ranks {missing} did not listen within {RANK_START_S:g} s")

    def stop(self) -> None:
        """End this epoch on every rank; what was open has ended when this returns."""
        self._order(stop=NodeStop())
        self._node.stop()
        with self._changed:
            all_ended = self._changed.wait_for(lambda: not (self._granted or self._sending), RANK_STOP_S)
        if not all_ended:
            _log.error("the other ranks did not end their transfers within %g s", RANK_STOP_S)

    # -- sending

    def open_send(self, ticket: KVTicket, on_settled: OnSettled) -> Outlet:
        """Begin sending under a ticket from every rank; `on_settled` is called once, when all have ended."""
        ticket_id = ticket.ticket_id

        def finish(parts: _Parts) -> None:
            on_settled(SendResult(ticket_id, parts.state, parts.reason))

        outlet = _GroupOutlet(self, ticket_id)
        parts = _Parts(set(range(self._num_ranks)), finish, outlet.abort)
        self._enter(self._sending, ticket_id, parts)
        self._order(open_send=RankSend(ticket=ticket.to_proto()))  # before there can be an abort, which must follow it
        try:
            outlet.local = self._node.open_send(ticket, partial(self._send_part_settled, 0))
        except TransferError as error:
            with self._lock:
                del self._sending[ticket_id]
            self.abort_send(ticket_id, str(error))
            raise
        with self._lock:
            failure = parts.reason if parts.state is not TicketState.DELIVERED else None
        if failure is not None:  # another rank's part ended before this one's was there
            outlet.local.abort(failure)
        return outlet

    def meet(self, worker_id: str, epoch: int, addresses: Sequence[str], layout: KVLayout) -> None:
        """Make every rank's pairs to a worker ahead of the first ticket."""
        worker = WorkerIdentity(worker_id=worker_id, epoch=epoch)
        self._order(meet=RankMeet(worker=worker, control_addresses=addresses, layout=layout.to_proto()))
        self._node.meet(worker_id, epoch, addresses, layout)

    def finish_send(self, ticket_id: str) -> None:
        """The other ranks have heard of all there is to push."""
        self._order(finish_send=ticket_id)

    def abort_send(self, ticket_id: str, reason: str) -> None:
        """The other ranks give the ticket up."""
        self._order(abort_send=RankEnd(ticket_id=ticket_id, reason=reason))

    # -- receiving

    def grant(self, grant: TicketGrant) -> KVTicket:
        """Give leave to write into blocks on every rank; TicketError if the grant cannot be right."""
        parts = _Parts(
            set(range(self._num_ranks)),
            finish=partial(self._grant_ended, grant),
            cancel=partial(self._end_everywhere, grant.ticket_id),
        )
        self._enter(self._granted, grant.ticket_id, parts)
        local = replace(
            grant,
            on_ready=lambda received: self._part_ended(self._granted, grant.ticket_id, 0, received=received),
            on_end=lambda state, reason: self._part_ended(self._granted, grant.ticket_id, 0, state, reason),
        )
        try:
            ticket = self._node.grant(local)
        except TransferError:
            with self._lock:
                del self._granted[grant.ticket_id]
            raise
        self._order(
            grant=RankGrant(
                ticket_id=grant.ticket_id,
                request_id=grant.request_id,
                attempt=grant.attempt,
                block_ids=grant.block_ids,
                first_token=grant.first_token,
                num_tokens=grant.num_tokens,
            )
        )
        return replace(ticket, control_addresses=self.addresses)

    def tell_granted(self, worker_id: str, epoch: int, ticket: KVTicket) -> None:
        """Bring a ticket to the worker that is to send under it; its rank 0 and this one have a pair."""
        self._node.tell_granted(worker_id, epoch, ticket)

    @property
    def addresses(self) -> tuple[str, ...]:
        """host:port of each rank's control listener."""
        return tuple(self._addresses[rank] for rank in range(self._num_ranks))

    def renew(self, owner: str) -> None:
        """Let an owner's leases run anew; the other ranks' tickets have none of their own."""
        self._node.renew(owner)

    def call_later(self, delay_s: float, call: Callable[[], None]) -> None:
        """Have a transfer thread make a call, unless the group stops before."""
        self._node.call_later(delay_s, call)

    def abort(self, ticket_id: str, reason: str) -> bool:
        """End a granted ticket on every rank; False if it was not open."""
        with self._lock:
            parts = self._granted.get(ticket_id)
            if parts is None or parts.state is not TicketState.DELIVERED:
                return False
            parts.state, parts.reason = TicketState.ABORTED, reason
        self._end_everywhere(ticket_id, reason)
        return True

    # -- looking in

    def stats(self) -> TransferStats:
        """Rank 0's own."""
        return self._node.stats()

    def pair_infos(self) -> list[PairInfo]:
        """Rank 0's own."""
        return self._node.pair_infos()

    def check_integrity(self, idle: bool = False) -> None:
        """As of rank 0's node."""
        self._node.check_integrity(idle)

    def hear(self, rank: int, payload: bytes) -> None:
        """Take in a report of another rank; from any thread."""
        report = RankReport.FromString(payload)
        kind = report.WhichOneof("report")
        if kind == "started":
            if report.started.epoch != self._node.identity.epoch:
                return  # the answer to a start that was given up
            with self._changed:
                if report.started.error:
                    self._error = f"rank {rank}: {report.started.error}"
                self._addresses[rank] = report.started.address
                self._changed.notify_all()
        elif kind == "ticket_ended":
            ended = report.ticket_ended
            state = TicketState(ended.state)
            received = _received(ended) if state is TicketState.DELIVERED else None
            self._part_ended(self._granted, ended.ticket_id, rank, state, ended.reason, received)
        elif kind == "send_settled":
            settled = report.send_settled
            result = SendResult(settled.ticket_id, TicketState(settled.state), settled.reason)
            self._send_part_settled(rank, result)

    # -- inside

    def _enter(self, book: dict[str, _Parts], ticket_id: str, parts: _Parts) -> None:
        with self._lock:
            if ticket_id in book:
                raise TicketError(f"ticket {ticket_id} is open already")
            book[ticket_id] = parts

    def _order(self, **order: Any) -> None:
        self._send_order(RankOrder(**order).SerializeToString())

    def _end_everywhere(self, ticket_id: str, reason: str) -> None:
        self._order(end=RankEnd(ticket_id=ticket_id, reason=reason))
        self._node.abort(ticket_id, reason)

    def _send_part_settled(self, rank: int, result: SendResult) -> None:
        self._part_ended(self._sending, result.ticket_id, rank, result.state, result.reason)

    def _part_ended(
        self,
        book: dict[str, _Parts],
        ticket_id: str,
        rank: int,
        state: TicketState = TicketState.DELIVERED,
        reason: str = "",
        received: ReceivedKV | None = None,
    ) -> None:
        with self._lock:
            parts = book.get(ticket_id)
            if parts is None or rank not in parts.open:
                return
            parts.open.discard(rank)
            if received is not None:
                parts.received.append(received)
            cancel = state is not TicketState.DELIVERED and parts.state is TicketState.DELIVERED
            if cancel:
                parts.state = state
                parts.reason = f"rank {rank}: {reason}" if rank else reason
            is_last = not parts.open
        if is_last:
            parts.finish(parts)
            with self._changed:
                del book[ticket_id]
                self._changed.notify_all()
        elif cancel:
            parts.cancel(parts.reason)
        elif rank == 0 and received is not None:  # its lease is over, and the other ranks' tickets have none
            self._node.call_later(self._node.lease_s, partial(self._end_late, ticket_id))

    def _end_late(self, ticket_id: str) -> None:
        """End a ticket whose other parts did not follow rank 0's within a lease."""
        with self._lock:
            parts = self._granted.get(ticket_id)
            if parts is None or parts.state is not TicketState.DELIVERED:
                return
            missing = sorted(parts.open)
            parts.state = TicketState.EXPIRED
            parts.reason = f"the KV of ranks {missing} did not come within {self._node.lease_s:g} s of rank 0's"
        self._end_everywhere(ticket_id, parts.reason)

    @staticmethod
    def _grant_ended(grant: TicketGrant, parts: _Parts) -> None:
        if parts.state is TicketState.DELIVERED:
            grant.on_ready(_together(parts.received))
        else:
            grant.on_end(parts.state, parts.reason)


class _GroupOutlet:
    """What rank 0 pushes goes to its own pairs; the other ranks push when the step's note tells them."""

    def __init__(self, group: TransferGroup, ticket_id: str) -> None:
        self._group = group
        self._ticket_id = ticket_id
        self.local: Outlet | None = None

    def push(self, first_layer: int, num_layers: int, first_token: int, slot_ids: SlotIds, after: Any = None) -> None:
        """Push on rank 0."""
        self._own.push(first_layer, num_layers, first_token, slot_ids, after)

    def finish(self, first: TokenOutput | None) -> None:
        """Finish on every rank."""
        self._own.finish(first)
        self._group.finish_send(self._ticket_id)

    def abort(self, reason: str) -> None:
        """Abort on every rank."""
        self._group.abort_send(self._ticket_id, reason)
        if self.local is not None:
            self.local.abort(reason)

    def layers_at_once(self, num_tokens: int) -> int:
        """As this rank's own part says."""
        return self._own.layers_at_once(num_tokens)

    def must_pause(self, on_room: Callable[[], None]) -> bool:
        """Whether rank 0's pairs are behind; the others' are about as fast."""
        return self._own.must_pause(on_room)

    @property
    def _own(self) -> Outlet:
        assert self.local is not None, "set when it was opened"
        return self.local


def _received(ended: RankTicketEnded) -> ReceivedKV:
    return ReceivedKV(ended.ticket_id, None, ended.busy_s, ended.num_bytes, 0.0, last_home=ended.last_home)


def _together(parts: Sequence[ReceivedKV]) -> ReceivedKV:
    """All ranks' parts as one: the bytes of all, the time of the slowest."""
    own = next(part for part in parts if part.first is not None)
    last_home = max(part.last_home for part in parts)
    return replace(
        own,
        num_bytes=sum(part.num_bytes for part in parts),
        busy_s=max(part.busy_s for part in parts),
        last_home=last_home,
        tail_s=max(0.0, last_home - own.computed_at),
    )
