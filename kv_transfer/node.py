"""The transfer of one engine process: what it sends, what it receives, behind one object.

Life: made -> `start` (listens) -> `stop` (everything aborted, every thread gone). The decode side
calls `grant`, `renew` and `abort`, the prefill side `open_send`; a node does both at once. Outgoing
pairs are made on first use and kept until they fail or idle; incoming ones belong to `peers`.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

from kv_transfer.config import TransferConfig
from kv_transfer.context import Counters, NodeContext, PairInfo, TransferStats, means_of
from kv_transfer.errors import PairError, TransferIntegrityError
from kv_transfer.fan_out import FanOut, Outlet
from kv_transfer.handshake import Handshake, Identity, Receiver
from kv_transfer.jobs import SendJob
from kv_transfer.layout import KVLayout
from kv_transfer.ledger import TicketLedger
from kv_transfer.peers import PeerTable
from kv_transfer.sender import SenderPair
from kv_transfer.staging import KVMemory
from kv_transfer.ticket import KVTicket, SendResult, TicketGrant, TicketState
from kv_transfer.timers import Janitor

_log = logging.getLogger(__name__)
PairKey = tuple[str, int, str]
"""worker_id, epoch, address."""


def _key(receiver: Receiver) -> PairKey:
    return (receiver.identity.worker_id, receiver.identity.epoch, receiver.address)


def _receivers(ticket: KVTicket) -> list[Receiver]:
    identity = Identity(ticket.worker_id, ticket.epoch)
    return [
        Receiver(identity, address, ticket.layout.of_rank(rank))
        for rank, address in enumerate(ticket.control_addresses)
    ]


class TransferNode:
    """Both ends of KV transfer for one engine process. Methods may be called from any thread and do not block."""

    def __init__(
        self,
        *,
        worker_id: str,
        epoch: int,
        layout: KVLayout,
        memory: KVMemory,
        config: TransferConfig,
        secret: bytes,
    ) -> None:
        if not secret:
            raise ValueError("secret must not be empty: pairs prove themselves with it")
        identity = Identity(worker_id, epoch)
        self._janitor = Janitor(f"kv-janitor {identity}")
        self._context = NodeContext(
            identity=identity,
            layout=layout,
            memory=memory,
            config=config,
            handshake=Handshake(identity, layout, config, means_of(memory, config), secret),
            ledger=TicketLedger(layout, self._janitor, config.ticket_lease_s),
            janitor=self._janitor,
            counters=Counters(),
        )
        self.identity = identity
        self.on_granted: Callable[[KVTicket], None] = lambda ticket: None
        """Gets the tickets that receivers bring by themselves, on a transfer thread; must not block."""
        self._peers = PeerTable(self._context)
        self._lock = threading.Lock()
        self._outgoing: dict[PairKey, SenderPair] = {}
        self._alive: set[SenderPair] = set()
        self._attempts = itertools.count(1)
        self._address = ""
        self._stopped = False

    @property
    def addresses(self) -> tuple[str, ...]:
        """host:port of the control listener, as a ticket names it."""
        return (self._address,)

    @property
    def lease_s(self) -> float:
        """How long a ticket lasts that nobody renews."""
        return self._context.config.ticket_lease_s

    def call_later(self, delay_s: float, call: Callable[[], None]) -> None:
        """Have a transfer thread make a call, unless the node stops before."""
        self._janitor.call_at(time.monotonic() + delay_s, call)

    def start(self) -> str:
        """Bind the control listener to a free port; returns host:port, or raises TransferError."""
        self._address = self._peers.start()
        self._janitor.start()
        return self._address

    def stop(self) -> None:
        """Abort everything and end every thread; bounded by the timeouts of the configuration. Idempotent."""
        config = self._context.config
        with self._lock:
            if self._stopped:
                return
            self._stopped = True
            pairs = list(self._alive)
        reason = f"worker {self._context.identity} stops"
        self._context.ledger.stop(reason)
        for pair in pairs:
            pair.close(reason)
        self._peers.stop(reason)
        deadline = time.monotonic() + config.connect_timeout_s + 2 * config.peer_timeout_s
        ended = [pair.join(deadline) for pair in pairs]
        ended.append(self._peers.join(deadline))
        ended.append(self._janitor.stop(config.peer_timeout_s))
        if not all(ended):
            _log.error("threads of %s did not end in time", self._context.identity)

    # -- sending

    def open_send(self, ticket: KVTicket, on_settled: Callable[[SendResult], None]) -> Outlet:
        """Begin sending under a ticket, over the pairs to the ranks that take heads of this one (made where missing).

        `on_settled` is called exactly once, from a transfer thread, when nothing reads this side's
        KV for the ticket any more; it must not block. A ticket that cannot be used is ABORTED there too;
        PairError if this node has stopped, TicketError if the ticket is being sent already.
        """
        layout = self._context.layout
        objections = layout.differences(ticket.layout)
        if len(ticket.control_addresses) != ticket.layout.tp_size:
            objections.append(f"{len(ticket.control_addresses)} addresses for {ticket.layout.tp_size} ranks")
        if objections:
            job = SendJob(ticket, on_settled, self._janitor, 1)
            job.settle(TicketState.ABORTED, f"no pair with {ticket.worker_id}: {'; '.join(objections)}")
            return job
        receivers = [receiver for receiver in _receivers(ticket) if layout.slices_to(receiver.layout)]
        if not receivers:  # copies of these heads on another rank of this worker are sent
            job = SendJob(ticket, on_settled, self._janitor, 1)
            job.settle(TicketState.DELIVERED, "")
            return job
        if len(receivers) == 1:
            return self._open_job(receivers[0], ticket, on_settled)
        return FanOut(ticket, [partial(self._open_job, receiver, ticket) for receiver in receivers], on_settled)

    def meet(self, worker_id: str, epoch: int, addresses: Sequence[str], layout: KVLayout) -> None:
        """Make the pairs to a worker's ranks ahead of the first ticket, as far as the cap leaves room: none is closed.

        One that cannot be made is made on use.
        """
        context = self._context
        if context.layout.differences(layout) or len(addresses) != layout.tp_size:
            return
        for rank, address in enumerate(addresses):
            receiver = Receiver(Identity(worker_id, epoch), address, layout.of_rank(rank))
            if context.layout.slices_to(receiver.layout):
                with self._lock:
                    has_room = len(self._outgoing) < context.config.max_pairs
                    if has_room and not self._stopped and _key(receiver) not in self._outgoing:
                        self._new_pair(receiver)

    def _open_job(self, receiver: Receiver, ticket: KVTicket, on_settled: Callable[[SendResult], None]) -> SendJob:
        """The part of a ticket that goes to one rank."""
        context = self._context
        place_bytes = len(receiver.heads_from(context.layout).heads) * context.layout.bytes_per_head
        max_places = max(1, context.piece_bytes // place_bytes)
        by_piece = context.memory.device.type == "cuda"  # there each event that a push waits for delays what computes
        job = SendJob(ticket, on_settled, self._janitor, max_places, by_piece=by_piece)
        with self._lock:
            if self._stopped:
                raise PairError(f"worker {context.identity} has stopped: nothing can be sent")
            pair = self._outgoing.get(_key(receiver))
            if pair is None or not pair.adopt(job):
                self._new_pair(receiver, job)
        return job

    def _new_pair(self, receiver: Receiver, job: SendJob | None = None) -> None:
        """Make a pair, with its first job if there is one; the lock is held."""
        self._make_room()
        pair = SenderPair(
            self._context,
            receiver,
            next(self._attempts),
            on_closed=self._forget,
            on_granted=lambda ticket: self.on_granted(ticket),
        )
        self._outgoing[_key(receiver)] = pair
        self._alive.add(pair)
        if job is not None:
            pair.adopt(job)
        pair.start()

    def _make_room(self) -> None:
        """Keep one more pair within the cap: close those that idled longest, as far as any idle."""
        num_over = len(self._outgoing) + 1 - self._context.config.max_pairs
        for pair in sorted(self._outgoing.values(), key=lambda pair: pair.idle_since):
            if num_over > 0 and pair.retire():
                del self._outgoing[_key(pair.receiver)]
                num_over -= 1

    def _forget(self, pair: SenderPair) -> None:
        with self._lock:
            self._alive.discard(pair)
            key = _key(pair.receiver)
            if self._outgoing.get(key) is pair:
                del self._outgoing[key]

    # -- receiving

    def grant(self, grant: TicketGrant) -> KVTicket:
        """Give leave to write into blocks, until the lease ends; TicketError if the grant cannot be right."""
        context = self._context
        context.ledger.grant(grant)
        return KVTicket(
            ticket_id=grant.ticket_id,
            request_id=grant.request_id,
            attempt=grant.attempt,
            worker_id=context.identity.worker_id,
            epoch=context.identity.epoch,
            control_addresses=(self._address,),
            block_ids=grant.block_ids,
            first_token=grant.first_token,
            num_tokens=grant.num_tokens,
            layout=context.layout,
            expires_in_s=context.config.ticket_lease_s,
            owner=grant.owner,
        )

    def tell_granted(self, worker_id: str, epoch: int, ticket: KVTicket) -> None:
        """Bring a ticket to the worker that is to send under it, if it has a pair to this node."""
        self._peers.tell_granted(worker_id, epoch, ticket)

    def renew(self, owner: str) -> None:
        """Let the leases of all tickets of an owner (a router) run anew."""
        self._context.ledger.renew(owner)

    def abort(self, ticket_id: str, reason: str) -> bool:
        """End a granted ticket; its on_end follows once no write is under way. False if it was not open."""
        return self._context.ledger.end(ticket_id, TicketState.ABORTED, reason)

    # -- looking in

    def stats(self) -> TransferStats:
        """Counters, and what is open now."""
        with self._lock:
            pairs = list(self._alive)
        return self._context.counters.read(
            open_tickets=self._context.ledger.num_open,
            open_sends=sum(pair.num_jobs for pair in pairs),
            pairs=len(pairs) + self._peers.num_pairs,
        )

    def pair_infos(self) -> list[PairInfo]:
        """Every pair, outgoing ones first."""
        with self._lock:
            pairs = list(self._alive)
        return [*(pair.info for pair in pairs), *self._peers.infos()]

    def check_integrity(self, idle: bool = False) -> None:
        """Raise TransferIntegrityError if an invariant is broken; `idle`: also if any ticket or job is open."""
        self._context.ledger.check_integrity(idle)
        with self._lock:
            strays = [key for key, pair in self._outgoing.items() if pair not in self._alive]
            pairs = list(self._alive)
        if strays:
            raise TransferIntegrityError(f"pairs {strays} are in use but not alive")
        if idle and (num_jobs := sum(pair.num_jobs for pair in pairs)):
            raise TransferIntegrityError(f"{num_jobs} send jobs are open on an idle node")
