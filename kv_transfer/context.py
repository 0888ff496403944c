"""What the pairs of one node share."""

from __future__ import annotations

import threading
from dataclasses import asdict, dataclass

from kv_transfer.config import TransferConfig
from kv_transfer.handshake import Handshake, Identity
from kv_transfer.layout import KVLayout
from kv_transfer.ledger import TicketLedger
from kv_transfer.staging import KVMemory, StagingPool
from kv_transfer.timers import Janitor
from kv_transfer.transport import ChannelOptions, Side

MIB = 1 << 20


@dataclass(slots=True)
class TransferStats:
    """Counters since the node started, and what is open now."""

    open_tickets: int = 0
    """Granted here and not ended."""
    open_sends: int = 0
    """Send jobs not settled."""
    pairs: int = 0
    """Pairs of either direction that are made or being made."""
    sent_bytes: int = 0
    received_bytes: int = 0
    sent_pieces: int = 0
    received_pieces: int = 0
    dropped_pieces: int = 0
    """Received for a ticket that had ended; nothing was written."""
    digest_mismatches: int = 0
    lost_peers: int = 0
    refused_pairs: int = 0
    """Dialled this node and were refused."""


class Counters:
    """The counters of a node, counted by many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stats = TransferStats()

    def add(self, **counts: int) -> None:
        """Add to the counters named."""
        with self._lock:
            for name, count in counts.items():
                setattr(self._stats, name, getattr(self._stats, name) + count)

    def read(self, *, open_tickets: int, open_sends: int, pairs: int) -> TransferStats:
        """A copy, completed with what is open now."""
        with self._lock:
            now = {"open_tickets": open_tickets, "open_sends": open_sends, "pairs": pairs}
            return TransferStats(**(asdict(self._stats) | now))


@dataclass(frozen=True, slots=True)
class NodeContext:
    """Handed to every pair of a node."""

    identity: Identity
    layout: KVLayout
    memory: KVMemory
    config: TransferConfig
    handshake: Handshake
    ledger: TicketLedger
    janitor: Janitor
    counters: Counters

    @property
    def piece_bytes(self) -> int:
        """Most bytes of a piece that this node sends."""
        return max(self.config.piece_mib * MIB, self.layout.bytes_per_token_layer)

    def new_staging(self) -> StagingPool:
        """Staging for one end of a pair."""
        return StagingPool(quota_bytes=self.config.staging_mib * MIB, piece_bytes=self.piece_bytes)

    def channel_options(self, side: Side) -> ChannelOptions:
        """What the transport of one end needs to know."""
        return ChannelOptions(
            side=side,
            host=self.config.host,
            connect_timeout_s=self.config.connect_timeout_s,
            transfer_timeout_s=self.config.peer_timeout_s,
        )
