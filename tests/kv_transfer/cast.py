"""The test's half of `child`: processes, tickets between them, blows, and a book of what was measured.

Processes come from one fork server that has imported everything once, so that one more costs a CPU 50 ms.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any

import pytest
import torch

from kv_transfer.ticket import KVTicket, TicketState
from tests.kv_transfer import child as other_side
from tests.kv_transfer.child import LAYOUT

BOUND_S = 60.0
"""For what has no bound of its own: a busy machine fails nobody."""
TRANSPORTS = [
    "gloo",
    pytest.param(
        "nccl",
        marks=[pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")],
    ),
]
_names = itertools.count()


@dataclass(frozen=True)
class Event:
    """How a ticket ended, as one side heard it."""

    kind: str
    """ready or end at the receiver, settled at the sender."""
    what: Any
    at: float

    @property
    def state(self) -> TicketState:
        return TicketState.DELIVERED if self.kind == "ready" else self.what[0]


class Child:
    """A process that hosts nodes."""

    def __init__(self, transport: str, gpu: int, *, on_gpu: bool | None = None, **config: object) -> None:
        """Begin a process; its KV is on that GPU if the transport is NCCL, or if it is said."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([other_side.__name__])
        self._pipe, there = context.Pipe()
        on_gpu = transport == "nccl" if on_gpu is None else on_gpu
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        number = visible.split(",")[gpu] if on_gpu and visible else str(gpu)
        environment = {"CUDA_VISIBLE_DEVICES": number, "CUDA_DEVICE_MAX_CONNECTIONS": "32"} if on_gpu else {}
        settings = {"transport": transport, "piece_mib": 1, **config}
        device = "cuda:0" if on_gpu else "cpu"
        self.transport = transport
        self.process = context.Process(target=other_side.main, args=(there, environment, device, settings), daemon=True)
        self.process.start()
        there.close()
        self._answers: SimpleQueue[tuple[str, Any]] = SimpleQueue()
        self.events: defaultdict[str, SimpleQueue[Event]] = defaultdict(SimpleQueue)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def send(self, verb: str, **arguments: object) -> None:
        """Ask without waiting; `answer` follows."""
        self._pipe.send((verb, arguments))

    def answer(self) -> Any:
        kind, value = self._answers.get(timeout=BOUND_S)
        assert kind == "answer", value
        return value

    def ask(self, verb: str, **arguments: object) -> Any:
        self.send(verb, **arguments)
        return self.answer()

    def wait_for(self, name: str, condition: Callable[[Any], bool], what: str, verb: str = "stats") -> None:
        """Wait until a node's stats, or what else it is asked, fulfil a condition."""
        deadline = time.monotonic() + BOUND_S
        while not condition(found := self.ask(verb, name=name)):
            assert time.monotonic() < deadline, f"waited {BOUND_S:g} s until {what}: {found}"
            threading.Event().wait(0.01)

    def strike(self, blow: signal.Signals) -> float:
        """Send a signal; returns the time."""
        assert self.process.pid is not None
        os.kill(self.process.pid, blow)
        return time.monotonic()

    @property
    def is_alive(self) -> bool:
        return self.process.is_alive()

    def close(self) -> None:
        """Kill the process if it still runs."""
        if self.process.is_alive():
            self.process.kill()
        self.process.join(BOUND_S)
        self._reader.join(BOUND_S)
        self._pipe.close()
        self.process.close()

    def _read(self) -> None:
        try:
            while True:
                kind, *rest = self._pipe.recv()
                if kind == "event":
                    self.events[rest[1]].put(Event(rest[0], rest[2], rest[3]))
                else:
                    self._answers.put((kind, rest[0]))
        except (EOFError, OSError):
            self._answers.put(("error", "the process is gone"))


@dataclass(frozen=True)
class Node:
    """A node in a child."""

    child: Child
    name: str
    epoch: int
    address: str
    seed: int

    def stats(self) -> Any:
        return self.child.ask("stats", name=self.name)

    def pair_infos(self) -> Any:
        return self.child.ask("pair_infos", name=self.name)

    def stop(self) -> None:
        self.child.ask("stop", name=self.name)

    def meet(self, receiver: Node) -> None:
        self.child.ask("meet", name=self.name, worker_id=receiver.name, epoch=receiver.epoch, address=receiver.address)

    def await_pair(self, peer: Node) -> None:
        """Wait until a pair with a peer is ready."""
        whom = f"{peer.name}/{peer.epoch}"
        self.child.wait_for(
            self.name,
            lambda infos: any(info.peer == whom and info.state == "ready" for info in infos),
            f"the pair with {whom} is ready",
            "pair_infos",
        )

    def await_pairs(self, num_pairs: int) -> None:
        self.child.wait_for(self.name, lambda stats: stats.pairs == num_pairs, f"{num_pairs} pairs are left")


def start(child: Child, name: str, epoch: int = 1, seed: int = 0) -> Node:
    """Start a node; its KV is `child.content(seed)`."""
    return Node(child, name, epoch, child.ask("start", name=name, epoch=epoch, seed=seed), seed)


@dataclass
class Delivery:
    """One ticket between two nodes."""

    sender: Node
    receiver: Node
    ticket: KVTicket
    source_blocks: Sequence[int]
    opened_at: float = field(default_factory=time.monotonic)

    @classmethod
    def grant(
        cls, sender: Node, receiver: Node, blocks: Sequence[int], num_tokens: int, source_blocks: Sequence[int]
    ) -> Delivery:
        name = f"ticket-{next(_names)}"
        ticket = receiver.child.ask(
            "grant", name=receiver.name, ticket_id=name, num_tokens=num_tokens, blocks=list(blocks)
        )
        return cls(sender, receiver, ticket, list(source_blocks))

    @classmethod
    def open(cls, *args: Any) -> Delivery:
        """Grant it, and begin to send."""
        delivery = cls.grant(*args)
        delivery.begin()
        return delivery

    def begin(self) -> None:
        self.opened_at = time.monotonic()
        self.sender.child.ask("open", name=self.sender.name, ticket=self.ticket)

    @property
    def name(self) -> str:
        return self.ticket.ticket_id

    def parts(self, layers: range, first: int = 0, end: int | None = None) -> list[tuple[str, int, int, int]]:
        return [(self.name, layer, first, self.ticket.num_tokens if end is None else end) for layer in layers]

    def push(self, layers: range) -> None:
        self.sender.child.ask("push", blocks=self.source_blocks, parts=self.parts(layers))

    def finish(self) -> None:
        self.sender.child.ask("finish", ticket_id=self.name)

    def send_all(self) -> None:
        self.push(range(LAYOUT.num_layers))
        self.finish()

    def at_sender(self) -> Event:
        return self.sender.child.events[self.name].get(timeout=BOUND_S)

    def at_receiver(self) -> Event:
        return self.receiver.child.events[self.name].get(timeout=BOUND_S)

    def assert_delivered(self) -> float:
        """It arrives, bit for bit, and each side hears so once; returns the seconds since it was opened."""
        events = self.at_receiver(), self.at_sender()
        assert [event.kind for event in events] == ["ready", "settled"], events
        assert events[1].state is TicketState.DELIVERED, events[1]
        assert events[0].what == [7]
        assert self.receiver.child.ask(
            "is_home",
            name=self.receiver.name,
            blocks=list(self.ticket.block_ids),
            seed=self.sender.seed,
            source_blocks=self.source_blocks,
            num_tokens=self.ticket.num_tokens,
        )
        for node in (self.sender, self.receiver):
            self.assert_told_once(node)
        return max(event.at for event in events) - self.opened_at

    def assert_told_once(self, node: Node) -> None:
        with pytest.raises(Empty):
            node.child.events[self.name].get_nowait()


def record(case: str, transport: str, **measured: float) -> None:
    """Append what was measured to the file that PDSERVE_TIMES names."""
    if path := os.environ.get("PDSERVE_TIMES"):
        rounded = {name: round(value, 4) for name, value in measured.items()}
        with open(path, "a") as book:
            book.write(json.dumps({"case": case, "transport": transport, **rounded}) + "\n")


@contextmanager
def children(transport: str, gpus: Sequence[int], **config: Any) -> Iterator[list[Child]]:
    """Processes that end with the test."""
    made = [Child(transport, gpu, **config) for gpu in gpus]
    try:
        yield made
    finally:
        for child in made:
            child.close()
