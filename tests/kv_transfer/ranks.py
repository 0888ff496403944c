"""Workers of several ranks: one node a rank, all in this process, and tickets between them."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from kv_transfer.fan_out import Outlet
from kv_transfer.layout import KVLayout
from kv_transfer.node import TransferNode
from kv_transfer.ticket import KVTicket, ReceivedKV, SendResult, TicketState
from tests.kv_transfer.conftest import BOUND_S, LAYOUT, Delivery, Make, Memory, first_token_of, offer, slots


@dataclass
class Worker:
    """The ranks of one worker."""

    nodes: list[TransferNode]
    memories: list[Memory]
    layouts: list[KVLayout]


def whole_kv(num_heads: int, seed: int) -> torch.Tensor:
    """The KV of all heads of the model: [num_layers, 2, num_slots, num_heads, head_dim]."""
    return Memory(replace(LAYOUT, num_kv_heads=num_heads), seed=seed).kv


def make_worker(
    make_node: Make, name: str, num_heads: int, size: int, kv: torch.Tensor | None = None, **overrides: object
) -> Worker:
    """Start a worker; `kv` is what its ranks hold together."""
    layouts = [replace(LAYOUT, num_kv_heads=num_heads, tp_rank=rank, tp_size=size) for rank in range(size)]
    memories = [Memory(layout) for layout in layouts]
    for layout, memory in zip(layouts, memories, strict=True):
        if kv is not None:
            memory.kv.copy_(kv[:, :, :, layout.first_head : layout.first_head + layout.num_local_heads])
    nodes = [
        make_node(f"{name}", memory, layout=layout, **overrides)
        for layout, memory in zip(layouts, memories, strict=True)
    ]
    return Worker(nodes, memories, layouts)


@dataclass
class Shared:
    """One ticket of a worker of several ranks, and what each rank heard of it."""

    ticket: KVTicket
    received: list[queue.SimpleQueue[ReceivedKV | tuple[TicketState, str]]]
    sent: list[queue.SimpleQueue[SendResult]]
    jobs: list[Outlet] = field(default_factory=list)

    def at_receivers(self) -> list[ReceivedKV | tuple[TicketState, str]]:
        return [told.get(timeout=BOUND_S) for told in self.received]

    def at_senders(self) -> list[SendResult]:
        return [told.get(timeout=BOUND_S) for told in self.sent]

    def assert_told_once(self) -> None:
        assert all(told.empty() for told in [*self.received, *self.sent])


def offer_shared(sender: Worker, receiver: Worker, num_tokens: int, block_ids: Sequence[int]) -> Shared:
    """Have every rank of a receiver grant one ticket, and every rank of a sender open it."""
    deliveries: list[Delivery] = []
    for node in receiver.nodes:
        name = deliveries[0].ticket.ticket_id if deliveries else None
        deliveries.append(offer(node, num_tokens, block_ids, name=name))
    addresses = tuple(address for delivery in deliveries for address in delivery.ticket.control_addresses)
    ticket = replace(deliveries[0].ticket, control_addresses=addresses)
    shared = Shared(ticket, [delivery.received for delivery in deliveries], [queue.SimpleQueue() for _ in sender.nodes])
    for node, told in zip(sender.nodes, shared.sent, strict=True):
        shared.jobs.append(node.open_send(ticket, told.put))
    return shared


def push(shared: Shared, blocks: Sequence[int], first_token: int, end_token: int, *, finish: bool) -> None:
    """Every rank of the sender pushes its KV of these tokens, layer by layer."""
    for rank, job in enumerate(shared.jobs):
        for layer in range(LAYOUT.num_layers):
            job.push(layer, 1, first_token, slots(blocks, first_token, end_token))
        if finish:
            first = first_token_of(Delivery(None, shared.ticket, None))  # type: ignore[arg-type]
            job.finish(first if rank == 0 else None)
