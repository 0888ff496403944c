"""Sends one prompt's KV to the holder of its ticket while the prompt is being computed.

    PUSHING --finish--> FINISHED --settled--> (gone)
        '------abort----> ABORTED --settled--> (gone)

The engine loop's thread calls everything; nothing here blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from engine.batch import ScheduledSequence
from engine.sequence import Sequence
from kv_transfer.fan_out import Outlet
from kv_transfer.staging import SlotIds, slots_of
from kv_transfer.ticket import KVTicket
from protos import worker_pb2 as pb
from protos.transfer_pb2 import PushNote


class KVPush:
    """What of a sequence's KV still has to leave, and how."""

    def __init__(
        self, sequence: Sequence, ticket: KVTicket, outlet: Outlet, *, num_layers: int, block_size: int
    ) -> None:
        self._sequence = sequence
        self._ticket_id = ticket.ticket_id
        self._outlet = outlet
        self._num_layers = num_layers
        self._block_size = block_size
        self._next_token = ticket.first_token
        """Tokens before this one have been pushed in every layer, or are not wanted."""

    def begin_step(self, share: ScheduledSequence, note: PushNote | None) -> StepPush | None:
        """What to push of this step's tokens; first sends what the prefix cache already held.

        The note tells the worker's other ranks the same; None: there are none.
        """
        if share.start > self._next_token:
            first, self._next_token = self._next_token, share.start
            self._outlet.push(0, self._num_layers, first, self._slots(first, share.start))
            self._tell(note, first, share.start, is_there=True)
        end = share.start + share.num_tokens
        if end <= self._next_token:
            return None
        first, self._next_token = self._next_token, end
        self._tell(note, first, end, is_there=False)
        return StepPush(self._outlet, self._num_layers, first, self._slots(first, end))

    def must_pause(self, on_room: Callable[[], None]) -> bool:
        """Whether the receiver is so far behind that no more should be computed for it until `on_room` is called."""
        return self._outlet.must_pause(on_room)

    def finish(self, first: pb.TokenOutput) -> None:
        """The prompt is computed: the first token follows the last piece."""
        self._outlet.finish(first)

    def abort(self, reason: str) -> None:
        """Send nothing more than what is announced."""
        self._outlet.abort(reason)

    def _tell(self, note: PushNote | None, start: int, end: int, *, is_there: bool) -> None:
        if note is None:
            return
        note.pushes.add(
            ticket_id=self._ticket_id,
            first_token=start,
            num_tokens=end - start,
            block_ids=self._blocks(start, end),
            is_there=is_there,
        )

    def _slots(self, start: int, end: int) -> SlotIds:
        return slots_of(self._blocks(start, end), self._block_size, start % self._block_size, end - start)

    def _blocks(self, start: int, end: int) -> list[int]:
        """Those that hold tokens [start, end)."""
        return self._sequence.block_ids[start // self._block_size : -(-end // self._block_size)]


class StepPush:
    """The tokens of one sequence that one step adds to its push: some layers at a time, as the outlet likes best."""

    def __init__(self, outlet: Outlet, num_layers: int, first_token: int, slot_ids: SlotIds) -> None:
        self._outlet = outlet
        self._first_token = first_token
        self._slot_ids = slot_ids
        self._next_layer = 0
        at_once = outlet.layers_at_once(len(slot_ids))
        self.layers = frozenset([*range(at_once - 1, num_layers, at_once), num_layers - 1])
        """Those behind which something is pushed."""

    def layer_written(self, layer: int, event: Any) -> None:
        """The step's KV of all layers up to this one is in the cache once the event has come."""
        if layer in self.layers:
            first, self._next_layer = self._next_layer, layer + 1
            self._outlet.push(first, self._next_layer - first, self._first_token, self._slot_ids, event)
