"""Clients of a router's benchmark, in one process: real gRPC streams, read as bytes and understood afterwards."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from multiprocessing.connection import Connection
from typing import Any

import grpc

from benchmarks.router_rig import cpu_s
from protos import inference_pb2 as pb

GENERATE = "/pdserve.v1.Inference/Generate"
PROMPT = list(range(65, 81))
STREAM_TIMEOUT_S = 300.0
CHANNEL_OPTIONS = (("grpc.use_local_subchannel_pool", 1),)


@dataclass(frozen=True)
class Load:
    """Streams at the same time."""

    num_streams: int
    num_tokens: int
    num_connections: int
    """To each router."""
    gives_credit: bool = False
    """Whether the worker waits for its tokens to be read."""


@dataclass(frozen=True)
class Heard:
    """What came on one stream."""

    router: int
    worker: str
    offsets: list[int]
    """Of each message's first token."""
    counts: list[int]
    """Tokens of each message."""
    came_at: list[float]
    """On the system's monotonic clock."""


@dataclass(frozen=True)
class Listened:
    """Of all streams of a load."""

    heard: list[Heard]
    cpu_s: list[float]
    """Of each router, from the first token on."""


@dataclass
class _Stream:
    """What came so far, as bytes."""

    router: int
    raw: list[bytes] = field(default_factory=list)
    came_at: list[float] = field(default_factory=list)

    def heard(self) -> Heard:
        events = [pb.GenerateEvent.FromString(raw) for raw in self.raw]
        kinds = [event.WhichOneof("event") for event in events]
        assert (kinds[0], kinds[-1]) == ("accepted", "finished"), f"a stream of {kinds[:2]} to {kinds[-1]}"
        tokens = [event.tokens for event in events[1:-1]]
        offsets, counts = [each.offset for each in tokens], [len(each.token_ids) for each in tokens]
        assert offsets == [0, *accumulate(counts)][:-1], "a gap or a repeat"
        worker = events[-1].finished.decode_worker.partition("/")[0]
        return Heard(self.router, worker, offsets, counts, self.came_at[1:-1])


class ClientsSide:
    """All clients."""

    def __init__(self, addresses: Sequence[str], pids: Sequence[int], credits: Connection) -> None:
        """Of each router; `credits` tells the workers, a byte for each step that has been read whole."""
        self._addresses = addresses
        self._pids = pids
        self._credits = credits

    async def listen(self, load: Load) -> Listened:
        """Open all streams and read them to their ends, shared equally among the routers."""
        self._load, self._read = load, 0
        self._cpu_s: list[float] = []
        request = _request(load.num_tokens)
        async with self._generates(load.num_connections) as calls:
            streams = [_Stream(index % len(self._addresses)) for index in range(load.num_streams)]
            began = [
                self._follow(calls[stream.router][index % load.num_connections], request, stream)
                for index, stream in enumerate(streams)
            ]
            await asyncio.gather(*began)
        spent = [after - before for after, before in zip(map(cpu_s, self._pids), self._cpu_s, strict=True)]
        return Listened([stream.heard() for stream in streams], spent)

    async def ask(self, num_at_once: int, seconds: float, num_connections: int) -> tuple[int, float, list[float]]:
        """So many at once ask for two tokens each, again and again; requests, seconds, and the routers' CPU seconds."""
        request = _request(2)
        until, done = time.monotonic() + seconds, 0

        async def one(generate: Any) -> None:
            nonlocal done
            while time.monotonic() < until:
                call, num = generate(request, timeout=STREAM_TIMEOUT_S), 0
                while await call.read() is not grpc.aio.EOF:
                    num += 1
                assert num >= 3, f"a stream of {num} messages"
                done += 1

        async with self._generates(num_connections) as calls:
            before, began = [cpu_s(pid) for pid in self._pids], time.monotonic()
            of_each = [calls[index % len(calls)] for index in range(num_at_once)]
            await asyncio.gather(*(one(of[index % num_connections]) for index, of in enumerate(of_each)))
            took_s = time.monotonic() - began
        return done, took_s, [after - start for after, start in zip(map(cpu_s, self._pids), before, strict=True)]

    async def open(self, num_streams: int, num_connections: int) -> None:
        """Open streams that say one token each and nothing more; `leave` ends them."""
        self._leaving = asyncio.Event()
        opened, self._open = asyncio.Event(), 0

        async def hold(generate: Any) -> None:
            call = generate(_request(2), timeout=STREAM_TIMEOUT_S)
            for _ in range(2):
                assert await call.read() is not grpc.aio.EOF
            self._open += 1
            if self._open == num_streams:
                opened.set()
            await self._leaving.wait()
            call.cancel()

        async def hold_all() -> None:
            async with self._generates(num_connections) as calls:
                of_each = [calls[index % len(calls)] for index in range(num_streams)]
                await asyncio.gather(*(hold(of[index % num_connections]) for index, of in enumerate(of_each)))

        self._holding = asyncio.create_task(hold_all())
        async with asyncio.timeout(STREAM_TIMEOUT_S):
            waits = {self._holding, asyncio.create_task(opened.wait())}
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        if self._holding.done():
            self._holding.result()

    async def leave(self) -> None:
        """Cancel what is open."""
        self._leaving.set()
        await self._holding

    async def stop(self) -> None:
        """Nothing is left open."""

    async def _follow(self, generate: Any, request: pb.GenerateRequest, stream: _Stream) -> None:
        call = generate(request, timeout=STREAM_TIMEOUT_S)
        read, add, note, clock = call.read, stream.raw.append, stream.came_at.append, time.monotonic
        gives_credit = self._load.gives_credit
        while (raw := await read()) is not grpc.aio.EOF:
            note(clock())
            add(raw)
            if len(stream.raw) == 2 and not self._cpu_s:
                self._cpu_s = [cpu_s(pid) for pid in self._pids]
            if gives_credit:
                self._credit(raw)

    def _credit(self, raw: bytes) -> None:
        before = self._read // self._load.num_streams
        self._read += len(pb.GenerateEvent.FromString(raw).tokens.token_ids)
        if (steps := self._read // self._load.num_streams - before) > 0:
            self._credits.send_bytes(bytes(steps))

    @asynccontextmanager
    async def _generates(self, num_connections: int) -> AsyncIterator[list[list[Any]]]:
        """For each router and connection: Generate, giving bytes."""
        channels = [
            [grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) for _ in range(num_connections)]
            for address in self._addresses
        ]
        serialize = pb.GenerateRequest.SerializeToString
        try:
            yield [
                [each.unary_stream(GENERATE, request_serializer=serialize) for each in to_router]
                for to_router in channels
            ]
        finally:
            await asyncio.gather(*(each.close() for to_router in channels for each in to_router))


def _request(num_tokens: int) -> pb.GenerateRequest:
    sampling = pb.Sampling(max_tokens=num_tokens)
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=PROMPT), sampling=sampling)
