"""What the pairs of one node share."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace

import torch

from kv_transfer.config import (
    CPU_PIECE_MIB,
    CPU_STAGING_PIECES,
    GPU_PIECE_MIB,
    GPU_STAGING_PIECES,
    TransferConfig,
)
from kv_transfer.digest import Digester
from kv_transfer.handshake import Handshake, Identity, Means
from kv_transfer.lane import Lane, make_lane
from kv_transfer.layout import KVLayout
from kv_transfer.ledger import TicketLedger
from kv_transfer.staging import KVMemory, StagingPool
from kv_transfer.timers import Janitor
from kv_transfer.transport import ChannelOptions, Side
from protos import worker_pb2

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class PairInfo:
    """One pair of a node, for those who look in."""

    peer: str
    """worker/epoch, and the rank where there are several."""
    direction: str
    """to or from."""
    state: str
    transport: str = ""
    latency_s: float = 0.0
    """What the self-test gave; 0 before it."""
    bytes_per_s: float = 0.0
    is_slow: bool = False
    """The sender's judgement of the self-test."""

    def to_proto(self) -> worker_pb2.PairInfo:
        """The message that describes this pair."""
        return worker_pb2.PairInfo(
            peer=self.peer,
            direction=self.direction,
            state=self.state,
            transport=self.transport,
            latency_s=self.latency_s,
            bytes_per_s=self.bytes_per_s,
            is_slow=self.is_slow,
        )


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
    slow_pairs: int = 0
    """Failed their self-test: far slower than the link should be."""
    retired_pairs: int = 0
    """Closed because they idled."""


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
            return replace(self._stats, open_tickets=open_tickets, open_sends=open_sends, pairs=pairs)


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
        config = self.config
        if config.piece_mib is not None:
            num_bytes = config.piece_mib * MIB
        else:
            num_bytes = (GPU_PIECE_MIB if self.memory.device.type == "cuda" else CPU_PIECE_MIB) * MIB
            if config.staging_mib is not None:
                num_bytes = min(num_bytes, config.staging_mib * MIB // 2)
        return max(num_bytes, self.layout.bytes_per_token_layer)

    @property
    def staging_bytes(self) -> int:
        """Quota of one end of a pair."""
        if self.config.staging_mib is not None:
            return self.config.staging_mib * MIB
        num_pieces = GPU_STAGING_PIECES if self.memory.device.type == "cuda" else CPU_STAGING_PIECES
        return num_pieces * self.piece_bytes

    def equip(self, side: Side, transport: str) -> Equipment:
        """What one end of a pair works with."""
        device, config = self.memory.device, self.config
        on_gpu = transport == "nccl"
        place = device if on_gpu else torch.device("cpu")
        pinned = device.type == "cuda" and not on_gpu
        return Equipment(
            lane=make_lane(device),
            staging=StagingPool(
                quota_bytes=self.staging_bytes, piece_bytes=self.piece_bytes, device=place, pinned=pinned
            ),
            digester=Digester(config, on_gpu=on_gpu),
            channel=ChannelOptions(
                side=side,
                host=config.host,
                connect_timeout_s=config.connect_timeout_s,
                transfer_timeout_s=config.peer_timeout_s,
                device=place,
                max_ctas=config.max_ctas,
            ),
        )


@dataclass(frozen=True, slots=True)
class Equipment:
    """What one end of a pair works with; it belongs to its data thread."""

    lane: Lane
    staging: StagingPool
    digester: Digester
    channel: ChannelOptions


def means_of(memory: KVMemory, config: TransferConfig) -> Means:
    """What a node with this memory can carry KV with."""
    on_gpu = memory.device.type == "cuda"
    transport = ("nccl" if on_gpu else "gloo") if config.transport == "auto" else config.transport
    gpu = str(torch.cuda.get_device_properties(memory.device).uuid) if on_gpu else ""
    return Means(transport, config.transport == "auto", gpu)
