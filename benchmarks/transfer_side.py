"""One of the two processes of `benchmarks.transfer`: a GPU, what it holds, and the parts that measure."""

from __future__ import annotations

import gc
import logging
import platform
import queue
import sys
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.engine_ceilings import measure_ceilings
from benchmarks.transfer_plan import Plan
from engine.block_pool import BlockPool
from engine.config import CacheOptions, EngineOptions, ModelOptions
from engine.engine import Engine
from engine.kv_cache import KVCache
from engine.runner import CPU_BLOCK_SIZE, GPU_BLOCK_SIZE
from kv_transfer.layout import KVLayout

LOOP_TIMEOUT_S = 60.0


class Link:
    """The pipe to the other process: values by kind, taken in by a thread so that neither side ever blocks."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._inboxes: dict[str, queue.SimpleQueue[Any]] = defaultdict(queue.SimpleQueue)
        self._outbox: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        for work in (self._read, self._write):
            threading.Thread(target=work, name=f"link {work.__name__}", daemon=True).start()

    def send(self, kind: str, value: Any) -> None:
        """Send a value of that kind, soon."""
        self._outbox.put((kind, value))

    def inbox(self, kind: str) -> queue.SimpleQueue[Any]:
        """Where values of that kind arrive."""
        with self._lock:
            return self._inboxes[kind]

    def _read(self) -> None:
        while True:
            try:
                kind, value = self._connection.recv()
            except (EOFError, OSError):
                return
            self.inbox(kind).put(value)

    def _write(self) -> None:
        while True:
            try:
                self._connection.send(self._outbox.get())
            except OSError:
                return


class Side:
    """What a process has: its device, and one engine or one bare cache."""

    def __init__(self, name: str, plan: Plan, link: Link) -> None:
        self.name = name
        self.is_sender = name == "sender"
        self.plan = plan
        self.link = link
        self.device = torch.device("cuda", 0) if plan.device == "cuda" else torch.device("cpu")
        self.engine: Engine | None = None
        self._cache: KVCache | None = None
        self._pool: BlockPool | None = None

    def describe(self) -> dict[str, Any]:
        """What the figures depend on."""
        on_gpu = self.device.type == "cuda"
        return {
            "device_name": torch.cuda.get_device_name() if on_gpu else platform.machine(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda if on_gpu else None,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())) if on_gpu else None,
            "python": platform.python_version(),
        }

    def ceilings(self) -> dict[str, float]:
        """What the device reaches at best."""
        return asdict(measure_ceilings(self.device))

    def synchronize(self) -> None:
        """Return when a GPU has done everything."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    # -- memory that KV lies in: an engine's, or a bare cache

    def make_cache(self) -> None:
        """A cache of random content without an engine."""
        shape = self.plan.cache
        num_blocks = self.plan.pair_tickets * -(-self.plan.pair_tokens // shape.block_size)
        self._cache = KVCache(
            num_layers=shape.num_layers,
            num_blocks=num_blocks,
            block_size=shape.block_size,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            dtype=getattr(torch, shape.dtype),
            device=self.device,
        )
        for layer in range(shape.num_layers):
            self._cache.layer(layer).normal_()
        self.synchronize()
        self._pool = BlockPool(num_blocks, prefix_caching=False)

    def drop_cache(self) -> None:
        """Give the bare cache's memory back."""
        self._cache = self._pool = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def start_engine(self) -> float:
        """Load the model unless it is loaded, and start its loop; seconds it took."""
        began = time.monotonic()
        if self.engine is None:
            on_gpu = self.device.type == "cuda"
            block_size = GPU_BLOCK_SIZE if on_gpu else CPU_BLOCK_SIZE
            self.engine = Engine(
                ModelOptions(path=self.plan.directory, load_format="dummy", dtype="bfloat16" if on_gpu else "float32"),
                CacheOptions(num_blocks=self.plan.num_blocks(block_size)),
                EngineOptions(device=self.plan.device, max_running=self.plan.batch),
            )
            self.engine.runner.warm_up()
            self.engine.start()
        return time.monotonic() - began

    @property
    def memory(self) -> KVCache:
        """Where KV lies: in the bare cache while there is one."""
        if self._cache is not None:
            return self._cache
        assert self.engine is not None, "either make_cache or start_engine comes first"
        return self.engine.runner.kv_cache

    @property
    def layout(self) -> KVLayout:
        """How KV lies there."""
        memory = self.memory
        return KVLayout(
            model_hash="benchmark" if self._cache is not None or self.engine is None else self.engine.model_hash,
            num_layers=memory.num_layers,
            block_size=memory.block_size,
            num_kv_heads=memory.num_kv_heads,
            head_dim=memory.head_dim,
            dtype=str(memory.data.dtype).removeprefix("torch."),
        )

    def mark(self) -> Any:
        """The event behind which blocks that are free now are not written any more."""
        return None if self._cache is not None or self.engine is None else self.engine.runner.mark()

    def post(self, function: Callable[[], None]) -> None:
        """Call a function where sequences and blocks are dealt with: on the engine's loop, if there is one."""
        if self._cache is not None or self.engine is None:
            function()
        else:
            self.engine.loop.post(function)

    def on_loop(self, function: Callable[[], Any]) -> Any:
        """What a function returns that is called there."""
        if self._cache is not None or self.engine is None:
            return function()
        return self.engine.loop.call(function).result(LOOP_TIMEOUT_S)

    def allocate(self, num_tokens: int) -> list[int]:
        """Blocks for so many tokens."""
        pool = self._pool or (self.engine.pool if self.engine is not None else None)
        assert pool is not None, "either make_cache or start_engine comes first"
        count = -(-num_tokens // self.memory.block_size)
        blocks: list[int] = self.on_loop(lambda: pool.allocate(count))
        return blocks

    def release(self, blocks: list[int]) -> None:
        """Give blocks back."""
        pool = self._pool or (self.engine.pool if self.engine is not None else None)
        assert pool is not None, "they were allocated"
        self.on_loop(lambda: pool.release(blocks))


def serve(name: str, plan: Plan, requests: Connection, link: Connection) -> None:
    """Answer the run's calls until it says None or is gone."""
    from benchmarks.transfer_ceiling import Channel
    from benchmarks.transfer_handover import Crafts
    from benchmarks.transfer_load import Batch
    from benchmarks.transfer_tickets import Node

    logging.basicConfig(level=logging.WARNING, format=f"{name}: %(name)s: %(message)s")
    if plan.switch_s is not None:
        sys.setswitchinterval(plan.switch_s)
    side = Side(name, plan, Link(link))
    node = Node(side)
    parts = {
        "side": side,
        "channel": Channel(side),
        "node": node,
        "batch": Batch(side, node),
        "crafts": Crafts(side, node),
    }
    try:
        while (request := _next(requests)) is not None:
            method, args = request
            part, _, verb = method.partition(".")
            try:
                answer = (False, getattr(parts[part], verb)(*args))
            except Exception:
                answer = (True, traceback.format_exc())
            requests.send(answer)
    finally:
        node.close()
        if side.engine is not None:
            side.engine.stop()


def _next(requests: Connection) -> Any:
    try:
        return requests.recv()
    except (EOFError, OSError):
        return None
