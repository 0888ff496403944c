"""Clients that put a router under pressure, for processes of their own: as light as Python's gRPC lets them be.

Requests are serialised beforehand and answers are not parsed (a GenerateEvent's first byte tells which event it is), so
that two cores have room for the cluster too. Each process says how late it was itself.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context

import grpc
import grpc.aio
from google.rpc import error_details_pb2, status_pb2

from cluster.children import die_with_parent
from protos.inference_pb2 import GenerateRequest, Sampling, TokenIds

METHOD = "/pdserve.v1.Inference/Generate"
TOKENS, FINISHED = 0x12, 0x1A
"""The tags of GenerateEvent's fields 2 and 3."""
GRACE_S = 5.0
"""How much longer than its deadline a call is waited for: the server shall have the last word."""
TICK_S = 0.005
PAUSE_AFTER_REFUSAL_S = 0.05
VOCAB = range(10, 390)
CHANNEL_OPTIONS = (("grpc.use_local_subchannel_pool", 1),)
"""A connection for each channel."""

Call = Callable[..., grpc.aio.UnaryStreamCall[bytes, bytes]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What each request asks."""

    prompt_len: int
    output_len: int
    deadline_s: float
    priorities: tuple[int, ...] = (0,)
    """Drawn with equal chances."""

    def draw(self, dice: random.Random) -> tuple[int, bytes]:
        """A request's priority, and the request."""
        priority = dice.choice(self.priorities)
        request = GenerateRequest(
            token_ids=TokenIds(ids=dice.choices(VOCAB, k=self.prompt_len)),
            sampling=Sampling(max_tokens=self.output_len, ignore_eos=True),
            priority=priority,
            deadline_s=self.deadline_s,
        )
        return priority, request.SerializeToString()


@dataclass(slots=True)
class Outcome:
    """What became of a request; moments of time.monotonic, which the processes of a host share."""

    priority: int
    sent: float
    ended: float = 0.0
    code: str = ""
    """OK if it was answered whole, else the status it ended with."""
    message: str = ""
    has_tokens: bool = False
    """Whether any came."""
    has_retry_info: bool = False

    @property
    def is_refusal(self) -> bool:
        """Whether the router had no room for it; a stream that was cut off is none."""
        return self.code == "RESOURCE_EXHAUSTED" and not self.has_tokens


@dataclass(slots=True)
class Seen:
    """What one process saw."""

    outcomes: list[Outcome] = field(default_factory=list)
    lags_s: list[float] = field(default_factory=list)
    """How late it was at moments 5 ms apart."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopJob:
    """A load from `begin_at` for `seconds`: open at `rate`, or closed with `concurrency`."""

    address: str
    asked: Asked
    begin_at: float
    seconds: float
    rate: float = 0.0
    concurrency: int = 0
    seed: int = 0


class Processes:
    """Processes that each do one job at a time."""

    def __init__(self, num: int) -> None:
        self._pool = ProcessPoolExecutor(num, get_context("spawn"), initializer=_begin, initargs=(os.getpid(),))
        list(self._pool.map(_nothing, range(num)))  # they start here, before anything is measured
        self.submit = self._pool.submit

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_error: object) -> None:
        self._pool.shutdown(cancel_futures=True)


def _begin(parent: int) -> None:
    die_with_parent(parent)
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")


def _nothing(_number: int) -> None:
    time.sleep(0.2)  # long enough that no process takes two


def run_loop(job: LoopJob) -> Seen:
    """In a process of its own: the whole load, and the ends of all its requests."""
    return asyncio.run(_run_loop(job))


async def _run_loop(job: LoopJob) -> Seen:
    seen, dice = Seen(), random.Random(job.seed)
    async with grpc.aio.insecure_channel(job.address, options=CHANNEL_OPTIONS) as channel, quiet(seen.lags_s):
        call = channel.unary_stream(METHOD)
        if job.rate:
            await _open_loop(call, job, dice, seen)
        else:
            await asyncio.gather(*(_closed_loop(call, job, dice, seen) for _ in range(job.concurrency)))
    return seen


async def _open_loop(call: Call, job: LoopJob, dice: random.Random, seen: Seen) -> None:
    """Poisson arrivals."""
    planned, due = [], 0.0
    while (due := due + dice.expovariate(job.rate)) < job.seconds:
        planned.append((job.begin_at + due, *job.asked.draw(dice)))
    running: set[asyncio.Task[None]] = set()
    for moment, priority, request in planned:
        if (early := moment - time.monotonic()) > 0:
            await asyncio.sleep(early)
        task = asyncio.create_task(_ask(call, priority, request, job.asked.deadline_s, seen))
        running.add(task)
        task.add_done_callback(running.discard)
    await asyncio.sleep(max(0.0, job.begin_at + job.seconds - time.monotonic()))
    await asyncio.gather(*running)


async def _closed_loop(call: Call, job: LoopJob, dice: random.Random, seen: Seen) -> None:
    await asyncio.sleep(max(0.0, job.begin_at - time.monotonic()))
    while time.monotonic() < job.begin_at + job.seconds:
        priority, request = job.asked.draw(dice)
        await _ask(call, priority, request, job.asked.deadline_s, seen)
        if seen.outcomes[-1].code != "OK":
            await asyncio.sleep(PAUSE_AFTER_REFUSAL_S)


async def _ask(call: Call, priority: int, request: bytes, deadline_s: float, seen: Seen) -> None:
    outcome = Outcome(priority, time.monotonic())
    seen.outcomes.append(outcome)
    last = b""
    try:
        async for event in call(request, timeout=deadline_s + GRACE_S):
            last = event
            outcome.has_tokens |= event[0] == TOKENS
        outcome.code = "OK" if last[:1] == bytes([FINISHED]) else "BROKEN"
    except grpc.aio.AioRpcError as error:
        outcome.code = error.code().name
        outcome.ended = time.monotonic()
        outcome.message = error.details() or ""
        outcome.has_retry_info = has_retry_info(error)
        return
    outcome.ended = time.monotonic()


def has_retry_info(error: grpc.aio.AioRpcError) -> bool:
    """Whether the status says when to try again."""
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin" and isinstance(value, bytes):
            details = status_pb2.Status.FromString(value).details
            return any(each.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for each in details)
    return False


@asynccontextmanager
async def quiet(lags_s: list[float]) -> AsyncIterator[None]:
    """No garbage collector, and a note of how late this event loop wakes up."""

    async def tick() -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + TICK_S
            await asyncio.sleep(TICK_S)
            lags_s.append(loop.time() - due)

    gc.collect()
    gc.disable()
    ticking = asyncio.create_task(tick())
    try:
        yield
    finally:
        ticking.cancel()
        gc.enable()


def whole(outcomes: Iterable[Outcome], since: float, until: float, deadline_s: float) -> Sequence[Outcome]:
    """Those answered whole within their deadline, between two moments."""
    return [
        each
        for each in outcomes
        if each.code == "OK" and since <= each.ended < until and each.ended - each.sent <= deadline_s
    ]
