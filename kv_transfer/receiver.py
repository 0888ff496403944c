"""The receiving end of a pair: receives every announced piece in order, and writes what its ticket allows.

States: CONNECTING (data channel, self-test) -> READY -> CLOSED, as at the sender. Two threads: the control thread
reads announcements and heartbeats, posts a receive for each piece at once (while it waits, the sender's kernel
spins), and never waits for data; the data thread asks the ledger, scatters, checks digests, and tells the sender of
tickets granted and ended.
A piece that finds no staging is posted by the data thread as soon as some is free. A piece whose ticket has
ended is received and dropped. Losing the peer aborts the tickets that something was announced for over this pair.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from kv_transfer.context import NodeContext, PairInfo
from kv_transfer.control import ControlConnection
from kv_transfer.digest import Value
from kv_transfer.errors import ProtocolError, TransferError
from kv_transfer.handshake import Agreed
from kv_transfer.ledger import SlotWrite
from kv_transfer.rendezvous import pair_store
from kv_transfer.self_test import Measured
from kv_transfer.staging import as_piece
from kv_transfer.ticket import KVTicket, TicketState
from kv_transfer.transport import Side, Transfer, Transport, open_transport
from kv_transfer.watch import Watch
from protos.transfer_pb2 import (
    ControlMessage,
    PairReady,
    PieceAnnounced,
    Probe,
    ProbeSeen,
    StoreSet,
    TicketComplete,
    TicketSettled,
)

_log = logging.getLogger(__name__)

MAX_WAITING = 4096
"""Most that is kept of what a sender announced and no staging was free for; a sender has a few pieces in flight."""
Item = PieceAnnounced | TicketComplete | Probe


@dataclass(slots=True)
class _Incoming:
    """A piece whose receive is posted."""

    piece: PieceAnnounced
    buffer: torch.Tensor
    transfer: Transfer


class ReceiverPair:
    """One directed pair, seen from its receiver. Made once the handshake is done."""

    def __init__(
        self,
        context: NodeContext,
        control: ControlConnection,
        agreed: Agreed,
        on_closed: Callable[[ReceiverPair], None],
    ) -> None:
        self.sender = agreed.peer
        self.sender_layout = agreed.layout
        self.heads = agreed.layout.slices_to(context.layout)[0].other_heads
        """The heads that come over this pair, in this rank's numbering."""
        self._agreed = agreed
        self._context = context
        self._control = control
        self._on_closed = on_closed
        self._changed = threading.Condition()
        self._closed = False
        self._inbox: deque[tuple[Item, float]] = deque()
        """Heard, and not posted yet."""
        self._posted: deque[tuple[_Incoming | TicketComplete | Probe, float]] = deque()
        """Next for the data thread, in the order heard."""
        self._words: deque[ControlMessage] = deque()
        """What the sender is to be told."""
        self._begun: set[str] = set()
        """Tickets that something was announced for, and that have not ended."""
        self._equipment = context.equip(Side.RECEIVER, agreed.transport)
        self._posting = threading.Lock()
        """Held by who posts, and for the staging, which both threads use."""
        self._staging = self._equipment.staging
        self._watch = Watch()
        self._is_ready = False
        self._measured = Measured()
        self._located: tuple[object, Any] | None = None
        """The tokens written last, and their places."""
        self._next_number = 1
        self._busy_until = 0.0
        self._store = pair_store(self._publish, context.config.connect_timeout_s)
        self._transport: Transport | None = None
        self._thread = threading.Thread(target=self._run, name=f"kv-recv {agreed.peer}", daemon=True)

    @property
    def info(self) -> PairInfo:
        """The pair as others see it."""
        state = "closed" if self._closed else "ready" if self._is_ready else "connecting"
        rank = f" rank {self.sender_layout.tp_rank}" if self.sender_layout.tp_size > 1 else ""
        measured = self._measured
        return PairInfo(
            f"{self.sender}{rank}", "from", state, self._agreed.transport, measured.latency_s, measured.bytes_per_s
        )

    def serve(self) -> None:
        """Agree to the pair, and be its control thread until the pair ends; returns when nothing of it is left."""
        config = self._context.config
        try:
            self._control.send(ControlMessage(ready=PairReady(transport=self._agreed.transport)))
            self._thread.start()
            self._equipment.lane.enter_beside()
            self._control.watch(
                self._handle,
                check=self._watch.check,
                pings=False,
                heartbeat_s=config.heartbeat_s,
                timeout_s=config.peer_timeout_s,
            )
        except TransferError as error:
            self.close(str(error))
        finally:
            self.close("its control thread ended")
            if self._thread.ident is not None:
                self._thread.join()
            self._control.close()
            self._on_closed(self)

    def close(self, reason: str) -> None:
        """End the pair from any thread; only the first call counts."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            begun = list(self._begun)
            self._changed.notify_all()
        ledger, told = self._context.ledger, f"peer {self.sender} lost: {reason}"
        num_lost = sum(ledger.end(ticket_id, TicketState.ABORTED, told) for ticket_id in begun)
        if num_lost:
            self._context.counters.add(lost_peers=1)
        self._store.close(reason)
        if self._transport is not None:
            self._transport.abort()
        self._control.shutdown()

    def tell_settled(self, ticket_id: str, state: TicketState, reason: str) -> None:
        """Have the data thread tell the sender a verdict."""
        settled = TicketSettled(ticket_id=ticket_id, state=state.value, reason=reason)
        with self._changed:
            self._begun.discard(ticket_id)
            self._words.append(ControlMessage(settled=settled))
            self._changed.notify()

    def tell_granted(self, ticket: KVTicket) -> None:
        """Have the data thread bring the sender a ticket."""
        with self._changed:
            self._words.append(ControlMessage(granted=ticket.to_proto()))
            self._changed.notify()

    # -- the control thread

    def _handle(self, message: ControlMessage) -> None:
        kind = message.WhichOneof("message")
        if kind == "probe" and self._is_ready:
            raise ProtocolError(f"{self.sender} sent a probe behind its self-test")
        if kind == "piece" and not self._is_ready:
            raise ProtocolError(f"{self.sender} announced a piece before the end of its self-test")
        if kind == "piece":
            self._put(message.piece)
        elif kind == "complete":
            self._put(message.complete)
        elif kind == "probe":
            self._put(message.probe)
        elif kind == "measured":
            self._measured = Measured(message.measured.latency_s, message.measured.bytes_per_s)
            self._is_ready = True
        elif kind == "abandoned":
            reason = f"the sender gave it up: {message.abandoned.reason}"
            self._context.ledger.end(message.abandoned.ticket_id, TicketState.ABORTED, reason)
        elif kind == "store_set":
            self._store.put(message.store_set.key, message.store_set.value)
        else:
            raise ProtocolError(f"{self.sender} sent {kind or 'nothing known'}, which a sender does not say")

    def _put(self, item: Item) -> None:
        with self._changed:
            if self._closed:
                return
            if not isinstance(item, Probe):
                self._begun.add(item.ticket_id)
            if len(self._inbox) >= MAX_WAITING:
                raise ProtocolError(f"{self.sender} announced {MAX_WAITING} pieces more than it may have in flight")
            self._inbox.append((item, time.monotonic()))
        self._post()

    # -- the data thread

    def _run(self) -> None:
        try:
            self._equipment.lane.enter()
            self._transport = open_transport(self._agreed.transport, self._equipment.channel, self._store)
            self._post()  # what was heard meanwhile
            while not self._closed:
                self._step()
        except TransferError as error:
            self.close(str(error))
        finally:
            self.close("its data thread ended")
            if self._transport is not None:
                self._transport.close()
            self._posted.clear()
            self._staging.close()

    def _step(self) -> None:
        """Tell the sender what there is to tell, then finish the oldest thing heard; or wait for news."""
        with self._changed:
            while not (self._posted or self._words or self._closed):
                self._changed.wait()
            words = list(self._words)
            self._words.clear()
            item, heard_at = self._posted.popleft() if self._posted else (None, 0.0)
        for word in words:
            self._control.send(word)
        if isinstance(item, _Incoming):
            self._land(item, heard_at)
        elif isinstance(item, TicketComplete):
            first = item.first if item.HasField("first") else None
            self._context.ledger.complete(self, item.ticket_id, first, heard_at - item.first_age_s)
        elif isinstance(item, Probe):
            self._answer_probe(item)

    def _answer_probe(self, probe: Probe) -> None:
        if probe.num_bytes < 1:
            raise ProtocolError(f"{self.sender} sent a probe of {probe.num_bytes} bytes")
        with self._posting:
            buffer = self._staging.acquire(probe.num_bytes)
        assert buffer is not None, "no piece comes before the self-test is over"
        assert self._transport is not None
        lane, bound_s = self._equipment.lane, self._context.config.peer_timeout_s
        with self._watch.waiting(f"a probe of {self.sender}", bound_s):
            self._transport.recv(buffer[: probe.num_bytes]).wait()
            self._equipment.digester.begin(buffer)  # compiled now, and not when a piece waits for it
            lane.mark(is_near=True).wait()
        self._control.send(ControlMessage(probe_seen=ProbeSeen()))
        self._give_back(buffer)

    def _give_back(self, buffer: torch.Tensor) -> None:
        """A piece has passed: its staging is free for what waits."""
        with self._posting:
            self._staging.release(buffer)
        self._post()

    def _land(self, incoming: _Incoming, heard_at: float) -> None:
        """Write a piece where its ticket says and check it; the ticket learns of it once the copy is done."""
        piece, counters, lane = incoming.piece, self._context.counters, self._equipment.lane
        data = incoming.buffer[: piece.num_bytes]
        what, bound_s = f"piece {piece.sequence_number} of {self.sender}", self._context.config.peer_timeout_s
        slots = failure = None
        try:
            with self._watch.waiting(what, bound_s):
                incoming.transfer.wait()
                digest = self._equipment.digester.begin(data) if piece.has_digest else None
                if self._equipment.digester.is_prompt:
                    self._check(piece, digest)
            # Not watched: it may wait for a grant, which is not the peer's doing.
            slots = self._context.ledger.begin_write(self, piece)
            with self._watch.waiting(what, bound_s):
                if slots is not None:
                    failure = self._scatter(piece, slots, data)
                lane.mark(is_near=slots is None or slots.is_free).wait()
            counters.add(received_bytes=piece.num_bytes, received_pieces=1)
            if not self._equipment.digester.is_prompt:
                self._check(piece, digest)
        except Exception:
            failure = "the pair was lost in the middle of a piece"
            raise
        finally:
            self._landed(incoming.piece, heard_at, wrote=slots is not None, failure=failure)
        self._give_back(incoming.buffer)

    def _check(self, piece: PieceAnnounced, digest: Value | None) -> None:
        """End the ticket of a piece that is not what was announced."""
        if digest is not None and digest() != piece.digest:
            self._context.counters.add(digest_mismatches=1)
            self._context.ledger.end(piece.ticket_id, TicketState.ABORTED, "digest mismatch")

    def _landed(self, piece: PieceAnnounced, heard_at: float, *, wrote: bool, failure: str | None) -> None:
        if not wrote:
            self._context.counters.add(dropped_pieces=1)
            return
        now = time.monotonic()
        busy_s = now - max(heard_at, self._busy_until)
        self._busy_until = now
        self._context.ledger.end_write(piece, len(self.heads), busy_s, failure)

    def _scatter(self, piece: PieceAnnounced, slots: SlotWrite, data: torch.Tensor) -> str | None:
        """Write a piece; what went wrong, if something did."""
        view = as_piece(data, self._context.layout, piece.num_layers, piece.num_tokens, len(self.heads))
        try:
            self._equipment.lane.follow(slots.after)
            self._context.memory.scatter(piece.first_layer, piece.num_layers, self._locate(slots), self.heads, view)
        except Exception as error:
            _log.exception("writing KV of ticket %s failed", piece.ticket_id)
            return f"writing KV failed: {error!r}"
        return None

    def _locate(self, slots: SlotWrite) -> Any:
        """The places of a piece; pieces of several layers of the same tokens share them."""
        if self._located is None or self._located[0] != slots.key:
            self._located = (slots.key, self._context.memory.locate(slots.slot_ids))
        return self._located[1]

    # -- either thread

    def _post(self) -> None:
        """Hand what was heard to the data thread, receives posted, as far as the staging goes."""
        with self._posting:
            while self._transport is not None and self._inbox and not self._closed:
                item, heard_at = self._inbox[0]
                posted = self._post_receive(item) if isinstance(item, PieceAnnounced) else item
                if posted is None:
                    return
                self._inbox.popleft()
                with self._changed:
                    self._posted.append((posted, heard_at))
                    self._changed.notify()

    def _post_receive(self, piece: PieceAnnounced) -> _Incoming | None:
        """Post one receive; None while there is no staging for it."""
        if piece.sequence_number != self._next_number or piece.num_bytes < 1:
            raise ProtocolError(
                f"{self.sender} announced piece {piece.sequence_number} of {piece.num_bytes} bytes, "
                f"piece {self._next_number} was next"
            )
        assert self._transport is not None
        buffer = self._staging.acquire(piece.num_bytes)
        if buffer is None:
            return None
        self._next_number += 1
        return _Incoming(piece, buffer, self._transport.recv(buffer[: piece.num_bytes]))

    def _publish(self, key: str, value: bytes) -> None:
        self._control.send(ControlMessage(store_set=StoreSet(key=key, value=value)))
