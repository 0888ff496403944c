"""Two engines' memories, nodes over them, and tickets between them."""

from __future__ import annotations

import itertools
import queue
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from kv_transfer import loopback
from kv_transfer.config import TransferConfig
from kv_transfer.jobs import SendJob
from kv_transfer.layout import KVLayout
from kv_transfer.node import TransferNode
from kv_transfer.ticket import KVTicket, ReceivedKV, SendResult, TicketGrant, TicketState
from kv_transfer.transport import ChannelOptions
from protos.rendezvous import Rendezvous
from protos.worker_pb2 import TokenOutput

collect_ignore = [] if find_spec("hypothesis") else ["test_jobs.py", "test_layout.py"]

LAYOUT = KVLayout("tiny", num_layers=3, block_size=8, num_kv_heads=2, head_dim=4, dtype="float32")
TICKET = KVTicket("t", "r", 1, "w", 1, ("127.0.0.1:1",), tuple(range(8)), 0, 64, LAYOUT, 30.0)
FIRST = TokenOutput(request_id="r", token_ids=[7])
SECRET = b"a cluster secret"
BOUND_S = 10.0
"""Five times the two seconds within which each living side settles."""


class Memory:
    """An engine's KV: [num_layers, 2, num_slots, num_heads, head_dim]. Gates let a test hold a copy up."""

    def __init__(self, layout: KVLayout, num_blocks: int = 64, seed: int | None = None) -> None:
        shape = (layout.num_layers, 2, num_blocks * layout.block_size, layout.num_local_heads, layout.head_dim)
        self.kv = torch.zeros(shape, dtype=getattr(torch, layout.dtype))
        if seed is not None:
            self.kv = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.kv.dtype)
        self.gather_gate, self.scatter_gate = threading.Event(), threading.Event()
        self.gathering, self.scattering = threading.Event(), threading.Event()
        self.gather_gate.set()
        self.scatter_gate.set()
        self.num_gathers = 0

    @property
    def device(self) -> torch.device:
        return self.kv.device

    def locate(self, slot_ids: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(slot_ids)

    def gather(self, first_layer: int, num_layers: int, places: torch.Tensor, heads: range, out: torch.Tensor) -> None:
        self.num_gathers += 1
        self.gathering.set()
        assert self.gather_gate.wait(BOUND_S)
        layers = self.kv[first_layer : first_layer + num_layers, :, :, heads.start : heads.stop]
        out.copy_(layers[:, :, places])

    def scatter(
        self, first_layer: int, num_layers: int, places: torch.Tensor, heads: range, data: torch.Tensor
    ) -> None:
        self.scattering.set()
        assert self.scatter_gate.wait(BOUND_S)
        layers = self.kv[first_layer : first_layer + num_layers, :, :, heads.start : heads.stop]
        layers[:, :, places] = data


@dataclass
class Delivery:
    """How one ticket ended, as both owners heard it."""

    grant: TicketGrant
    ticket: KVTicket
    received: queue.SimpleQueue[ReceivedKV | tuple[TicketState, str]]
    sent: queue.SimpleQueue[SendResult] = field(default_factory=queue.SimpleQueue)

    def at_receiver(self) -> ReceivedKV | tuple[TicketState, str]:
        return self.received.get(timeout=BOUND_S)

    def at_sender(self) -> SendResult:
        return self.sent.get(timeout=BOUND_S)

    def assert_delivered(self) -> ReceivedKV:
        received = self.at_receiver()
        assert isinstance(received, ReceivedKV), received
        result = self.at_sender()
        assert result.state is TicketState.DELIVERED, result
        self.assert_told_once()
        return received

    def assert_told_once(self) -> None:
        assert self.received.empty()
        assert self.sent.empty()


_names = itertools.count()


def offer(
    receiver: TransferNode,
    num_tokens: int,
    block_ids: Sequence[int],
    *,
    first_token: int = 0,
    owner: str = "router",
    received: queue.SimpleQueue[ReceivedKV | tuple[TicketState, str]] | None = None,
    name: str | None = None,
) -> Delivery:
    """Have a node grant a ticket for tokens [first_token, num_tokens)."""
    name = name or f"ticket-{next(_names)}"
    told = queue.SimpleQueue() if received is None else received
    grant = TicketGrant(
        ticket_id=name,
        request_id=f"request of {name}",
        attempt=1,
        owner=owner,
        block_ids=tuple(block_ids),
        first_token=first_token,
        num_tokens=num_tokens,
        on_ready=told.put,
        on_end=lambda state, reason: told.put((state, reason)),
    )
    return Delivery(grant, receiver.grant(grant), told)


def slots(block_ids: Sequence[int], first_token: int, num_tokens: int, block_size: int = 8) -> np.ndarray:
    """Slots of tokens [first_token, num_tokens) of a sequence whose first token lies in block_ids[0]."""
    tokens = np.arange(first_token, num_tokens)
    return np.asarray(block_ids, dtype=np.int64)[tokens // block_size] * block_size + tokens % block_size


def first_token_of(delivery: Delivery) -> TokenOutput:
    return TokenOutput(request_id=delivery.ticket.request_id, attempt=1, offset=0, token_ids=[7])


def send_all(
    sender: TransferNode, delivery: Delivery, source_blocks: Sequence[int], chunks: Sequence[int] | None = None
) -> SendJob:
    """Push a whole ticket, chunk by chunk and layer by layer, as a prefill does."""
    ticket = delivery.ticket
    job = sender.open_send(ticket, delivery.sent.put)
    start = ticket.first_token
    for size in chunks or [ticket.num_tokens - start]:
        for layer in range(ticket.layout.num_layers):
            job.push(layer, 1, start, slots(source_blocks, start, start + size))
        start += size
    job.finish(first_token_of(delivery))
    return job


Make = Callable[..., TransferNode]


@pytest.fixture
def config() -> TransferConfig:
    return TransferConfig(transport="loopback", heartbeat_s=0.1, peer_timeout_s=2.0)


@pytest.fixture
def make_node(config: TransferConfig) -> Iterator[Make]:
    """Makes started nodes, stopped and checked afterwards: make_node(worker_id, memory, **overrides)."""
    nodes: list[TransferNode] = []

    def make(
        worker_id: str,
        memory: Memory,
        *,
        epoch: int = 1,
        layout: KVLayout = LAYOUT,
        secret: bytes = SECRET,
        **overrides: object,
    ) -> TransferNode:
        node = TransferNode(
            worker_id=worker_id,
            epoch=epoch,
            layout=layout,
            memory=memory,
            config=replace(config, **overrides),
            secret=secret,
        )
        node.start()
        nodes.append(node)
        return node

    yield make
    for node in nodes:
        node.check_integrity()
        node.stop()
        node.check_integrity(idle=True)


@pytest.fixture
def small_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel must not swallow what a receiver does not take: its buffers may grow to 32 MiB."""

    def accept(options: ChannelOptions, store: Rendezvous) -> socket.socket:
        sock = honest(options, store)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        return sock

    honest = loopback._accept
    monkeypatch.setattr(loopback, "_accept", accept)


@dataclass
class Two:
    """A sender and a receiver in one process."""

    sender: TransferNode
    receiver: TransferNode
    source: Memory
    target: Memory

    def assert_same(self, source_blocks: Sequence[int], target_blocks: Sequence[int], first: int, end: int) -> None:
        """Tokens [first, end) are equal in both memories; the target's blocks start at token first."""
        here = self.source.kv[:, :, slots(source_blocks, first, end)]
        there = self.target.kv[:, :, slots(target_blocks, 0, end - first)]
        assert torch.equal(here, there)


@pytest.fixture(params=["loopback", "gloo"])
def two(request: pytest.FixtureRequest, make_node: Make) -> Two:
    source, target = Memory(LAYOUT, seed=1), Memory(LAYOUT)
    sender = make_node("prefill", source, transport=request.param)
    receiver = make_node("decode", target, transport=request.param)
    return Two(sender, receiver, source, target)
