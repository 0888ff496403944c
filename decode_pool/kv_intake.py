"""Follows the reservations of a decode worker from promise to first step.

    RESERVED --all pieces home, first token known--> READY (handed to the scheduler)
        |--hand back--> LEAVING --all pieces home, first token known--> (gone, reported as HANDED_BACK)
        |--abort--> ENDING --no more writes--> (gone)
        '--peer lost, lease over, bad piece--> (gone, reported as FAILED; LEAVING likewise)

The ticket (kv_transfer) decides how it ends, on its own threads, and says so exactly once; here that
word is carried to the engine loop's thread, which calls everything else. Blocks go back only after
that word, so nothing is ever written into a block that has a new owner.
"""

from __future__ import annotations

import enum
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

from engine.engine import Engine
from engine.sequence import Sequence
from kv_transfer.group import Transfers
from kv_transfer.ticket import KVTicket, ReceivedKV, TicketGrant, TicketState
from protos import worker_pb2 as pb

Key = tuple[str, int]
OnReady = Callable[[Sequence, ReceivedKV], None]
OnFailed = Callable[[Sequence, str], None]


class IntakeState(enum.Enum):
    """Where a reservation is in its life."""

    RESERVED = "reserved"
    LEAVING = "leaving"
    ENDING = "ending"


@dataclass(slots=True)
class Reservation:
    """Blocks promised to one request whose KV is awaited."""

    sequence: Sequence
    ticket: KVTicket
    state: IntakeState = IntakeState.RESERVED


class KVIntake:
    """The reservations of one worker."""

    def __init__(
        self,
        engine: Engine,
        node: Transfers,
        *,
        on_ready: OnReady,
        on_failed: OnFailed,
        on_left: Callable[[Sequence], None],
        on_room: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_left`: a sequence goes back to its router, its blocks have gone already.

        `on_room`: blocks are back of a reservation of which nothing else is told.
        """
        self._engine = engine
        self._node = node
        self._on_ready = on_ready
        self._on_failed = on_failed
        self._on_left = on_left
        self._on_room = on_room
        self._reservations: dict[Key, Reservation] = {}
        self._numbers = itertools.count(1)

    def reserve(self, sequence: Sequence, worker_name: str, sender: pb.WorkerIdentity | None = None) -> KVTicket:
        """Grant a ticket for the KV of a sequence that already holds its blocks; the sender, if known, hears of it."""
        request = sequence.request
        key = (request.request_id, request.attempt)
        post = self._engine.loop.post
        first_block = sequence.num_computed_tokens // self._engine.scheduler.block_size
        num_blocks = self._engine.scheduler.num_blocks_for(sequence.num_tokens)
        ticket = self._node.grant(
            TicketGrant(
                ticket_id=f"{worker_name}-{next(self._numbers)}",
                request_id=request.request_id,
                attempt=request.attempt,
                owner=sequence.owner,
                block_ids=tuple(sequence.block_ids[first_block:num_blocks]),
                first_token=sequence.num_computed_tokens,
                num_tokens=sequence.num_tokens,
                after=self._engine.runner.mark(),
                on_ready=lambda received: post(lambda: self._ready(key, received)),
                on_end=lambda state, reason: post(lambda: self._ended(key, state, reason)),
            )
        )
        self._reservations[key] = Reservation(sequence, ticket)
        if sender is not None:
            self._node.tell_granted(sender.worker_id, sender.epoch, ticket)
        return ticket

    def abort(self, key: Key, reason: str) -> bool:
        """End a reservation; its blocks go back when nothing can write to them any more."""
        reservation = self._reservations.get(key)
        if reservation is None or reservation.state is IntakeState.ENDING:
            return False
        reservation.state = IntakeState.ENDING
        self._node.abort(reservation.ticket.ticket_id, reason)
        return True

    def hand_back(self) -> None:
        """Have everything that is reserved go back to its router once its KV is home; a transfer is not cut off."""
        for reservation in self._reservations.values():
            if reservation.state is IntakeState.RESERVED:
                reservation.state = IntakeState.LEAVING

    @property
    def num_reserved(self) -> int:
        """Reservations whose ticket has not ended; any thread may ask."""
        return len(self._reservations)

    def sequences(self) -> list[Sequence]:
        """Sequences that hold blocks for KV to come."""
        return [reservation.sequence for reservation in self._reservations.values()]

    def _ready(self, key: Key, received: ReceivedKV) -> None:
        reservation = self._reservations.pop(key)
        sequence = reservation.sequence
        sequence.num_computed_tokens = sequence.num_tokens
        self._engine.scheduler.publish(sequence)
        assert received.first is not None, "rank 0 hears the first token"
        ended = received.first.finish != pb.ENGINE_FINISH_NONE
        if reservation.state is IntakeState.ENDING or ended:
            self._engine.scheduler.release(sequence)
            self._on_room()
            return
        sequence.token_ids += received.first.token_ids
        if reservation.state is IntakeState.LEAVING:
            self._engine.scheduler.release(sequence)
            self._on_left(sequence)
            return
        sequence.first_step_at = time.monotonic()
        self._on_ready(sequence, received)
        self._engine.scheduler.add(sequence)

    def _ended(self, key: Key, state: TicketState, reason: str) -> None:
        reservation = self._reservations.pop(key)
        self._engine.scheduler.release(reservation.sequence)
        if reservation.state is not IntakeState.ENDING:
            self._on_failed(reservation.sequence, f"the ticket ended {state.name}: {reason}")
        else:
            self._on_room()
