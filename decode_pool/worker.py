"""The decode craft inside an engine process.

    RESERVED (kv_intake) --KV home--> RUNNING (scheduler) --last token, abort--> (gone)
    local prefill:                    RUNNING from the start
    RESERVED, RUNNING --hand back--> (gone here, HANDED_BACK to the router, which goes on with it elsewhere)
    RUNNING, resumable --router gone--> still RUNNING, an orphan (orphans.py) until it is adopted or its time is over

The engine loop's thread calls everything here.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from decode_pool.admission import Room, RoomLeft, check_room, left_in
from decode_pool.answer_lengths import AnswerLengths
from decode_pool.config import DecodeOptions
from decode_pool.kv_intake import KVIntake
from decode_pool.orphans import Key, Orphans
from engine import wire
from engine.api import FinishReason, TokenOutput
from engine.engine import Engine
from engine.errors import CapacityError
from engine.sequence import Sequence
from kv_transfer.group import Transfers
from kv_transfer.ticket import ReceivedKV
from protos import worker_pb2 as pb

log = logging.getLogger(__name__)

LOOK_EVERY_S = 0.1
"""How often it is looked at what can still be promised, if no request comes or goes."""

Emit = Callable[[str, pb.TokenOutput], None]
"""emit(router_id, output): collects what this step says to a router."""


@dataclass(slots=True)
class _Running:
    """A sequence the scheduler has, and what its first output will tell about its way here."""

    sequence: Sequence
    timing: pb.DecodeTiming = field(default_factory=pb.DecodeTiming)
    ready_at: float = 0.0
    reported: bool = False


class DecodeWorker:
    """Promises blocks, takes KV in, generates tokens."""

    def __init__(
        self,
        engine: Engine,
        node: Transfers,
        options: DecodeOptions,
        *,
        max_running: int,
        name: str,
        emit: Emit,
        on_room: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_room`: there is room, of which no output tells."""
        self._engine = engine
        self._options = options
        self._max_running = max_running
        self._name = name
        self._emit = emit
        self._lengths = AnswerLengths(options.predicted_answer_tokens)
        self.room_left = RoomLeft()
        """What could be promised when that was looked at last; any thread may read it."""
        self._looked_at = (0.0, -1)
        """When that was, and how many requests were open."""
        self._running: dict[Key, _Running] = {}
        self._intake = KVIntake(
            engine, node, on_ready=self._join, on_failed=self._failed, on_left=self._left, on_room=on_room
        )
        self._orphans = Orphans(options.orphan_grace_s)
        self._grace: threading.Timer | None = None

    def reserve(self, message: pb.ReserveRequest) -> pb.ReserveReply:
        """Promise blocks for a request.

        Raises InvalidRequestError for one that can never run here, CapacityError when there is no room now.
        """
        request = wire.request_from_wire(message.request)
        self._engine.validate(request)
        key = (request.request_id, request.attempt)
        if key in self._running or any(_key(sequence) == key for sequence in self._intake.sequences()):
            raise CapacityError(f"attempt {request.attempt} of request {request.request_id} is already running here")
        sequence = Sequence.from_request(request, time.monotonic())
        sequence.owner = message.router_id
        self._take_blocks(sequence)
        if message.local_prefill:
            self._running[key] = _Running(sequence)
            self._engine.scheduler.add(sequence)
            return pb.ReserveReply(cached_tokens=sequence.num_cached_tokens)
        sender = message.prefill if message.HasField("prefill") else None
        ticket = self._intake.reserve(sequence, self._name, sender)
        return pb.ReserveReply(ticket=ticket.to_proto(), cached_tokens=sequence.num_cached_tokens)

    def abort(self, request_id: str, attempt: int, reason: str) -> bool:
        """End all attempts of a request up to this one; False if there is none."""
        found = False
        for sequence in self._sequences():
            name, number = _key(sequence)
            if name == request_id and number <= attempt:
                if sequence.num_generated_tokens:  # a stop string, or a client that wants no more: an end as any other
                    self._lengths.add(sequence.num_generated_tokens, was_cut=False)
                found = self._end(sequence, reason) or found
        return found

    def router_gone(self, router_id: str) -> None:
        """End everything this router asked for; what is resumable and generates already becomes an orphan."""
        now = time.monotonic()
        for sequence in self._sequences():
            if sequence.owner != router_id:
                continue
            if sequence.request.resumable and _key(sequence) in self._running:
                if _key(sequence) not in self._orphans:
                    self._orphans.add(_key(sequence), now)
            else:
                self._end(sequence, f"router {router_id} is gone")
        if len(self._orphans):
            self._wait_for_adoption()

    def adopt(self, message: pb.AdoptRequest) -> bool:
        """Give a resumable request to another router, which gets all its tokens; False if it is not here any more."""
        key = (message.request_id, message.attempt)
        entry = self._running.get(key)
        if entry is None:
            ending = self._orphans.adopt(key)
            if ending is not None:
                self._emit(message.router_id, ending)
            return ending is not None
        sequence = entry.sequence
        if not sequence.request.resumable:
            return False
        if key not in self._orphans and sequence.owner != message.router_id:
            num_told = sequence.num_known_tokens - sequence.num_prompt_tokens
            moved = pb.TokenOutput(request_id=key[0], attempt=key[1], offset=num_told)
            moved.finish, moved.reason = pb.ENGINE_FINISH_MOVED, f"router {message.router_id} has adopted it"
            self._emit(sequence.owner, moved)
        self._orphans.adopt(key)
        sequence.owner = message.router_id
        self._emit(sequence.owner, _whole(sequence))
        return True

    def close(self) -> None:
        """End everything."""
        if self._grace is not None:
            self._grace.cancel()
        self._orphans.clear()
        for sequence in self._sequences():
            self._end(sequence, "the worker's epoch is over")

    def on_output(self, sequence: Sequence, output: TokenOutput) -> None:
        """The engine has new tokens, or an ending, for a sequence."""
        entry = self._running[_key(sequence)]
        message = wire.output_to_wire(output)
        if not entry.reported:
            entry.reported = True
            message.timing.CopyFrom(self._first_timing(entry))
            message.cached_tokens = min(sequence.num_cached_tokens, sequence.num_prompt_tokens)
        if output.finish_reason is not None:
            if output.finish_reason is not FinishReason.FAILED:
                cut = output.finish_reason is FinishReason.LENGTH
                self._lengths.add(sequence.num_generated_tokens, was_cut=cut)
            self._ended(sequence, output.finish_reason.value)
        if _key(sequence) not in self._orphans:
            self._emit(sequence.owner, message)
        elif output.finish_reason is not None:
            whole = _whole(sequence)
            whole.finish, whole.reason = message.finish, message.reason
            self._orphans.ended(_key(sequence), whole)

    def give_back(self, sequence: Sequence) -> bool:
        """Whether a preempted sequence goes back to its router, which is then told, instead of being computed here.

        It does if that would take long and a prefill worker can do it: one did before.
        """
        entry = self._running.get(_key(sequence))
        if entry is None or not entry.ready_at or sequence.num_known_tokens < self._options.give_back_tokens:
            return False
        if _key(sequence) in self._orphans:  # nobody would make another attempt
            return False
        self._ended(sequence, FinishReason.PREEMPTED.value)
        output = TokenOutput(
            request_id=sequence.request.request_id,
            attempt=sequence.request.attempt,
            offset=sequence.num_known_tokens - sequence.num_prompt_tokens,
            token_ids=(),
            finish_reason=FinishReason.PREEMPTED,
            reason="its blocks were needed by others",
        )
        self._emit(sequence.owner, wire.output_to_wire(output))
        return True

    def hand_back(self, reason: str) -> None:
        """Give everything back to the routers, which go on with it elsewhere: at once, or once its KV is home.

        Orphans have no router: they are left to their grace.
        """
        for entry in list(self._running.values()):
            if _key(entry.sequence) not in self._orphans:
                self._engine.scheduler.abort(entry.sequence)
                self._ended(entry.sequence, f"handed back: {reason}")
                self._left(entry.sequence)
        self._intake.hand_back()

    def look_for_room(self) -> None:
        """See what can still be promised: at once when a request came or went, else now and then."""
        now, num_open = time.monotonic(), self.num_open()
        if num_open == self._looked_at[1] and now < self._looked_at[0] + LOOK_EVERY_S:
            return
        self._looked_at = (now, num_open)
        self.room_left = left_in(self._room(), self._sequences())

    def holders(self) -> list[Sequence]:
        """Sequences that hold blocks beyond those the scheduler knows."""
        return self._intake.sequences()

    @property
    def num_reserved(self) -> int:
        """Requests whose KV is awaited; any thread may ask."""
        return self._intake.num_reserved

    def num_open(self) -> int:
        """Requests reserved or running; any thread may ask."""
        return len(self._running) + self._intake.num_reserved

    def _sequences(self) -> list[Sequence]:
        return [*(entry.sequence for entry in self._running.values()), *self._intake.sequences()]

    def _take_blocks(self, sequence: Sequence) -> None:
        """Hold blocks for the sequence's tokens and the first one to come, sharing what is cached."""
        scheduler, pool = self._engine.scheduler, self._engine.pool
        scheduler.take_prefix(sequence)
        try:
            missing = scheduler.num_blocks_for(sequence.num_tokens + 1) - len(sequence.block_ids)
            check_room(self._room(), sequence, missing, self._sequences())
            sequence.block_ids += pool.allocate(missing)
        except CapacityError:
            scheduler.release(sequence)
            raise

    def _room(self) -> Room:
        return Room(
            free_blocks=self._engine.pool.num_free,
            block_size=self._engine.scheduler.block_size,
            num_admitted=self.num_open(),
            max_admitted=self._max_running,
            expected_answer=self._lengths.expected,
            answer_margin=self._options.answer_margin,
        )

    def _end(self, sequence: Sequence, reason: str) -> bool:
        if _key(sequence) not in self._running:
            return self._intake.abort(_key(sequence), reason)
        self._engine.scheduler.abort(sequence)
        self._ended(sequence, f"aborted: {reason}")
        self._orphans.forget(_key(sequence))
        return True

    def _wait_for_adoption(self) -> None:
        """Come back when the first orphan's time is over."""
        if self._grace is not None:
            return
        loop = self._engine.loop
        self._grace = threading.Timer(self._orphans.grace_s, lambda: loop.post(self._end_expired))
        self._grace.name, self._grace.daemon = "orphans' grace", True
        self._grace.start()

    def _end_expired(self) -> None:
        self._grace = None
        for key in self._orphans.expired(time.monotonic()):
            entry = self._running.get(key)
            if entry is not None:
                self._end(entry.sequence, "nobody adopted it")
        if len(self._orphans):
            self._wait_for_adoption()

    def _ended(self, sequence: Sequence, how: str) -> None:
        """The sequence is no longer run here."""
        request = sequence.request
        del self._running[_key(sequence)]
        log.info(
            "decode ended",
            extra={
                "request_id": request.request_id,
                "attempt": request.attempt,
                "num_generated_tokens": sequence.num_generated_tokens,
                "num_preemptions": sequence.num_preemptions,
                "how": how,
            },
        )

    def _join(self, sequence: Sequence, received: ReceivedKV) -> None:
        """The KV is home: the sequence is about to join the batch."""
        timing = pb.DecodeTiming(
            transfer_tail_s=received.tail_s, transfer_busy_s=received.busy_s, transfer_bytes=received.num_bytes
        )
        self._running[_key(sequence)] = _Running(sequence, timing, ready_at=time.monotonic())

    def _left(self, sequence: Sequence) -> None:
        """The sequence has gone from here: its router is told, and has been told all its tokens."""
        output = pb.TokenOutput(
            request_id=sequence.request.request_id,
            attempt=sequence.request.attempt,
            offset=sequence.num_known_tokens - sequence.num_prompt_tokens,
            finish=pb.ENGINE_FINISH_HANDED_BACK,
            reason="its worker leaves or has changed its role",
        )
        self._emit(sequence.owner, output)

    def _failed(self, sequence: Sequence, reason: str) -> None:
        """The KV never came: the router must try again."""
        output = TokenOutput(
            request_id=sequence.request.request_id,
            attempt=sequence.request.attempt,
            offset=sequence.num_generated_tokens,
            token_ids=(),
            finish_reason=FinishReason.FAILED,
            reason=reason,
        )
        self._emit(sequence.owner, wire.output_to_wire(output))

    @staticmethod
    def _first_timing(entry: _Running) -> pb.DecodeTiming:
        now, sequence = time.monotonic(), entry.sequence
        if entry.ready_at:
            entry.timing.first_step_s = now - entry.ready_at
        else:
            first_step_at = sequence.first_step_at or now
            entry.timing.queue_s = first_step_at - sequence.came_at
            entry.timing.prefill_s = now - first_step_at
        return entry.timing


def _whole(sequence: Sequence) -> pb.TokenOutput:
    """All tokens generated so far, without log-probabilities."""
    request = sequence.request
    tokens = sequence.token_ids[sequence.num_prompt_tokens : sequence.num_known_tokens]
    return pb.TokenOutput(
        request_id=request.request_id,
        attempt=request.attempt,
        token_ids=tokens,
        cached_tokens=min(sequence.num_cached_tokens, sequence.num_prompt_tokens),
    )


def _key(sequence: Sequence) -> Key:
    return (sequence.request.request_id, sequence.request.attempt)
