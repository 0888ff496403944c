"""Pieces on their way out of one pair: gathered into staging, announced, sent, and their staging given back.

    prepare (gather, wait until it is done) -> the pair announces it -> send -> reap (the staging is free)

Pieces leave in their order. The pair's data thread calls everything.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch

from kv_transfer.context import Equipment, NodeContext
from kv_transfer.errors import TransferError
from kv_transfer.jobs import Piece, SendJob
from kv_transfer.staging import SlotIds, as_piece
from kv_transfer.ticket import TicketState
from kv_transfer.transport import Transfer, Transport
from kv_transfer.watch import Watch
from protos.transfer_pb2 import PieceAnnounced

_log = logging.getLogger(__name__)

MAX_IN_FLIGHT = 4
"""Pieces on the wire at once: enough to gather the next while one travels; more would only be joined less."""
COMPUTE_BOUND_S = 60.0
"""Most time from a push to the moment when the engine has written its KV: two steps, however long."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A piece in staging, ready to be announced."""

    announced: PieceAnnounced
    buffer: torch.Tensor


@dataclass(frozen=True, slots=True)
class _InFlight:
    """A piece on its way."""

    transfer: Transfer
    buffer: torch.Tensor


class Outgoing:
    """The pieces of one pair."""

    def __init__(
        self,
        context: NodeContext,
        equipment: Equipment,
        transport: Transport,
        heads: range,
        receiver: str,
        watch: Watch,
    ) -> None:
        self._context = context
        self._equipment = equipment
        self._transport = transport
        self._heads = heads
        self._receiver = receiver
        self._watch = watch
        self._in_flight: deque[_InFlight] = deque()
        self._max_pieces = min(MAX_IN_FLIGHT, max(1, context.staging_bytes // context.piece_bytes))
        self._num_announced = 0
        self._located: tuple[SlotIds, Any] | None = None
        """The slots used last and their places: the layers of one push share them."""

    @property
    def is_full(self) -> bool:
        """Whether the oldest piece must leave before another is prepared."""
        return len(self._in_flight) >= MAX_IN_FLIGHT or self._equipment.staging.num_lent >= self._max_pieces

    @property
    def num_in_flight(self) -> int:
        """Pieces on their way, as far as is known; any thread may ask."""
        return len(self._in_flight)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is on its way."""
        return not self._in_flight

    def prepare(self, job: SendJob) -> Prepared | None:
        """The job's next piece, gathered; None if nothing is to be sent for it (any more)."""
        buffer = self._equipment.staging.acquire(self._context.piece_bytes)
        assert buffer is not None, "staging holds as many pieces as may be in flight"
        announced = None
        piece = job.begin_gather()
        if piece is not None:
            try:
                announced = self._copy(job, piece, buffer)
            except TransferError:
                raise
            except Exception as error:
                _log.exception("gathering KV of ticket %s failed", job.ticket.ticket_id)
                job.settle(TicketState.ABORTED, f"gathering KV failed: {error!r}")
            finally:
                wanted = job.end_gather()
            if wanted and announced is not None:
                self._num_announced += 1
                announced.sequence_number = self._num_announced
                return Prepared(announced, buffer)
        self._equipment.staging.release(buffer)
        return None

    def send(self, piece: Prepared) -> None:
        """Start to send a piece that has been announced."""
        num_bytes = piece.announced.num_bytes
        transfer = self._transport.send(piece.buffer[:num_bytes])
        self._in_flight.append(_InFlight(transfer, piece.buffer))
        self._context.counters.add(sent_bytes=num_bytes, sent_pieces=1)

    def reap(self) -> None:
        """Wait until the older half of what is in flight has left."""
        leaving = [self._in_flight.popleft() for _ in range(max(1, len(self._in_flight) // 2))]
        bound_s = self._context.config.peer_timeout_s
        with self._watch.waiting(f"{self._receiver} to take a piece", bound_s):
            for item in leaving:
                item.transfer.wait()
            self._equipment.lane.mark(is_near=True).wait()
        for item in leaving:
            self._equipment.staging.release(item.buffer)

    def close(self) -> None:
        """Forget what is in flight, once the data channel is closed."""
        self._in_flight.clear()
        self._equipment.staging.close()

    def _copy(self, job: SendJob, piece: Piece, buffer: torch.Tensor) -> PieceAnnounced:
        """Fill the buffer with a piece and wait until it is there; what to say of it."""
        equipment, layout = self._equipment, self._context.layout
        data = buffer[: piece.num_places * len(self._heads) * layout.bytes_per_head]
        out = as_piece(data, layout, piece.num_layers, piece.num_tokens, len(self._heads))
        places = self._locate(piece.slot_ids)
        equipment.lane.follow(piece.ready)
        self._context.memory.gather(piece.first_layer, piece.num_layers, places, self._heads, out)
        digest = equipment.digester.begin(data) if equipment.digester.wanted() else None
        done = equipment.lane.mark(is_near=piece.is_written)
        with self._watch.waiting(f"the engine to write layer {piece.first_layer} of a piece", COMPUTE_BOUND_S):
            done.wait()
        return PieceAnnounced(
            ticket_id=job.ticket.ticket_id,
            first_layer=piece.first_layer,
            num_layers=piece.num_layers,
            first_token=piece.first_token,
            num_tokens=piece.num_tokens,
            num_bytes=data.numel(),
            digest=digest() if digest is not None else 0,
            has_digest=digest is not None,
        )

    def _locate(self, slot_ids: SlotIds) -> Any:
        if self._located is None or self._located[0] is not slot_ids:
            self._located = (slot_ids, self._context.memory.locate(slot_ids))
        return self._located[1]
