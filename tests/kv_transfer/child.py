"""A process that hosts nodes, driven by the test over a pipe.

The test's half is `cast.Child`. Each request is (verb, arguments) and names a method of `Host`; the answer is
("answer", value) or ("error", traceback). How tickets end arrives as ("event", kind, ticket_id, what, monotonic
time). On a GPU the KV is the engine's real cache; on a CPU it is the same class, so that both run the same lines.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import os
import threading
import time
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

import kv_transfer.receiver
import kv_transfer.sender
from engine.kv_cache import KVCache
from kv_transfer.config import TransferConfig
from kv_transfer.context import PairInfo, TransferStats
from kv_transfer.fan_out import Outlet
from kv_transfer.layout import KVLayout
from kv_transfer.ledger import TicketLedger
from kv_transfer.node import TransferNode
from kv_transfer.ticket import KVTicket, ReceivedKV, SendResult, TicketGrant
from protos.worker_pb2 import TokenOutput

LAYOUT = KVLayout("tiny", num_layers=4, block_size=16, num_kv_heads=2, head_dim=64, dtype="bfloat16")
NUM_BLOCKS = 64
SECRET = b"a cluster secret"
HOLD_S = 60.0
"""Bound of a hold: longer than any test waits."""


@functools.lru_cache(maxsize=4)
def content(seed: int) -> torch.Tensor:
    """What a node of that seed holds: [num_layers, 2, num_heads, num_slots, head_dim]."""
    shape = (LAYOUT.num_layers, 2, LAYOUT.num_kv_heads, NUM_BLOCKS * LAYOUT.block_size, LAYOUT.head_dim)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def slots(blocks: Sequence[int], first_token: int, end_token: int) -> np.ndarray:
    """Slots of tokens [first_token, end_token) of a sequence that begins in blocks[0]."""
    tokens = np.arange(first_token, end_token)
    size = LAYOUT.block_size
    return np.asarray(blocks, dtype=np.int64)[tokens // size] * size + tokens % size


M_ARENA_MAX = -8


class Memory:
    """The engine's cache of one node, with a receiver's slowness to choose."""

    def __init__(self, device: torch.device, seed: int | None) -> None:
        self.cache = KVCache(
            num_layers=LAYOUT.num_layers,
            num_blocks=NUM_BLOCKS,
            block_size=LAYOUT.block_size,
            num_kv_heads=LAYOUT.num_kv_heads,
            head_dim=LAYOUT.head_dim,
            dtype=torch.bfloat16,
            device=device,
        )
        self.cache.data.copy_(content(seed)) if seed is not None else self.cache.data.zero_()
        self.scatter_delay_s = 0.0
        self.slow_blocks = range(0)

    @property
    def device(self) -> torch.device:
        return self.cache.device

    def locate(self, slot_ids: np.ndarray) -> torch.Tensor:
        return self.cache.locate(slot_ids)

    def gather(self, first_layer: int, num_layers: int, places: torch.Tensor, heads: range, out: torch.Tensor) -> None:
        self.cache.gather(first_layer, num_layers, places, heads, out)

    def scatter(
        self, first_layer: int, num_layers: int, places: torch.Tensor, heads: range, data: torch.Tensor
    ) -> None:
        if self.scatter_delay_s and int(places[0]) // LAYOUT.block_size in self.slow_blocks:
            time.sleep(self.scatter_delay_s)
        self.cache.scatter(first_layer, num_layers, places, heads, data)

    def read(self) -> torch.Tensor:
        """Everything, on the CPU."""
        return self.cache.data.cpu()


class Hold:
    """Stops threads of this process at one place, until it is released."""

    def __init__(self, owner: Any, name: str) -> None:
        self.reached = threading.Event()
        self._gate = threading.Event()
        self._owner, self._name, self._original = owner, name, getattr(owner, name)

        def stop(*args: Any, **kwargs: Any) -> Any:
            self.reached.set()
            self._gate.wait(HOLD_S)
            return self._original(*args, **kwargs)

        setattr(owner, name, stop)

    def release(self) -> None:
        setattr(self._owner, self._name, self._original)
        self._gate.set()


class Host:
    """The nodes of this process; its public methods are the verbs."""

    def __init__(self, pipe: Connection, device: str, config: dict[str, Any]) -> None:
        self._pipe = pipe
        self._lock = threading.Lock()
        self._device = torch.device(device)
        self._config = TransferConfig(**config)
        self._nodes: dict[str, TransferNode] = {}
        self._memories: dict[str, Memory] = {}
        self._jobs: dict[str, Outlet] = {}
        self._holds: list[Hold] = []
        self._computing: threading.Event | None = None

    def serve(self) -> None:
        """Do what the test asks until it hangs up."""
        torch.set_num_threads(1)
        try:
            while True:
                verb, arguments = self._pipe.recv()
                try:
                    self._say("answer", getattr(self, verb)(**arguments))
                except Exception:
                    self._say("error", traceback.format_exc())
        except (EOFError, OSError):
            os._exit(0)

    def _say(self, *message: Any) -> None:
        with self._lock:
            self._pipe.send(message)

    def _tell(self, kind: str, ticket_id: str, what: Any) -> None:
        self._say("event", kind, ticket_id, what, time.monotonic())

    # -- nodes

    def start(self, name: str, epoch: int = 1, seed: int | None = None) -> str:
        """Start a node; one of that name that runs is stopped first."""
        self.stop(name)
        memory = Memory(self._device, seed)
        self._warm_up(memory)
        node = TransferNode(
            worker_id=name, epoch=epoch, layout=LAYOUT, memory=memory, config=self._config, secret=SECRET
        )
        self._nodes[name], self._memories[name] = node, memory
        return node.start()

    def _warm_up(self, memory: Memory) -> None:
        """Run each kernel once: none can be loaded while a receive waits on the GPU."""
        if self._device.type == "cuda":
            from kv_transfer.checksum import begin_checksum

            piece = torch.empty(1, 2, 16, 2, 64, dtype=torch.bfloat16, device=self._device)
            places = memory.locate(slots([0], 0, 16))
            memory.gather(0, 1, places, range(2), piece)
            memory.scatter(0, 1, places, range(2), piece)
            value = begin_checksum(piece.view(-1).view(torch.uint8))
            memory.read()
            torch.cuda.synchronize()
            value()

    def stop(self, name: str) -> None:
        """Stop a node, if it runs."""
        node = self._nodes.pop(name, None)
        if node is not None:
            node.check_integrity()
            node.stop()
            node.check_integrity(idle=True)
            del self._memories[name]

    def meet(self, name: str, worker_id: str, epoch: int, address: str) -> None:
        self._nodes[name].meet(worker_id, epoch, [address], LAYOUT)

    def pair_infos(self, name: str) -> list[PairInfo]:
        return self._nodes[name].pair_infos()

    def stats(self, name: str) -> TransferStats:
        return self._nodes[name].stats()

    def check_integrity(self, name: str) -> None:
        self._nodes[name].check_integrity(idle=True)

    # -- tickets

    def grant(self, name: str, ticket_id: str, num_tokens: int, blocks: Sequence[int]) -> KVTicket:
        def ready(received: ReceivedKV) -> None:
            self._tell("ready", ticket_id, list(received.first.token_ids) if received.first is not None else None)

        return self._nodes[name].grant(
            TicketGrant(
                ticket_id=ticket_id,
                request_id=f"request of {ticket_id}",
                attempt=1,
                owner="router",
                block_ids=tuple(blocks),
                first_token=0,
                num_tokens=num_tokens,
                on_ready=ready,
                on_end=lambda state, reason: self._tell("end", ticket_id, (state, reason)),
            )
        )

    def open(self, name: str, ticket: KVTicket) -> None:
        def settled(result: SendResult) -> None:
            self._tell("settled", ticket.ticket_id, (result.state, result.reason))

        self._jobs[ticket.ticket_id] = self._nodes[name].open_send(ticket, settled)

    def push(self, blocks: Sequence[int], parts: Sequence[tuple[str, int, int, int]]) -> None:
        """Push (ticket_id, layer, first_token, end_token) of the sequence that lies in these blocks, in this order."""
        for ticket_id, layer, first, end in parts:
            self._jobs[ticket_id].push(layer, 1, first, slots(blocks, first, end))

    def finish(self, ticket_id: str) -> None:
        self._jobs.pop(ticket_id).finish(TokenOutput(request_id=f"request of {ticket_id}", token_ids=[7]))

    def abort(self, name: str, ticket_id: str) -> bool:
        return self._nodes[name].abort(ticket_id, "its owner ends it")

    def is_home(
        self, name: str, blocks: Sequence[int], seed: int, source_blocks: Sequence[int], num_tokens: int
    ) -> bool:
        """Whether these blocks hold, bit for bit, what a node of that seed has in its blocks."""
        here = self._memories[name].read()[:, :, :, slots(blocks, 0, num_tokens)]
        there = content(seed)[:, :, :, slots(source_blocks, 0, num_tokens)]
        return torch.equal(here.view(torch.int16), there.view(torch.int16))

    def print_of(self, name: str, blocks: Sequence[int]) -> int:
        """Changes with what is in these blocks."""
        there = slots(blocks, 0, len(blocks) * LAYOUT.block_size)
        return hash(self._memories[name].read()[:, :, :, there].view(torch.int16).numpy().tobytes())

    # -- trouble

    def slow(self, name: str, delay_s: float, blocks: range = range(NUM_BLOCKS)) -> None:
        """Let each scatter of a node into these blocks take that much longer."""
        self._memories[name].slow_blocks = blocks
        self._memories[name].scatter_delay_s = delay_s

    def hold(self, where: str, transport: str) -> None:
        """Stop this process's transfer threads at a place: connect, send, recv, or complete."""
        if where == "connect":
            self._holds += [Hold(kv_transfer.sender, "open_transport"), Hold(kv_transfer.receiver, "open_transport")]
        elif where == "complete":
            self._holds.append(Hold(TicketLedger, "complete"))
        else:
            self._holds.append(Hold(_transport_class(transport), where))

    def await_hold(self) -> bool:
        """Wait until a thread stands still; whether one does."""
        deadline = time.monotonic() + 20
        while not any(hold.reached.wait(0.01) for hold in self._holds):
            if time.monotonic() > deadline:
                return False
        return True

    def release(self) -> None:
        """Let everything go on."""
        for hold in reversed(self._holds):
            hold.release()
        self._holds.clear()

    def compute(self, on: bool) -> None:
        """Multiply matrices on the device until told otherwise."""
        if self._computing is not None:
            self._computing.set()
            self._computing = None
        if on:
            self._computing = threading.Event()
            begun = threading.Event()
            threading.Thread(target=_multiply, args=(self._device, self._computing, begun), daemon=True).start()
            begun.wait(HOLD_S)

    def census(self) -> dict[str, int]:
        """What a leak would show in."""
        gc.collect()
        with open("/proc/self/statm") as statm:
            rss = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        counts = {"threads": len(os.listdir("/proc/self/task")), "fds": len(os.listdir("/proc/self/fd")), "rss": rss}
        if self._device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self._device)
            counts |= {"cuda_allocated": torch.cuda.memory_allocated(self._device), "cuda_used": total - free}
        return counts


def _transport_class(transport: str) -> Any:
    if transport == "nccl":
        from kv_transfer.nccl import NcclTransport

        return NcclTransport
    from kv_transfer.gloo import GlooTransport

    return GlooTransport


def _multiply(device: torch.device, stop: threading.Event, begun: threading.Event) -> None:
    size = 4096 if device.type == "cuda" else 128
    matrix = torch.rand(size, size, device=device)
    while not stop.is_set():
        matrix = (matrix @ matrix).clamp_(0, 1)
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        begun.set()
        stop.wait(0.001)


def main(pipe: Connection, environment: dict[str, str], device: str, config: dict[str, Any]) -> None:
    """The process; the environment counts because nothing has touched CUDA before."""
    os.environ.update(environment)
    ctypes.CDLL(None).mallopt(M_ARENA_MAX, 2)  # as MALLOC_ARENA_MAX does in the cluster's processes
    if device != "cpu":
        torch.cuda.set_device(torch.device(device))
        torch.zeros(1, device=device)
    Host(pipe, device, config).serve()
