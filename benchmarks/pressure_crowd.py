"""Clients that behave, beside clients that do not: for processes of their own (see pressure_clients.py).

Those that do not give way to everything else: 9 of the 33 ms of CPU that each of them costs this machine are its own
(connecting, above all), and on two cores the others would feel that, not what it costs the cluster.
"""

from __future__ import annotations

import asyncio
import os
import random
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc
import grpc.aio

from benchmarks.pressure_clients import CHANNEL_OPTIONS, METHOD, TOKENS, Asked, quiet

CONNECT_S = 10.0
NICENESS = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class SteadyJob:
    """Streams that are read at once, until a moment."""

    address: str
    asked: Asked
    streams: int
    until: float


@dataclass(slots=True)
class Streams:
    """What the steady clients saw."""

    arrivals: list[list[float]] = field(default_factory=list)
    """Of each stream: the moments at which tokens came."""
    lags_s: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class TroubleJob:
    """From `begin_at` for `seconds`: one that stops reading, and some that vanish."""

    address: str
    asked: Asked
    begin_at: float
    seconds: float
    vanishing: int
    longest_stay_s: float
    seed: int = 0


@dataclass(slots=True)
class Trouble:
    """What the others did."""

    vanished_before_tokens: int = 0
    vanished_within_stream: int = 0
    ended_before: int = 0
    """Whose streams had ended, or were refused, before they could vanish."""
    stopped_reading: bool = False


def run_steady(job: SteadyJob) -> Streams:
    """In a process of its own."""
    return asyncio.run(_run_steady(job))


async def _run_steady(job: SteadyJob) -> Streams:
    seen, dice = Streams(), random.Random(0)
    requests = [job.asked.draw(dice)[1] for _ in range(job.streams)]

    async def read(request: bytes) -> None:
        moments: list[float] = []
        seen.arrivals.append(moments)
        call = channel.unary_stream(METHOD)(request)
        try:
            async with asyncio.timeout(job.until - time.monotonic()):
                async for event in call:
                    if event[0] == TOKENS:
                        moments.append(time.monotonic())
            seen.failures.append("a stream ended before its time")
        except TimeoutError:
            call.cancel()
        except grpc.aio.AioRpcError as error:
            seen.failures.append(f"{error.code().name}: {error.details()}")

    async with grpc.aio.insecure_channel(job.address, options=CHANNEL_OPTIONS) as channel, quiet(seen.lags_s):
        await asyncio.gather(*(read(request) for request in requests))
    return seen


def run_trouble(job: TroubleJob) -> Trouble:
    """In a process of its own, which gets a lower priority for good."""
    os.setpriority(os.PRIO_PROCESS, 0, NICENESS)  # of this thread, and of those that gRPC begins from here on
    return asyncio.run(_run_trouble(job))


async def _run_trouble(job: TroubleJob) -> Trouble:
    seen, dice = Trouble(), random.Random(job.seed)
    plans = []
    for _ in range(job.vanishing):
        stay_s = dice.uniform(0.0, job.longest_stay_s)
        plans.append((job.begin_at + dice.uniform(0.0, job.seconds - stay_s), stay_s, job.asked.draw(dice)[1]))
    await asyncio.sleep(job.begin_at - time.monotonic())
    await asyncio.gather(
        _stop_reading(job, job.asked.draw(dice)[1], seen),
        *(_vanish(job.address, *plan, seen) for plan in plans),
    )
    return seen


async def _stop_reading(job: TroubleJob, request: bytes, seen: Trouble) -> None:
    """Read up to the first token, and then nothing, with the call open."""
    async with grpc.aio.insecure_channel(job.address, options=CHANNEL_OPTIONS) as channel:
        call = channel.unary_stream(METHOD)(request)
        while (event := await call.read()) is not grpc.aio.EOF:
            if event[0] == TOKENS:
                seen.stopped_reading = True
                break
        await asyncio.sleep(max(0.0, job.begin_at + job.seconds - time.monotonic()))
        call.cancel()


async def _vanish(address: str, at: float, stay_s: float, request: bytes, seen: Trouble) -> None:
    """Ask, read for a while, and be gone without a word."""
    await asyncio.sleep(max(0.0, at - time.monotonic()))
    num_tokens = 0

    async def read() -> None:
        nonlocal num_tokens
        async for event in channel.unary_stream(METHOD)(request):
            num_tokens += event[0] == TOKENS

    async with (
        line_to(address) as (near, cut),
        grpc.aio.insecure_channel(near, options=CHANNEL_OPTIONS) as channel,
    ):
        await asyncio.wait_for(channel.channel_ready(), CONNECT_S)
        reading = asyncio.create_task(read())
        done, _ = await asyncio.wait([reading], timeout=stay_s)
        cut()
        if done:
            seen.ended_before += 1
        elif num_tokens:
            seen.vanished_within_stream += 1
        else:
            seen.vanished_before_tokens += 1
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)


@asynccontextmanager
async def line_to(address: str) -> AsyncIterator[tuple[str, Callable[[], None]]]:
    """A line to an address that can be cut: the far end hears a reset, and nothing else, as from a machine that is off
    the network and on again. Gives its near end and what cuts it."""
    host, _, port = address.rpartition(":")
    writers: list[asyncio.StreamWriter] = []
    pumps: list[asyncio.Task[None]] = []

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far = await asyncio.open_connection(host, int(port))
        far.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writers.extend((writer, far))
        pumps.extend(asyncio.create_task(pump(*ends)) for ends in ((reader, far), (far_reader, writer)))

    def cut() -> None:
        for writer in reversed(writers):
            writer.transport.abort()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}", cut
    finally:
        cut()
        for each in pumps:
            each.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
        server.close()
        await server.wait_closed()
