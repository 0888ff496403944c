"""Tickets without a router: the receiver grants blocks again and again, the sender fills them with KV that is there.

The sender reads the same blocks for every ticket. On both sides it is the product's own `TransferNode`.
"""

from __future__ import annotations

import itertools
import queue
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.transfer_side import Side
from kv_transfer.config import TransferConfig
from kv_transfer.digest import Digester
from kv_transfer.node import TransferNode
from kv_transfer.staging import SlotIds, slots_of
from kv_transfer.ticket import KVTicket, ReceivedKV, SendResult, TicketGrant, TicketState
from protos import worker_pb2 as pb

SECRET = b"benchmark"
WAIT_S = 30.0
"""Bound of every wait for a ticket or for its end."""
PATIENCE_S = 20.0
"""The node's own timeouts: a machine that is shared must not look like a lost peer."""
POLL_S = 0.05
CATCH_UP_S = 0.05
"""A sender that is paced and further behind than this does not try to catch up."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A ticket that was delivered, seen from its receiver."""

    ticket_id: str
    moment: float
    """On the monotonic clock, which the processes of one machine share."""
    num_bytes: int
    busy_s: float


@dataclass(frozen=True, slots=True)
class Pushed:
    """A ticket that was filled, seen from its sender."""

    ticket_id: str
    moment: float
    """Before the first push."""


class Node:
    """One side's transfer node, and the tickets that the benchmark itself grants or fills."""

    def __init__(self, side: Side) -> None:
        self._side = side
        self._epochs = itertools.count(1)
        self._numbers = itertools.count(1)
        self._kind = ""
        self.node: TransferNode | None = None
        self._source: list[int] = []
        self._granted: list[list[int]] = []
        self._arrivals: list[Arrival] = []
        self._failures: list[str] = []
        self._changed = threading.Condition()
        self._pushing: threading.Thread | None = None
        self._stop = threading.Event()
        self._pushed: list[Pushed] = []

    def open(self, ctas: int, piece_mib: int | None = None, digest: Any = "auto") -> float:
        """Start a node on the side's memory; seconds that a first digest took, which no figure is to pay for."""
        self.close()
        first_digest_s = self._first_digest()
        epoch = next(self._epochs)
        config = TransferConfig(
            digest=digest,
            max_ctas=ctas,
            piece_mib=piece_mib,
            peer_timeout_s=PATIENCE_S,
            settle_timeout_s=PATIENCE_S,
            connect_timeout_s=PATIENCE_S,
        )
        self.node = TransferNode(
            worker_id=self._side.name,
            epoch=epoch,
            layout=self._side.layout,
            memory=self._side.memory,
            config=config,
            secret=SECRET,
        )
        self._kind = f"tickets {epoch}"
        self._failures.clear()
        self.node.start()
        return first_digest_s

    def close(self) -> None:
        """Stop the node; blocks go back."""
        if self.node is None:
            return
        self.node.stop()
        self.node = None
        for blocks in [self._source, *self._granted]:
            self._side.release(blocks)
        self._source, self._granted = [], []

    def traffic(self) -> dict[str, Any]:
        """Counters of the node, and when they were read."""
        assert self.node is not None, "the node is open"
        stats = self.node.stats()
        return {
            "moment": time.monotonic(),
            "received_bytes": stats.received_bytes,
            "received_pieces": stats.received_pieces,
            "digest_mismatches": stats.digest_mismatches,
            "pairs": [(info.latency_s, info.bytes_per_s) for info in self.node.pair_infos()],
        }

    # -- the receiver

    def grant(self, num_tickets: int, num_tokens: int, again: bool = True) -> None:
        """Grant so many tickets; `again`: each one anew when it was delivered, until the node is closed."""
        self._arrivals.clear()
        for _ in range(num_tickets):
            blocks = self._side.allocate(num_tokens)
            random.Random(len(self._granted)).shuffle(blocks)
            self._granted.append(blocks)
            self._side.post(partial(self._grant, blocks, num_tokens, again))

    def arrivals(self, count: int = 0) -> list[Arrival]:
        """Tickets delivered since they were last asked for, at least `count`."""
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._arrivals) >= count or self._failures, WAIT_S):
                raise TimeoutError(f"{len(self._arrivals)} of {count} tickets were delivered within {WAIT_S:g} s")
            arrivals = list(self._arrivals)
            self._arrivals.clear()
        self._raise_failures()
        return arrivals

    def forget_grants(self) -> None:
        """Give the blocks of tickets that were delivered and not granted anew back."""
        for blocks in self._granted:
            self._side.release(blocks)
        self._granted = []

    def _grant(self, blocks: list[int], num_tokens: int, again: bool) -> None:
        node = self.node
        if node is None:
            return
        name = f"bench-{self._kind}-{next(self._numbers)}"

        def ready(received: ReceivedKV) -> None:
            arrival = Arrival(received.ticket_id, time.monotonic(), received.num_bytes, received.busy_s)
            with self._changed:
                self._arrivals.append(arrival)
                self._changed.notify_all()
            if again:
                self._side.post(partial(self._grant, blocks, num_tokens, again))

        ticket = node.grant(
            TicketGrant(
                ticket_id=name,
                request_id=name,
                attempt=0,
                owner="benchmark",
                block_ids=tuple(blocks),
                first_token=0,
                num_tokens=num_tokens,
                after=self._side.mark(),
                on_ready=ready,
                on_end=lambda state, reason: self._ended(name, state, reason),
            )
        )
        self._side.link.send(self._kind, ticket.to_proto().SerializeToString())

    def _ended(self, name: str, state: TicketState, reason: str) -> None:
        if "stops" in reason:  # this node does
            return
        with self._changed:
            self._failures.append(f"ticket {name} ended {state.value}: {reason}")
            self._changed.notify_all()

    # -- the sender

    def push(self, count: int | None, seconds: float = WAIT_S) -> list[Pushed]:
        """Fill tickets as fast as they are taken until so many are filled or the time is over; returns when all are."""
        self._stop.clear()
        return self._push_all(count, time.monotonic() + seconds, None)

    def load_on(self, rate: float | None) -> None:
        """Fill tickets until `load_off`, at so many bytes a second and some layers at a time; None: at full speed."""
        self._stop.clear()
        self._pushed = []

        def work() -> None:
            try:
                self._pushed = self._push_all(None, float("inf"), rate)
            except Exception as error:
                self._failures.append(repr(error))

        self._pushing = threading.Thread(target=work, name="load", daemon=True)
        self._pushing.start()

    def load_off(self) -> int:
        """Stop; the number of tickets filled meanwhile."""
        assert self._pushing is not None, "load_on came before"
        self._stop.set()
        self._pushing.join(WAIT_S + PATIENCE_S)
        self._raise_failures()
        return len(self._pushed)

    def _push_all(self, count: int | None, until: float, rate: float | None) -> list[Pushed]:
        pushed: list[Pushed] = []
        permits = threading.Semaphore(self._side.plan.in_flight)
        pace = Pace(rate)
        while (count is None or len(pushed) < count) and time.monotonic() < until and not self._stop.is_set():
            ticket = self._next_ticket(until)
            if ticket is None:
                break
            _acquire(permits, 1)
            pushed.append(self._fill(ticket, permits, pace))
        _acquire(permits, self._side.plan.in_flight)
        self._raise_failures()
        return pushed

    def _next_ticket(self, until: float) -> KVTicket | None:
        inbox = self._side.link.inbox(self._kind)
        give_up = time.monotonic() + WAIT_S
        while not self._stop.is_set() and time.monotonic() < until:
            try:
                data = inbox.get(timeout=POLL_S)
            except queue.Empty:
                if time.monotonic() > give_up:
                    raise TimeoutError(f"no ticket came within {WAIT_S:g} s") from None
                continue
            return KVTicket.from_proto(pb.KVTicket.FromString(data))
        return None

    def _fill(self, ticket: KVTicket, permits: threading.Semaphore, pace: Pace) -> Pushed:
        assert self.node is not None, "the node is open"
        slots = self._slots(ticket.num_tokens)
        begun = Pushed(ticket.ticket_id, time.monotonic())
        outlet = self.node.open_send(ticket, partial(self._settled, permits))
        layout = ticket.layout
        if pace.rate is None:
            outlet.push(0, layout.num_layers, 0, slots)
        else:
            for layer in range(0, layout.num_layers, self._side.plan.load_layers):
                count = min(self._side.plan.load_layers, layout.num_layers - layer)
                pace.wait(count * ticket.num_tokens * layout.bytes_per_token_layer)
                outlet.push(layer, count, 0, slots)
        outlet.finish(pb.TokenOutput(request_id=ticket.request_id, attempt=ticket.attempt, token_ids=[1]))
        return begun

    def _settled(self, permits: threading.Semaphore, result: SendResult) -> None:
        if result.state is not TicketState.DELIVERED:
            self._failures.append(f"ticket {result.ticket_id} ended {result.state.value}: {result.reason}")
        permits.release()

    def _slots(self, num_tokens: int) -> SlotIds:
        """Where the sender's KV lies: blocks in no order."""
        size = self._side.memory.block_size
        if len(self._source) * size < num_tokens:
            if self._source:
                self._side.release(self._source)
            self._source = self._side.allocate(num_tokens)
            random.Random(0).shuffle(self._source)
        return slots_of(self._source, size, 0, num_tokens)

    def _first_digest(self) -> float:
        began = time.monotonic()
        on_gpu = self._side.device.type == "cuda"
        data = torch.zeros(1 << 20, dtype=torch.uint8, device=self._side.device)
        value = Digester(TransferConfig(digest="all"), on_gpu=on_gpu).begin(data)
        self._side.synchronize()
        value()
        return time.monotonic() - began

    def _raise_failures(self) -> None:
        if self._failures:
            raise RuntimeError("; ".join(self._failures[:3]))

    # -- what was moved

    def fingerprints(self) -> list[list[int]]:
        """Of each ticket's blocks (at the sender: of those that it reads), a digest for each layer."""
        num_tokens = self._side.plan.pair_tokens
        return [self._fingerprint(blocks, num_tokens) for blocks in self._granted or [self._source]]

    def _fingerprint(self, blocks: list[int], num_tokens: int) -> list[int]:
        side, layout = self._side, self._side.layout
        places = side.memory.locate(slots_of(blocks, layout.block_size, 0, num_tokens))
        digester = Digester(TransferConfig(digest="all"), on_gpu=side.device.type == "cuda")
        shape = (1, 2, num_tokens, layout.num_local_heads, layout.head_dim)
        piece = torch.empty(shape, dtype=side.memory.data.dtype, device=side.device)
        values: list[Callable[[], int]] = []
        for layer in range(layout.num_layers):
            side.memory.gather(layer, 1, places, range(layout.num_local_heads), piece)
            values.append(digester.begin(piece.clone().view(torch.uint8).flatten()))
            side.synchronize()
        return [value() for value in values]


class Pace:
    """Lets bytes go at a rate."""

    def __init__(self, rate: float | None) -> None:
        self.rate = rate
        self._next = time.monotonic()

    def wait(self, num_bytes: int) -> None:
        """Return when it is these bytes' turn."""
        if self.rate is None:
            return
        now = time.monotonic()
        if self._next > now:
            time.sleep(self._next - now)
        elif now - self._next > CATCH_UP_S:
            self._next = now
        self._next += num_bytes / self.rate


def _acquire(permits: threading.Semaphore, count: int) -> None:
    for _ in range(count):
        if not permits.acquire(timeout=WAIT_S):
            raise TimeoutError(f"no ticket under way ended within {WAIT_S:g} s")
