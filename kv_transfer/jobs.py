"""What a sender has to do for one ticket: writes pushed by the engine, cut and joined into pieces.

A job is OPEN until `finish` makes it FINISHING (its last piece leaves, then the first token), and
SETTLED once its result is known. The engine's thread pushes, the pair's data thread takes pieces;
abort, the receiver's verdict, a lost peer and the settle timeout lead to SETTLED from any state.
A job that is settled while its KV is being gathered reports the result after the gather.
"""

from __future__ import annotations

import enum
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np

from kv_transfer.errors import TicketError, TransferIntegrityError
from kv_transfer.staging import SlotIds
from kv_transfer.ticket import KVTicket, SendResult, TicketState
from kv_transfer.timers import Janitor
from protos.transfer_pb2 import TicketComplete
from protos.worker_pb2 import TokenOutput


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """KV of tokens [first_token, end_token) of layers [first_layer, end_layer), in memory at slot_ids."""

    first_layer: int
    num_layers: int
    first_token: int
    slot_ids: SlotIds
    ready: Any = None
    """The event behind which the KV is written; None: it is."""
    pushed_at: float = 0.0

    @property
    def num_tokens(self) -> int:
        """Tokens of the piece."""
        return len(self.slot_ids)

    @property
    def is_written(self) -> bool:
        """Whether the KV is there."""
        return self.ready is None or bool(self.ready.query())

    @property
    def num_places(self) -> int:
        """(layer, token) places of the piece."""
        return self.num_layers * self.num_tokens

    def joined(self, other: Piece) -> Piece | None:
        """This piece and the other, pushed later, as one, where they are neighbours in layers or in tokens."""
        ready = other.ready or self.ready
        if self.num_layers == other.num_layers and self.first_layer == other.first_layer:
            if self.first_token + self.num_tokens != other.first_token:
                return None
            return replace(self, slot_ids=np.concatenate([self.slot_ids, other.slot_ids]), ready=ready)
        if self.first_layer + self.num_layers == other.first_layer and self.first_token == other.first_token:
            if self.slot_ids is not other.slot_ids and not np.array_equal(self.slot_ids, other.slot_ids):
                return None
            return replace(self, num_layers=self.num_layers + other.num_layers, ready=ready)
        return None

    def cut(self, max_places: int) -> tuple[Piece, list[Piece]]:
        """A piece of at most max_places (layer, token) places, and what is left: whole layers if one fits."""
        if self.num_places <= max_places:
            return self, []
        if self.num_tokens <= max_places:
            return self._split_layers(max_places // self.num_tokens)
        layer, rest = self._split_layers(1) if self.num_layers > 1 else (self, [])
        head = replace(layer, slot_ids=layer.slot_ids[:max_places])
        tail = replace(layer, first_token=layer.first_token + max_places, slot_ids=layer.slot_ids[max_places:])
        return head, [tail, *rest]

    def _split_layers(self, count: int) -> tuple[Piece, list[Piece]]:
        head = replace(self, num_layers=count)
        tail = replace(self, first_layer=self.first_layer + count, num_layers=self.num_layers - count)
        return head, [tail]


class JobState(enum.Enum):
    """Where a send job is in its life."""

    OPEN = "open"
    FINISHING = "finishing"
    SETTLED = "settled"


class Pair(Protocol):
    """What a job needs of the pair that serves it."""

    @property
    def is_backlogged(self) -> bool:
        """Whether more waits to be sent over it than the staging's quota."""

    def notice(self, job: SendJob) -> None:
        """The job has something to do."""

    def tell_complete(self, job: SendJob) -> None:
        """All of the job has been announced."""


class SendJob:
    """One pair's part of a ticket at its sender. `push`, `finish` and `abort` never block."""

    def __init__(
        self,
        ticket: KVTicket,
        on_settled: Callable[[SendResult], None],
        janitor: Janitor,
        max_places: int,
        *,
        by_piece: bool = False,
    ) -> None:
        """A piece has at most max_places (layer, token) places; by_piece: better push whole ones than single layers."""
        self.ticket = ticket
        self._by_piece = by_piece
        self._on_settled = on_settled
        self._janitor = janitor
        self._max_places = max_places
        self._lock = threading.Lock()
        self._state = JobState.OPEN
        self._pieces: deque[Piece] = deque()
        self._first: TokenOutput | None = None
        self._told = False
        """Whether the receiver has heard that this was all."""
        self._finished_at = 0.0
        self._gathering = False
        self._in_hand = False
        """Whether a piece has been taken that is not announced yet."""
        self._result: SendResult | None = None
        self._pair: Pair | None = None
        self._on_room: Callable[[], None] | None = None

    def attach(self, pair: Pair) -> None:
        """Have the pair noticed, under no lock, whenever there is something new to do."""
        self._pair = pair

    # -- for the engine

    def layers_at_once(self, num_tokens: int) -> int:
        """How many layers of so many tokens are best pushed together: a piece of them, or one if none need wait."""
        return max(1, self._max_places // num_tokens) if self._by_piece else 1

    def push(self, first_layer: int, num_layers: int, first_token: int, slot_ids: SlotIds, after: Any = None) -> None:
        """Send the KV of tokens [first_token, first_token + len(slot_ids)) of these layers, which lies at slot_ids.

        On a GPU it is there once the event `after` has come; events must come in the order of the pushes. The
        slots must keep their content, and the array its items, until the job is settled. TicketError
        if the tokens are not the ticket's or the layers not the model's; a settled job ignores the push.
        """
        ticket = self.ticket
        if self.settled:
            return
        end = first_token + len(slot_ids)
        if not (ticket.first_token <= first_token < end <= ticket.num_tokens):
            raise TicketError(
                f"tokens [{first_token}, {end}) are outside the ticket's [{ticket.first_token}, {ticket.num_tokens})"
            )
        if not (0 <= first_layer < first_layer + num_layers <= ticket.layout.num_layers):
            raise TicketError(
                f"layers [{first_layer}, {first_layer + num_layers}) are outside [0, {ticket.layout.num_layers})"
            )
        with self._lock:
            if self._state is JobState.SETTLED:
                return
            if self._state is JobState.FINISHING:
                raise TicketError(f"ticket {ticket.ticket_id}: a push came after finish")
            piece = Piece(first_layer, num_layers, first_token, np.asarray(slot_ids), after, time.monotonic())
            self._pieces.append(piece)
            self._join_last()
        self._notify()

    def finish(self, first: TokenOutput | None) -> None:
        """Everything has been pushed: the first token (of rank 0) follows the last piece."""
        with self._lock:
            if self._state is JobState.SETTLED:
                return
            if self._state is JobState.FINISHING:
                raise TicketError(f"ticket {self.ticket.ticket_id} was finished twice")
            self._state = JobState.FINISHING
            self._first = first
            self._finished_at = time.monotonic()
        self._tell_if_complete()

    def abort(self, reason: str) -> None:
        """Give the ticket up; idempotent."""
        if self.settle(TicketState.ABORTED, reason):
            self._notify()

    def must_pause(self, on_room: Callable[[], None]) -> bool:
        """Whether nothing more should be computed for this ticket yet; then `on_room` says, once, when to ask again."""
        if self._pair is None or self.settled or not self._pair.is_backlogged:
            return False
        with self._lock:
            self._on_room = on_room
        self._notify()
        return True

    # -- for the pair

    def made_room(self) -> None:
        """A piece has left: whoever paused may ask again."""
        with self._lock:
            on_room, self._on_room = self._on_room, None
        if on_room is not None:
            on_room()

    @property
    def settled(self) -> bool:
        """Whether the job's end is decided."""
        return self._state is JobState.SETTLED

    @property
    def reason(self) -> str:
        """Why the job ended, once it is settled."""
        return self._result.reason if self._result is not None else ""

    def settle(self, state: TicketState, reason: str) -> bool:
        """Decide how the job ends; False if that was decided before."""
        with self._lock:
            if self._state is JobState.SETTLED:
                return False
            self._state = JobState.SETTLED
            self._pieces.clear()
            self._result = SendResult(self.ticket.ticket_id, state, reason)
            if not self._gathering:
                self._report()
            return True

    def begin_gather(self) -> Piece | None:
        """The next piece, whose slots are not free before `end_gather`; None if none waits."""
        with self._lock:
            if not self._pieces:
                return None
            if self._gathering:
                raise TransferIntegrityError(f"ticket {self.ticket.ticket_id} is gathered by two threads")
            piece = self._pieces.popleft()
            while self._pieces and self._pieces[0].is_written:
                joined = self._joined(piece, self._pieces[0])
                if joined is None:
                    break
                piece = joined
                self._pieces.popleft()
            piece, rest = piece.cut(self._max_places)
            self._pieces.extendleft(reversed(rest))
            self._gathering = self._in_hand = True
            return piece

    def end_gather(self) -> bool:
        """The gather is over; whether the job still wants its piece sent."""
        with self._lock:
            self._gathering = False
            if self._state is JobState.SETTLED:
                self._report()
                return False
            return True

    def announced(self) -> None:
        """The receiver has heard of the piece that was gathered."""
        with self._lock:
            self._in_hand = False
        self._tell_if_complete()

    def take_complete(self) -> TicketComplete | None:
        """What to say behind the last piece, once; None while a piece waits to be announced."""
        with self._lock:
            if not self._is_complete:
                return None
            self._told = True
            first, self._first = self._first, None
            age_s = time.monotonic() - self._finished_at
            return TicketComplete(ticket_id=self.ticket.ticket_id, first=first, first_age_s=age_s)

    @property
    def has_work(self) -> bool:
        """Whether a piece waits to be sent."""
        with self._lock:
            return bool(self._pieces)

    @property
    def is_written(self) -> bool:
        """Whether what comes next need not wait for the engine."""
        with self._lock:
            return not self._pieces or self._pieces[0].is_written

    @property
    def waits_since(self) -> float:
        """When what comes next was pushed, on the monotonic clock."""
        with self._lock:
            return self._pieces[0].pushed_at if self._pieces else 0.0

    def waiting_places(self) -> int:
        """(layer, token) places whose KV is written and has not left."""
        with self._lock:
            return sum(piece.num_places for piece in self._pieces if piece.is_written)

    @property
    def _is_complete(self) -> bool:
        """Whether the receiver should hear that this was all; the lock is held."""
        return self._state is JobState.FINISHING and not (self._pieces or self._in_hand or self._told)

    def _tell_if_complete(self) -> None:
        with self._lock:
            complete = self._is_complete
        if complete and self._pair is not None:
            self._pair.tell_complete(self)

    def _notify(self) -> None:
        if self._pair is not None:
            self._pair.notice(self)

    def _join_last(self) -> None:
        """Join the last piece with the one before it, where both come with a step that is being computed."""
        if len(self._pieces) < 2 or self._pieces[-1].ready is None or self._pieces[-2].ready is None:
            return
        joined = self._joined(self._pieces[-2], self._pieces[-1])
        if joined is not None:
            self._pieces.pop()
            self._pieces[-1] = joined

    def _joined(self, piece: Piece, other: Piece) -> Piece | None:
        if piece.num_places + other.num_places > self._max_places:
            return None
        return piece.joined(other)

    def _report(self) -> None:
        if self._result is not None:
            self._janitor.call_soon(partial(self._on_settled, self._result))
