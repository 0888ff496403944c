"""Tickets: leave to write KV into named blocks, once, for one epoch of one worker.

States, of which the receiver alone decides:

    RESERVED ──first piece──> RECEIVING ──complete, and all KV home──> DELIVERED
        │                        │
        ├──lease not renewed─────┴──> EXPIRED
        └──abort, digest mismatch, lost peer, wrong piece──> ABORTED

A sender hears the verdict; one that gets no answer records LOST. The decode side grants (it
produces tickets), the prefill side sends under them, and every end is told exactly once:
`TicketGrant.on_ready` or `on_end` to the owner of the blocks, `SendResult` to the sender.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kv_transfer.layout import KVLayout
from protos import worker_pb2


class TicketState(enum.Enum):
    """Where a ticket is in its life; the values travel on the control connection."""

    RESERVED = "RESERVED"
    RECEIVING = "RECEIVING"
    DELIVERED = "DELIVERED"
    ABORTED = "ABORTED"
    EXPIRED = "EXPIRED"
    LOST = "LOST"


@dataclass(frozen=True, slots=True)
class KVTicket:
    """What the sender needs to know; travels from the decode worker to the prefill worker, over the pair between the
    two and through the router."""

    ticket_id: str
    request_id: str
    attempt: int
    worker_id: str
    """The receiver."""
    epoch: int
    control_addresses: tuple[str, ...]
    """host:port of the receiver's control listener, one per rank."""
    block_ids: tuple[int, ...]
    """The receiver's blocks for tokens [first_token, num_tokens), in order."""
    first_token: int
    """The receiver holds the KV of tokens before this one; a multiple of the block size."""
    num_tokens: int
    """End of the tokens whose KV travels, counted from the start of the sequence."""
    layout: KVLayout
    expires_in_s: float
    owner: str = ""
    """Who asked for it: a router's id."""

    def to_proto(self) -> worker_pb2.KVTicket:
        """The message that carries this ticket."""
        return worker_pb2.KVTicket(
            ticket_id=self.ticket_id,
            request_id=self.request_id,
            attempt=self.attempt,
            receiver=worker_pb2.WorkerIdentity(worker_id=self.worker_id, epoch=self.epoch),
            control_addresses=self.control_addresses,
            block_ids=self.block_ids,
            first_token=self.first_token,
            num_tokens=self.num_tokens,
            layout=self.layout.to_proto(),
            expires_in_s=self.expires_in_s,
            router_id=self.owner,
        )

    @classmethod
    def from_proto(cls, message: worker_pb2.KVTicket) -> KVTicket:
        """The ticket a message carries; ValueError if its layout is none."""
        return cls(
            ticket_id=message.ticket_id,
            request_id=message.request_id,
            attempt=message.attempt,
            worker_id=message.receiver.worker_id,
            epoch=message.receiver.epoch,
            control_addresses=tuple(message.control_addresses),
            block_ids=tuple(message.block_ids),
            first_token=message.first_token,
            num_tokens=message.num_tokens,
            layout=KVLayout.from_proto(message.layout),
            expires_in_s=message.expires_in_s,
            owner=message.router_id,
        )


@dataclass(frozen=True, slots=True)
class ReceivedKV:
    """A delivered ticket: all KV is home."""

    ticket_id: str
    first: worker_pb2.TokenOutput | None
    """The first token, as the sender computed it; None on ranks other than 0."""
    busy_s: float
    """Time the pair spent on this ticket's pieces, from each one's announcement to its being home."""
    num_bytes: int
    tail_s: float
    """First token computed to last piece home; 0 if everything was home before."""
    computed_at: float = 0.0
    """When the first token was computed, and below when the last piece came home: monotonic clock."""
    last_home: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TicketGrant:
    """What the owner of the blocks promises, and whom to tell.

    Exactly one of on_ready and on_end (ABORTED or EXPIRED, with the reason) is called, once, from a
    transfer thread, when nothing can write to the blocks under this ticket any more. Both must be
    cheap and must not block.
    """

    ticket_id: str
    request_id: str
    attempt: int
    owner: str
    """Whose heartbeat renews the lease: a router's id."""
    block_ids: tuple[int, ...]
    first_token: int
    num_tokens: int
    after: Any = None
    """On a GPU: the event behind which the blocks' last owner no longer writes to them."""
    on_ready: Callable[[ReceivedKV], None]
    on_end: Callable[[TicketState, str], None]


@dataclass(frozen=True, slots=True)
class SendResult:
    """How a ticket ended for its sender: nothing reads the sender's KV under it any more."""

    ticket_id: str
    state: TicketState
    """DELIVERED, ABORTED, EXPIRED, or LOST when the receiver gave no answer."""
    reason: str
