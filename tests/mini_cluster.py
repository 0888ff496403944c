"""A whole cluster in one process, without Ray: real engines, real KV transfer, real gRPC, one router.

For tests of how the floors work together. Each worker has an engine loop thread of its own, a Unix
socket between host and front, and a gRPC port; the router runs on the caller's asyncio loop.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType

import grpc

from cluster.engine_host import EngineHost
from cluster.front import FrontOptions, WorkerFront, num_open
from decode_pool.config import DecodeOptions
from engine.config import CacheOptions, EngineOptions, ModelOptions
from engine.engine import Engine
from kv_transfer.config import TransferConfig
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc, worker_pb2
from router.app import RouterApp
from router.config import RouterConfig
from router.store import MemoryStore

SECRET = b"a secret of the tests"
DEADLINE_S = 60.0


@dataclass(kw_only=True)
class Shape:
    """What a test's cluster looks like."""

    model: ModelOptions
    num_prefill: int = 1
    num_decode: int = 1
    colocated: bool = False
    cache: CacheOptions = field(default_factory=lambda: CacheOptions(block_size=16, num_blocks=256))
    options: EngineOptions = field(default_factory=lambda: EngineOptions(max_step_tokens=64, max_running=32))
    decode: DecodeOptions = field(default_factory=DecodeOptions)
    transfer: TransferConfig = field(default_factory=TransferConfig)
    router: RouterConfig = field(default_factory=lambda: RouterConfig(port=0))
    move_at_end_after_s: float = 10.0


@dataclass
class MiniWorker:
    """One worker's two halves."""

    host: EngineHost
    front: WorkerFront


class MiniCluster:
    """Async context manager; `stub` speaks to the router at `address`."""

    stub: inference_pb2_grpc.InferenceStub
    address: str

    def __init__(self, shape: Shape, directory: Path) -> None:
        self.shape = shape
        self.store = MemoryStore()
        self.workers: dict[str, MiniWorker] = {}
        self._directory = directory
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> MiniCluster:
        shape = self.shape
        for index in range(shape.num_decode):
            await self.add_worker(f"decode-{index}", "both" if shape.colocated else "decode")
        for index in range(0 if shape.colocated else shape.num_prefill):
            await self.add_worker(f"prefill-{index}", "prefill")
        self.router, self.stub = await self.add_router("router-0")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def add_router(self, router_id: str) -> tuple[RouterApp, inference_pb2_grpc.InferenceStub]:
        """Start a router, and speak to it."""
        shape = self.shape
        router = RouterApp(
            config=replace(shape.router),
            model=shape.model,
            mode="colocated" if shape.colocated else "split",
            store=self.store,
            secret=SECRET,
            router_id=router_id,
        )
        address = await router.start()
        if router_id == "router-0":
            self.address = address
        self._stack.push_async_callback(router.stop)
        channel = grpc.aio.insecure_channel(address)
        self._stack.push_async_callback(channel.close)
        return router, inference_pb2_grpc.InferenceStub(channel)

    async def add_worker(self, worker_id: str, role: str) -> MiniWorker:
        """Load a worker and start it."""
        shape = self.shape
        engine = await asyncio.to_thread(Engine, shape.model, shape.cache, shape.options)
        socket_path = str(self._directory / f"{worker_id}.sock")
        host = EngineHost(
            engine,
            role=role,
            model_name=shape.model.name or engine.runner.source.name,
            max_running=shape.options.max_running,
            decode=shape.decode,
            transfer=shape.transfer,
            secret=SECRET,
            socket_path=socket_path,
        )
        await asyncio.to_thread(host.start)
        self._stack.push_async_callback(asyncio.to_thread, host.stop)
        options = FrontOptions(
            worker_id=worker_id,
            pool=role,
            role=role,
            host="127.0.0.1",
            socket_path=socket_path,
            secret=SECRET,
            move_at_end_after_s=shape.move_at_end_after_s,
        )
        front = WorkerFront(options, self.store)
        await front.start()
        self._stack.push_async_callback(front.stop)
        await front.ready(DEADLINE_S)
        self.workers[worker_id] = MiniWorker(host, front)
        return self.workers[worker_id]

    async def generate(self, request: pb.GenerateRequest) -> Answer:
        """Run one request to its end."""
        answer = Answer()
        async for event in self.stub.Generate(request, timeout=DEADLINE_S):
            answer.take(event)
        return answer

    async def until_idle(self) -> None:
        """Wait until no worker has anything left, then have each check its books."""
        for worker in self.workers.values():
            link = worker.front.link
            await worker.front.ready(DEADLINE_S)
            async with asyncio.timeout(DEADLINE_S), link.news:
                await link.news.wait_for(lambda link=link: num_open(link.stats) == 0 and link.stats.open_tickets == 0)
            reply = await link.call(worker_pb2.EngineCommand(check=worker_pb2.CheckIntegrity()), DEADLINE_S)
            assert reply.WhichOneof("result") == "stats", reply.error.message
            assert reply.stats.free_blocks == reply.stats.num_blocks
            assert reply.stats.open_tickets == 0


@dataclass
class Answer:
    """What one stream said; fails at once if the stream breaks its contract."""

    accepted: pb.Accepted | None = None
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[pb.PositionLogprobs] = field(default_factory=list)
    finished: pb.Finished | None = None

    def take(self, event: pb.GenerateEvent) -> None:
        """Add one event."""
        assert self.finished is None, "an event after Finished"
        kind = event.WhichOneof("event")
        if kind == "accepted":
            assert self.accepted is None
            self.accepted = event.accepted
        elif kind == "tokens":
            assert event.tokens.offset == len(self.token_ids), "a gap or a repeat in the offsets"
            self.token_ids += event.tokens.token_ids
            self.text += event.tokens.text
            self.logprobs += event.tokens.logprobs
        else:
            self.finished = event.finished
