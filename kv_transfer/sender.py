"""The sending end of a pair: takes what jobs push, gathers it, announces it, sends it.

States: CONNECTING (dial, handshake, data channel, self-test) -> READY -> CLOSED. A refusal, a lost peer, a failed
transfer, idleness and the node's stop lead to CLOSED; nothing leads back: the next ticket makes a new
pair, and one that joined before the loss was noticed is LOST with the others. Two threads: the data
thread connects and is the only one that gathers; the control thread hears verdicts and heartbeats, and
ends waits that last too long. Jobs are served in turn, a piece at a time, as far as their KV is written, then in the
order of the engine. A piece is announced once its gather is done, so the receiver never waits for KV that is being
computed. A third thread, the courier, tells of jobs that are complete.
"""

from __future__ import annotations

import enum
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial

from kv_transfer.context import NodeContext, PairInfo
from kv_transfer.control import ControlConnection, dial
from kv_transfer.courier import Courier
from kv_transfer.errors import PairRefusedError, PeerLostError, ProtocolError, TicketError, TransferError
from kv_transfer.handshake import Identity, Receiver
from kv_transfer.jobs import SendJob
from kv_transfer.outgoing import Outgoing
from kv_transfer.rendezvous import pair_store
from kv_transfer.self_test import Measured, SelfTest, judge
from kv_transfer.ticket import KVTicket, TicketState
from kv_transfer.transport import Side, Transport, open_transport
from kv_transfer.watch import Watch
from protos import worker_pb2 as pb
from protos.transfer_pb2 import ControlMessage, StoreSet, TicketAbandoned

_log = logging.getLogger(__name__)


class PairState(enum.Enum):
    """Where one end of a pair is in its life."""

    CONNECTING = "connecting"
    READY = "ready"
    CLOSED = "closed"


class SenderPair:
    """One directed pair, seen from its sender."""

    def __init__(
        self,
        context: NodeContext,
        receiver: Receiver,
        attempt: int,
        on_closed: Callable[[SenderPair], None],
        on_granted: Callable[[KVTicket], None],
    ) -> None:
        """`on_granted` gets tickets that the receiver brings by itself, on the control thread; it must not block."""
        self.receiver = receiver
        self.heads = receiver.heads_from(context.layout)
        self.idle_since = time.monotonic()
        self._context = context
        self._attempt = attempt
        self._on_closed = on_closed
        self._on_granted = on_granted
        self._changed = threading.Condition()
        self._state = PairState.CONNECTING
        self._jobs: dict[str, SendJob] = {}
        self._ready: deque[SendJob] = deque()
        self._control: ControlConnection | None = None
        self._transport: Transport | None = None
        self._measured = Measured()
        self._is_slow = False
        self._transport_name = ""
        self._test = SelfTest(self._say, context.config.connect_timeout_s)
        self._watch = Watch()
        self._courier = Courier(f"kv-tell {receiver}", self._say_complete)
        self._store = pair_store(self._publish, context.config.connect_timeout_s)
        self._outgoing: Outgoing | None = None
        self._thread = threading.Thread(target=self._run, name=f"kv-send {receiver}", daemon=True)
        self._listener = threading.Thread(target=self._listen, name=f"kv-hear {receiver}", daemon=True)

    def start(self) -> None:
        """Begin connecting, on the pair's own thread."""
        self._thread.start()

    @property
    def num_jobs(self) -> int:
        """Jobs not settled."""
        with self._changed:
            return sum(not job.settled for job in self._jobs.values())

    @property
    def info(self) -> PairInfo:
        """The pair as others see it."""
        measured = self._measured
        return PairInfo(
            peer=str(self.receiver),
            direction="to",
            state=self._state.value,
            transport=self._transport_name,
            latency_s=measured.latency_s,
            bytes_per_s=measured.bytes_per_s,
            is_slow=self._is_slow,
        )

    @property
    def is_backlogged(self) -> bool:
        """Whether more KV waits to be sent than the staging's quota: nothing new should be computed for this pair."""
        place_bytes = self.heads.num_heads * self._context.layout.bytes_per_head
        with self._changed:
            jobs = list(self._jobs.values())
        return sum(job.waiting_places() for job in jobs) * place_bytes > self._context.staging_bytes

    def adopt(self, job: SendJob) -> bool:
        """Take a job in; False if the pair is closed, TicketError if the ticket is being sent already."""
        with self._changed:
            if self._closed:
                return False
            if job.ticket.ticket_id in self._jobs:
                raise TicketError(f"ticket {job.ticket.ticket_id} is being sent already")
            self._jobs[job.ticket.ticket_id] = job
            job.attach(self)
            return True

    def retire(self) -> bool:
        """Close the pair if no job needs it; False if one does."""
        with self._changed:
            if self._jobs or self._state is not PairState.READY:
                return False
            self._state = PairState.CLOSED
            self._changed.notify_all()
        self._context.counters.add(retired_pairs=1)
        self._hang_up("retired")
        return True

    def close(self, reason: str) -> None:
        """End the pair from any thread; its jobs become ABORTED. `join` waits for it."""
        self._lose(TicketState.ABORTED, reason)

    def join(self, deadline: float) -> bool:
        """Wait for the threads until a monotonic time; whether they ended."""
        for thread in (self._thread, self._listener):
            if thread.ident is not None and thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))
        return not self._thread.is_alive() and not self._listener.is_alive()

    @property
    def _closed(self) -> bool:
        return self._state is PairState.CLOSED

    # -- the data thread

    def _run(self) -> None:
        try:
            self._connect()
            while not self._closed:
                self._step()
        except PairRefusedError as error:
            self._lose(TicketState.ABORTED, str(error))
        except TransferError as error:
            self._lose(TicketState.LOST, str(error), peer_lost=True)
        except Exception as error:
            self._lose(TicketState.ABORTED, f"sending failed: {error!r}")
            raise
        finally:
            self._lose(TicketState.ABORTED, "the pair was closed")
            self._clean_up()

    def _connect(self) -> None:
        config, receiver = self._context.config, self.receiver
        sock = dial(receiver.address, timeout_s=config.connect_timeout_s)
        control = ControlConnection(sock, peer=str(receiver), send_timeout_s=config.peer_timeout_s)
        with self._changed:
            self._control = control
            if self._closed:
                return
        agreed = self._context.handshake.as_sender(control, receiver.identity, self._attempt)
        if agreed.layout != receiver.layout:
            raise PairRefusedError(f"{receiver} has another layout than its ticket says: {agreed.layout}")
        self._listener.start()
        self._transport_name = agreed.transport
        equipment = self._context.equip(Side.SENDER, agreed.transport)
        equipment.lane.enter()
        transport = open_transport(agreed.transport, equipment.channel, self._store)
        with self._changed:
            self._transport = transport
            if self._closed:
                return
        self._measured = self._test.run(transport, equipment, self._context.piece_bytes)
        self._outgoing = Outgoing(self._context, equipment, transport, self.heads.heads, str(receiver), self._watch)
        if not judge(self._measured, agreed.transport, config, str(receiver)):
            self._is_slow = True
            self._context.counters.add(slow_pairs=1)
        self._courier.start()
        with self._changed:
            if self._state is PairState.CONNECTING:
                self._state = PairState.READY
                self.idle_since = time.monotonic()

    def _step(self) -> None:
        """Send one piece, or wait for a transfer or for work."""
        outgoing = self._outgoing
        assert outgoing is not None, "the pair is connected"
        job = self._next_job(outgoing)
        if job is None:
            if not outgoing.is_empty:
                outgoing.reap()
        elif job.settled:
            self._abandon(job)
        else:
            self._send_piece(outgoing, job)

    def _next_job(self, outgoing: Outgoing) -> SendJob | None:
        """The job whose turn it is; None when something in flight, or the end of the pair, comes first."""
        idle_s = self._context.config.idle_pair_s
        with self._changed:
            while not self._closed:
                if self._ready and not outgoing.is_full:
                    return self._take_turn()
                if not outgoing.is_empty:
                    return None
                if not self._changed.wait(None if self._jobs else idle_s) and not self._jobs:
                    self._state = PairState.CLOSED
                    self._context.counters.add(retired_pairs=1)
            return None

    def _take_turn(self) -> SendJob:
        """The next job in turn whose KV is written; else the one pushed first, for the engine goes in order."""
        job = next((job for job in self._ready if job.is_written), None)
        if job is None:
            job = min(self._ready, key=lambda job: job.waits_since)
        self._ready.remove(job)
        return job

    def _send_piece(self, outgoing: Outgoing, job: SendJob) -> None:
        piece = outgoing.prepare(job)
        if piece is not None:
            self._say(ControlMessage(piece=piece.announced))
            outgoing.send(piece)
            job.announced()
        if job.has_work or job.settled:
            self.notice(job)
        job.made_room()

    def _say_complete(self, job: SendJob) -> None:
        """Tell the receiver that a job is complete, and bound the wait for its answer; on the courier's thread."""
        complete, outgoing, config = job.take_complete(), self._outgoing, self._context.config
        assert outgoing is not None, "the courier starts when the pair is connected"
        if complete is None:
            return
        try:
            self._say(ControlMessage(complete=complete))
        except TransferError as error:
            self._lose(TicketState.LOST, str(error), peer_lost=True)
            return
        timeout_s = config.settle_timeout_s + outgoing.num_in_flight * config.peer_timeout_s
        reason = f"{self.receiver} gave no verdict within {timeout_s:g} s"
        self._context.janitor.call_at(
            time.monotonic() + timeout_s, partial(self._settle, job, TicketState.LOST, reason)
        )

    def _abandon(self, job: SendJob) -> None:
        """Forget a job that its owner gave up, and tell the receiver."""
        with self._changed:
            known = self._jobs.pop(job.ticket.ticket_id, None)
        if known is not None:
            self._say(ControlMessage(abandoned=TicketAbandoned(ticket_id=job.ticket.ticket_id, reason=job.reason)))

    def _publish(self, key: str, value: bytes) -> None:
        self._say(ControlMessage(store_set=StoreSet(key=key, value=value)))

    def _say(self, message: ControlMessage) -> None:
        if self._control is None:
            raise PeerLostError(f"not connected to {self.receiver}")
        self._control.send(message)

    def _clean_up(self) -> None:
        if self._control is not None:
            self._control.shutdown()
        self._courier.stop()
        if self._listener.ident is not None:
            self._listener.join()
        if self._transport is not None:
            self._transport.close()
        if self._outgoing is not None:
            self._outgoing.close()
        if self._control is not None:
            self._control.close()
        self._on_closed(self)

    # -- the control thread

    def _listen(self) -> None:
        config = self._context.config
        control = self._control
        assert control is not None
        try:
            control.watch(
                self._handle,
                check=self._watch.check,
                pings=True,
                heartbeat_s=config.heartbeat_s,
                timeout_s=config.peer_timeout_s,
            )
        except TransferError as error:
            self._lose(TicketState.LOST, str(error), peer_lost=True)

    def _handle(self, message: ControlMessage) -> None:
        kind = message.WhichOneof("message")
        if kind == "settled":
            with self._changed:
                job = self._jobs.get(message.settled.ticket_id)
            if job is not None:
                self._settle(job, _verdict(message.settled.state), message.settled.reason)
        elif kind == "granted":
            self._on_granted(self._own_ticket(message.granted))
        elif kind == "store_set":
            self._store.put(message.store_set.key, message.store_set.value)
        elif kind == "probe_seen":
            self._test.seen()
        else:
            raise ProtocolError(f"{self.receiver} sent {kind or 'nothing known'}, which a receiver does not say")

    def _own_ticket(self, message: pb.KVTicket) -> KVTicket:
        """A ticket that the receiver has brought; it speaks for nobody else."""
        try:
            ticket = KVTicket.from_proto(message)
        except ValueError as error:
            raise ProtocolError(f"{self.receiver} brought a ticket that is none: {error}") from None
        if Identity(ticket.worker_id, ticket.epoch) != self.receiver.identity:
            raise ProtocolError(f"{self.receiver} brought a ticket of {ticket.worker_id}/{ticket.epoch}")
        return ticket

    # -- any thread

    def _settle(self, job: SendJob, state: TicketState, reason: str) -> None:
        """End a job that needs no word to the receiver."""
        with self._changed:
            if self._jobs.get(job.ticket.ticket_id) is job:
                del self._jobs[job.ticket.ticket_id]
                self.idle_since = time.monotonic()
                self._changed.notify()
        job.settle(state, reason)

    def tell_complete(self, job: SendJob) -> None:
        """All of a job has been announced."""
        self._courier.post(job)

    def notice(self, job: SendJob) -> None:
        """A job has something to do (also: it was aborted)."""
        with self._changed:
            if job not in self._ready:
                self._ready.append(job)
                self._changed.notify()

    def _lose(self, state: TicketState, reason: str, *, peer_lost: bool = False) -> None:
        """Close the pair and settle its jobs; only the first call counts."""
        with self._changed:
            if self._state is PairState.CLOSED:
                return
            was_idle = self._state is PairState.READY and not self._jobs
            self._state = PairState.CLOSED
            jobs = list(self._jobs.values())
            self._jobs.clear()
            self._changed.notify_all()
        if peer_lost and not was_idle:
            self._context.counters.add(lost_peers=1)
        for job in jobs:
            job.settle(state, reason)
        self._hang_up(reason)

    def _hang_up(self, reason: str) -> None:
        self._store.close(reason)
        self._test.end(reason)
        if self._transport is not None:
            self._transport.abort()
        if self._control is not None:
            self._control.shutdown()


def _verdict(word: str) -> TicketState:
    try:
        return TicketState(word)
    except ValueError:
        raise ProtocolError(f"{word!r} is no verdict on a ticket") from None
