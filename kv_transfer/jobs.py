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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from kv_transfer.errors import TicketError, TransferIntegrityError
from kv_transfer.ticket import KVTicket, SendResult, TicketState
from kv_transfer.timers import Janitor
from protos.transfer_pb2 import TicketComplete
from protos.worker_pb2 import TokenOutput


@dataclass(frozen=True, slots=True)
class Piece:
    """KV of tokens [first_token, end_token) of layers [first_layer, end_layer), in memory at slot_ids."""

    first_layer: int
    num_layers: int
    first_token: int
    slot_ids: Sequence[int]

    @property
    def num_tokens(self) -> int:
        """Tokens of the piece."""
        return len(self.slot_ids)

    def joined(self, other: Piece) -> Piece | None:
        """This piece and the other as one, where they are neighbours in layers or in tokens."""
        if self.num_layers == other.num_layers and self.first_layer == other.first_layer:
            if self.first_token + self.num_tokens != other.first_token:
                return None
            return Piece(self.first_layer, self.num_layers, self.first_token, [*self.slot_ids, *other.slot_ids])
        if self.first_layer + self.num_layers == other.first_layer and self.first_token == other.first_token:
            if self.slot_ids is not other.slot_ids and list(self.slot_ids) != list(other.slot_ids):
                return None
            return Piece(self.first_layer, self.num_layers + other.num_layers, self.first_token, self.slot_ids)
        return None

    def cut(self, max_places: int) -> tuple[Piece, list[Piece]]:
        """A piece of at most max_places (layer, token) places, and what is left: whole layers if one fits."""
        if self.num_layers * self.num_tokens <= max_places:
            return self, []
        if self.num_tokens <= max_places:
            return self._split_layers(max_places // self.num_tokens)
        layer, rest = self._split_layers(1) if self.num_layers > 1 else (self, [])
        head = Piece(layer.first_layer, 1, layer.first_token, layer.slot_ids[:max_places])
        tail = Piece(layer.first_layer, 1, layer.first_token + max_places, layer.slot_ids[max_places:])
        return head, [tail, *rest]

    def _split_layers(self, count: int) -> tuple[Piece, list[Piece]]:
        head = Piece(self.first_layer, count, self.first_token, self.slot_ids)
        tail = Piece(self.first_layer + count, self.num_layers - count, self.first_token, self.slot_ids)
        return head, [tail]


class JobState(enum.Enum):
    """Where a send job is in its life."""

    OPEN = "open"
    FINISHING = "finishing"
    SETTLED = "settled"


class SendJob:
    """The sender's end of one ticket. `push`, `finish` and `abort` never block."""

    def __init__(
        self, ticket: KVTicket, on_settled: Callable[[SendResult], None], janitor: Janitor, max_places: int
    ) -> None:
        self.ticket = ticket
        self._on_settled = on_settled
        self._janitor = janitor
        self._max_places = max_places
        self._lock = threading.Lock()
        self._state = JobState.OPEN
        self._pieces: deque[Piece] = deque()
        self._first: TokenOutput | None = None
        self._finished_at = 0.0
        self._gathering = False
        self._result: SendResult | None = None
        self._notify: Callable[[SendJob], None] = lambda job: None

    def attach(self, notify: Callable[[SendJob], None]) -> None:
        """Have `notify` called, under no lock, whenever there is something new to do."""
        self._notify = notify

    # -- for the engine

    def push(self, first_layer: int, num_layers: int, first_token: int, slot_ids: Sequence[int]) -> None:
        """Send the KV of tokens [first_token, first_token + len(slot_ids)) of these layers, which lies at slot_ids.

        The slots must keep their content, and the list its items, until the job is settled. TicketError
        if the tokens are not the ticket's or the layers not the model's; a settled job ignores the push.
        """
        ticket = self.ticket
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
            self._pieces.append(Piece(first_layer, num_layers, first_token, slot_ids))
        self._notify(self)

    def finish(self, first: TokenOutput) -> None:
        """Everything has been pushed: the first token follows the last piece."""
        with self._lock:
            if self._state is JobState.SETTLED:
                return
            if self._state is JobState.FINISHING:
                raise TicketError(f"ticket {self.ticket.ticket_id} was finished twice")
            self._state = JobState.FINISHING
            self._first = first
            self._finished_at = time.monotonic()
        self._notify(self)

    def abort(self, reason: str) -> None:
        """Give the ticket up; idempotent."""
        if self.settle(TicketState.ABORTED, reason):
            self._notify(self)

    # -- for the pair

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
            while self._pieces and (joined := self._joined(piece, self._pieces[0])) is not None:
                piece = joined
                self._pieces.popleft()
            piece, rest = piece.cut(self._max_places)
            self._pieces.extendleft(reversed(rest))
            self._gathering = True
            return piece

    def end_gather(self) -> bool:
        """The gather is over; whether the job still wants its piece sent."""
        with self._lock:
            self._gathering = False
            if self._state is JobState.SETTLED:
                self._report()
                return False
            return True

    def take_complete(self) -> TicketComplete | None:
        """What to say behind the last piece, once, when no piece waits any more."""
        with self._lock:
            if self._pieces or self._state is not JobState.FINISHING:
                return None
            first, self._first = self._first, None
            if first is None:
                return None
            age_s = time.monotonic() - self._finished_at
            return TicketComplete(ticket_id=self.ticket.ticket_id, first=first, first_age_s=age_s)

    @property
    def has_work(self) -> bool:
        """Whether a piece or the first token waits to be sent."""
        with self._lock:
            return bool(self._pieces) or self._first is not None

    def _joined(self, piece: Piece, other: Piece) -> Piece | None:
        if piece.num_layers * piece.num_tokens + other.num_layers * other.num_tokens > self._max_places:
            return None
        return piece.joined(other)

    def _report(self) -> None:
        if self._result is not None:
            self._janitor.call_soon(partial(self._on_settled, self._result))
