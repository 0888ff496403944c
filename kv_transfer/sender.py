"""The sending end of a pair: takes what jobs push, gathers it, announces it, sends it.

States: CONNECTING (dial, handshake, data channel) -> READY -> CLOSED. A refusal, a lost peer, a failed
transfer, idleness and the node's stop lead to CLOSED; nothing leads back: the next ticket makes a new
pair, and one that joined before the loss was noticed is LOST with the others. Two threads: the data
thread connects and is the only one that gathers; the control thread hears verdicts and heartbeats.
Jobs are served in turn, a piece at a time.
"""

from __future__ import annotations

import enum
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from kv_transfer.context import NodeContext
from kv_transfer.control import ControlConnection, dial
from kv_transfer.errors import PairRefusedError, PeerLostError, ProtocolError, TicketError, TransferError
from kv_transfer.handshake import Identity
from kv_transfer.jobs import Piece, SendJob
from kv_transfer.rendezvous import PairStore
from kv_transfer.staging import as_piece, digest_of
from kv_transfer.ticket import TicketState
from kv_transfer.transport import Side, Transfer, Transport, open_transport
from protos.transfer_pb2 import ControlMessage, PieceAnnounced, StoreSet, TicketAbandoned

_log = logging.getLogger(__name__)

MAX_IN_FLIGHT = 4
"""Pieces on the wire at once: enough to gather the next while one travels; more would only be joined less."""


class PairState(enum.Enum):
    """Where one end of a pair is in its life."""

    CONNECTING = "connecting"
    READY = "ready"
    CLOSED = "closed"


@dataclass(slots=True)
class _InFlight:
    """A piece on its way, or (without a transfer) the end of a job behind its last piece."""

    transfer: Transfer | None = None
    buffer: torch.Tensor | None = None
    finished: SendJob | None = None


class SenderPair:
    """One directed pair, seen from its sender."""

    def __init__(
        self,
        context: NodeContext,
        receiver: Identity,
        address: str,
        attempt: int,
        on_closed: Callable[[SenderPair], None],
    ) -> None:
        self.receiver = receiver
        self.address = address
        self._context = context
        self._attempt = attempt
        self._on_closed = on_closed
        self._changed = threading.Condition()
        self._state = PairState.CONNECTING
        self._jobs: dict[str, SendJob] = {}
        self._ready: deque[SendJob] = deque()
        self._control: ControlConnection | None = None
        self._transport: Transport | None = None
        self._store = PairStore(self._publish, context.config.connect_timeout_s)
        self._staging = context.new_staging()
        self._in_flight: deque[_InFlight] = deque()
        self._sequence_number = 0
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

    def adopt(self, job: SendJob) -> bool:
        """Take a job in; False if the pair is closed, TicketError if the ticket is being sent already."""
        with self._changed:
            if self._closed:
                return False
            if job.ticket.ticket_id in self._jobs:
                raise TicketError(f"ticket {job.ticket.ticket_id} is being sent already")
            self._jobs[job.ticket.ticket_id] = job
            job.attach(self._notice)
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
        config = self._context.config
        sock = dial(self.address, timeout_s=config.connect_timeout_s)
        control = ControlConnection(sock, peer=str(self.receiver), send_timeout_s=config.peer_timeout_s)
        with self._changed:
            self._control = control
            if self._closed:
                return
        self._context.handshake.as_sender(control, self.receiver, self._attempt)
        self._listener.start()
        options = self._context.channel_options(Side.SENDER)
        transport = open_transport(config.transport_name, options, self._store)
        with self._changed:
            self._transport = transport
            if self._state is PairState.CONNECTING:
                self._state = PairState.READY

    def _step(self) -> None:
        """Send one piece or one first token, or wait for a transfer or for work."""
        job = self._next_job()
        if job is None:
            if self._in_flight:
                self._reap()
            return
        if job.settled:
            self._abandon(job)
        elif (complete := job.take_complete()) is not None:
            self._say(ControlMessage(complete=complete))
            self._in_flight.append(_InFlight(finished=job))
        else:
            self._send_piece(job)

    def _next_job(self) -> SendJob | None:
        """The job whose turn it is; None when something in flight, or the end of the pair, comes first."""
        idle_s = self._context.config.idle_pair_s
        with self._changed:
            while not self._closed:
                if self._ready and len(self._in_flight) < MAX_IN_FLIGHT:
                    return self._ready.popleft()
                if self._in_flight:
                    return None
                if not self._changed.wait(None if self._jobs else idle_s) and not self._jobs:
                    self._state = PairState.CLOSED
            return None

    def _send_piece(self, job: SendJob) -> None:
        while (buffer := self._staging.acquire(self._context.piece_bytes)) is None:
            self._reap()
        gathered = self._gather(job, buffer)
        if gathered is None:
            self._staging.release(buffer)
            return
        piece, data = gathered
        self._announce(job, piece, data)
        transport = self._transport
        assert transport is not None
        self._in_flight.append(_InFlight(transport.send(data), buffer))
        self._context.counters.add(sent_bytes=data.numel(), sent_pieces=1)
        if job.has_work:
            self._notice(job)

    def _gather(self, job: SendJob, buffer: torch.Tensor) -> tuple[Piece, torch.Tensor] | None:
        """The job's next piece with its bytes in the buffer; None if there is nothing to send for it any more."""
        piece = job.begin_gather()
        if piece is None:
            return None
        layout = self._context.layout
        data = buffer[: piece.num_layers * piece.num_tokens * layout.bytes_per_token_layer]
        out = as_piece(data, layout, piece.num_layers, piece.num_tokens)
        try:
            self._context.memory.gather(piece.first_layer, piece.num_layers, piece.slot_ids, out)
        except Exception as error:
            _log.exception("gathering KV of ticket %s failed", job.ticket.ticket_id)
            job.settle(TicketState.ABORTED, f"gathering KV failed: {error!r}")
        if job.end_gather():
            return piece, data
        self._notice(job)
        return None

    def _announce(self, job: SendJob, piece: Piece, data: torch.Tensor) -> None:
        has_digest = self._context.config.digest_name != "none"
        self._sequence_number += 1
        announced = PieceAnnounced(
            sequence_number=self._sequence_number,
            ticket_id=job.ticket.ticket_id,
            first_layer=piece.first_layer,
            num_layers=piece.num_layers,
            first_token=piece.first_token,
            num_tokens=piece.num_tokens,
            num_bytes=data.numel(),
            digest=digest_of(data) if has_digest else 0,
            has_digest=has_digest,
        )
        self._say(ControlMessage(piece=announced))

    def _reap(self) -> None:
        """Wait for the oldest thing in flight."""
        oldest = self._in_flight.popleft()
        if oldest.transfer is not None and oldest.buffer is not None:
            oldest.transfer.wait()
            self._staging.release(oldest.buffer)
        if oldest.finished is not None:
            self._await_verdict(oldest.finished)

    def _await_verdict(self, job: SendJob) -> None:
        """The receiver has all of the job: bound the wait for its answer."""
        timeout_s = self._context.config.settle_timeout_s
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
        if self._listener.ident is not None:
            self._listener.join()
        self._in_flight.clear()
        if self._transport is not None:
            self._transport.close()
        if self._control is not None:
            self._control.close()
        self._on_closed(self)

    # -- the control thread

    def _listen(self) -> None:
        config = self._context.config
        control = self._control
        assert control is not None
        try:
            control.watch(self._handle, pings=True, heartbeat_s=config.heartbeat_s, timeout_s=config.peer_timeout_s)
        except TransferError as error:
            self._lose(TicketState.LOST, str(error), peer_lost=True)

    def _handle(self, message: ControlMessage) -> None:
        kind = message.WhichOneof("message")
        if kind == "settled":
            with self._changed:
                job = self._jobs.get(message.settled.ticket_id)
            if job is not None:
                self._settle(job, _verdict(message.settled.state), message.settled.reason)
        elif kind == "store_set":
            self._store.put(message.store_set.key, message.store_set.value)
        else:
            raise ProtocolError(f"{self.receiver} sent {kind or 'nothing known'}, which a receiver does not say")

    # -- any thread

    def _settle(self, job: SendJob, state: TicketState, reason: str) -> None:
        """End a job that needs no word to the receiver."""
        with self._changed:
            if self._jobs.get(job.ticket.ticket_id) is job:
                del self._jobs[job.ticket.ticket_id]
                self._changed.notify()
        job.settle(state, reason)

    def _notice(self, job: SendJob) -> None:
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
        self._store.close(reason)
        if self._transport is not None:
            self._transport.abort()
        if self._control is not None:
            self._control.shutdown()


def _verdict(word: str) -> TicketState:
    try:
        return TicketState(word)
    except ValueError:
        raise ProtocolError(f"{word!r} is no verdict on a ticket") from None
