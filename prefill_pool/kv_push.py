"""Sends one prompt's KV to the holder of its ticket while the prompt is being computed.

    PUSHING --finish--> FINISHED --settled--> (gone)
        '------abort----> ABORTED --settled--> (gone)

The engine loop's thread calls everything; nothing here blocks.
"""

from __future__ import annotations

from engine.batch import ScheduledSequence
from engine.sequence import Sequence
from kv_transfer.jobs import SendJob
from kv_transfer.ticket import KVTicket
from protos import worker_pb2 as pb


class KVPush:
    """What of a sequence's KV still has to leave, and how."""

    def __init__(self, sequence: Sequence, ticket: KVTicket, job: SendJob, *, num_layers: int, block_size: int) -> None:
        self._sequence = sequence
        self._job = job
        self._num_layers = num_layers
        self._block_size = block_size
        self._next_token = ticket.first_token
        """Tokens before this one have been pushed in every layer, or are not wanted."""

    def begin_step(self, share: ScheduledSequence) -> StepPush | None:
        """What to push of this step's tokens; first sends what the prefix cache already held."""
        if share.start > self._next_token:
            slots = self._slots(self._next_token, share.start)
            for layer in range(self._num_layers):
                self._job.push(layer, 1, self._next_token, slots)
            self._next_token = share.start
        end = share.start + share.num_tokens
        if end <= self._next_token:
            return None
        first, self._next_token = self._next_token, end
        return StepPush(self._job, first, self._slots(first, end))

    def finish(self, first: pb.TokenOutput) -> None:
        """The prompt is computed: the first token follows the last piece."""
        self._job.finish(first)

    def abort(self, reason: str) -> None:
        """Send nothing more than what is announced."""
        self._job.abort(reason)

    def _slots(self, start: int, end: int) -> list[int]:
        size, blocks = self._block_size, self._sequence.block_ids
        return [blocks[token // size] * size + token % size for token in range(start, end)]


class StepPush:
    """The tokens of one sequence that one step adds to its push."""

    def __init__(self, job: SendJob, first_token: int, slot_ids: list[int]) -> None:
        self._job = job
        self._first_token = first_token
        self._slot_ids = slot_ids

    def layer_written(self, layer: int) -> None:
        """This layer's KV of the step is in the cache."""
        self._job.push(layer, 1, self._first_token, self._slot_ids)
