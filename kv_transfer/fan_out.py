"""One ticket over several pairs: unequal tensor parallelism, where a rank's heads go to more than one rank.

Everything pushed goes to every part. The ticket is DELIVERED when every part is; the first part that ends otherwise
aborts the rest, and how it ended is the result, told when the last part has settled.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from kv_transfer.errors import TransferError
from kv_transfer.jobs import SendJob
from kv_transfer.staging import SlotIds
from kv_transfer.ticket import KVTicket, SendResult, TicketState
from protos.worker_pb2 import TokenOutput

OnSettled = Callable[[SendResult], None]


class Outlet(Protocol):
    """Where a prompt's KV goes as it is computed: a `SendJob`, or several."""

    def layers_at_once(self, num_tokens: int) -> int:
        """How many layers of so many tokens are best pushed together: at least 1."""

    def push(self, first_layer: int, num_layers: int, first_token: int, slot_ids: SlotIds, after: Any = None) -> None:
        """Send this KV once the event `after` has come."""

    def finish(self, first: TokenOutput | None) -> None:
        """Everything has been pushed."""

    def abort(self, reason: str) -> None:
        """Give the ticket up; idempotent."""

    def must_pause(self, on_room: Callable[[], None]) -> bool:
        """Whether nothing more should be computed for this ticket until `on_room` is called."""


class FanOut:
    """The parts of one ticket."""

    def __init__(
        self, ticket: KVTicket, openers: Sequence[Callable[[OnSettled], SendJob]], on_settled: OnSettled
    ) -> None:
        self._ticket_id = ticket.ticket_id
        self._on_settled = on_settled
        self._lock = threading.Lock()
        self._num_open = len(openers)
        self._failure: SendResult | None = None
        self._jobs: list[SendJob] = []
        try:
            for opener in openers:
                self._jobs.append(opener(self._part_settled))
        except TransferError as error:
            self.abort(f"another part could not be opened: {error}")
            raise
        if self._failure is not None:  # a part had ended before the others were there
            self.abort(f"another part ended {self._failure.state.value}: {self._failure.reason}")

    def layers_at_once(self, num_tokens: int) -> int:
        """As the part says whose pieces hold the fewest."""
        return min(job.layers_at_once(num_tokens) for job in self._jobs)

    def push(self, first_layer: int, num_layers: int, first_token: int, slot_ids: SlotIds, after: Any = None) -> None:
        """Push to every part."""
        for job in self._jobs:
            job.push(first_layer, num_layers, first_token, slot_ids, after)

    def finish(self, first: TokenOutput | None) -> None:
        """Finish every part; the first token goes to the first of them, which is rank 0's."""
        for index, job in enumerate(self._jobs):
            job.finish(first if index == 0 else None)

    def abort(self, reason: str) -> None:
        """Abort every part."""
        for job in self._jobs:
            job.abort(reason)

    def must_pause(self, on_room: Callable[[], None]) -> bool:
        """Pause for the first part that is behind."""
        return any(job.must_pause(on_room) for job in self._jobs)

    def _part_settled(self, result: SendResult) -> None:
        """On the janitor's thread."""
        with self._lock:
            self._num_open -= 1
            is_last = self._num_open == 0
            is_first_failure = result.state is not TicketState.DELIVERED and self._failure is None
            if is_first_failure:
                self._failure = result
        if is_first_failure:
            self.abort(f"another part ended {result.state.value}: {result.reason}")
        if is_last:
            self._on_settled(self._failure or SendResult(self._ticket_id, TicketState.DELIVERED, ""))
