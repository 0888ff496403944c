"""Client processes that load a cluster through its public API, each with a share of one Poisson process.

One Python process reads some ten thousand messages a second, but late: so several of them share the load, each makes
its requests beforehand, leaves Python's garbage collector off while it measures, and says how late it was itself.
The sum of Poisson processes is one, so `num` processes at rate / num are an open loop of that rate.

Life of a job: `Clients` sends it; each process connects and plans, and answers READY; all hear the same moment at
which the measurement begins (a clock that processes of one host share), and send their records when it has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import multiprocessing
import os
import random
import statistics
import time
import traceback
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from types import TracebackType

from cluster.children import die_with_parent
from cluster.client import Client, Endpoint
from cluster.load import (
    Length,
    LoadProfile,
    LoadResult,
    Planned,
    PromptMaker,
    RequestRecord,
    make_plan,
    plain_ids,
    run_plan,
)
from protos.inference_pb2 import Finished, GenerateRequest, Sampling, TokenIds

READY = "ready"
READY_TIMEOUT_S = 60.0
HEAD_START_S = 0.2
"""From the last READY to the beginning of a measurement."""
ANSWER_GRACE_S = 30.0
TICK_S = 0.005
CLIENT_RATE = 6.0
"""Requests/s (of 256 tokens) that one process carries with honest timestamps: about 1,500 messages/s, 1/6 of a core."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadJob:
    """An open loop."""

    address: str
    profile: LoadProfile
    limit_s: float
    """What has not ended so long after the beginning counts as failed."""
    beside: tuple[LoadProfile, ...] = ()
    """Other open loops at the same time: a mix of prompts."""

    @property
    def profiles(self) -> tuple[LoadProfile, ...]:
        """All of them."""
        return (self.profile, *self.beside)

    def share(self, index: int, num: int) -> LoadJob:
        """What one of `num` processes does of it."""
        mine = [
            replace(each, rate=each.rate / num, seed=each.seed * 1000 + index)
            for each in self.profiles
            if each.rate is not None
        ]
        return replace(self, profile=mine[0], beside=tuple(mine[1:]))

    def plan(self, vocab_size: int) -> list[Planned]:
        """Its requests, in the order in which they are due."""
        planned = (each for profile in self.profiles for each in make_plan(profile, vocab_size))
        return sorted(planned, key=lambda each: each.due_s)


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceJob:
    """Requests one after another, each to an idle cluster."""

    address: str
    prompt_len: int
    output_len: int
    repeats: int
    rest_s: float
    """Before each request."""
    limit_s: float
    """Of each request."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswersJob:
    """Requests one after another whose tokens count, not their times."""

    address: str
    prompt_lens: tuple[int, ...]
    """One request for each."""
    output_len: int
    limit_s: float
    """Of all of them together; those that it leaves out have no answer."""
    seed: int = 0


Job = LoadJob | SequenceJob | AnswersJob


@dataclass(frozen=True, slots=True)
class Answer:
    """A greedy answer."""

    tokens: list[int]
    handed_over: bool
    """Whether another worker computed the prompt than decoded."""


@dataclass(frozen=True, slots=True)
class ClientResult:
    """What one process, or all of them together, saw."""

    load: LoadResult
    lags_s: list[float]
    """How late the process was at moments 5 ms apart: what it adds to any arrival's timestamp at most."""
    answers: list[Answer] = field(default_factory=list)
    """Of an AnswersJob."""


def num_clients(rate: float, cores: int) -> int:
    """Processes for a rate: as many as it needs, and no more than a quarter of the cores."""
    return max(1, min(math.ceil(rate / CLIENT_RATE), cores // 4))


class Clients:
    """Client processes that wait for jobs, as a context manager.

    RuntimeError where one of them fails, TimeoutError where one does not answer.
    """

    def __init__(self, num: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for _ in range(num):
            ours, theirs = context.Pipe()
            process = context.Process(target=_client_main, args=(theirs, os.getpid()), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def __enter__(self) -> Clients:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(timeout=2.0)
            if process.is_alive():
                process.kill()

    @property
    def num(self) -> int:
        """Processes."""
        return len(self._pipes)

    def load(self, job: LoadJob, num: int | None = None) -> ClientResult:
        """Run an open loop, shared by `num` of the processes (default: all)."""
        pipes = self._pipes[: min(num or self.num, self.num)]
        shares = [job.share(index, len(pipes)) for index in range(len(pipes))]
        return _run(pipes, list(shares), job.limit_s)

    def sequence(self, job: SequenceJob) -> ClientResult:
        """Send requests one after another, from one process."""
        return _run(self._pipes[:1], [job], job.repeats * (job.limit_s + job.rest_s))

    def answers(self, job: AnswersJob) -> list[Answer]:
        """Ask for answers one after another, from one process."""
        return _run(self._pipes[:1], [job], job.limit_s).answers


def _run(pipes: list[Connection], jobs: list[Job], limit_s: float) -> ClientResult:
    for pipe, job in zip(pipes, jobs, strict=True):
        pipe.send(job)
    for pipe in pipes:
        _answer(pipe, READY_TIMEOUT_S)
    begin_at = time.monotonic() + HEAD_START_S
    for pipe in pipes:
        pipe.send(begin_at)
    results = [_answer(pipe, begin_at + limit_s + ANSWER_GRACE_S - time.monotonic()) for pipe in pipes]
    records = sorted((record for each in results for record in each.load.records), key=lambda record: record.due_s)
    wall_s = max(each.load.wall_s for each in results)
    lags = [lag for each in results for lag in each.lags_s]
    paced = any(each.load.paced for each in results)
    answers = [answer for each in results for answer in each.answers]
    return ClientResult(LoadResult(results[0].load.model, records, wall_s, paced), lags, answers)


def _answer(pipe: Connection, timeout_s: float) -> ClientResult:
    if not pipe.poll(max(0.0, timeout_s)):
        raise TimeoutError(f"a client process did not answer within {timeout_s:.0f} s")
    try:
        answer = pipe.recv()
    except EOFError as error:
        raise RuntimeError("a client process died") from error
    if isinstance(answer, str) and answer != READY:
        raise RuntimeError(f"a client process failed: {answer}")
    return answer  # type: ignore[no-any-return]


def _client_main(pipe: Connection, parent: int) -> None:
    die_with_parent(parent)
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    while True:
        try:
            job: Job = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(asyncio.run(_carry_out(job, pipe)))
        except Exception:
            pipe.send(traceback.format_exc())


async def _carry_out(job: Job, pipe: Connection) -> ClientResult:
    async with Client(Endpoint(address=job.address)) as client:
        (model, *_) = await client.list_models()
        plan = job.plan(model.vocab_size) if isinstance(job, LoadJob) else []
        pipe.send(READY)
        begin_at = pipe.recv()
        gc.collect()
        gc.disable()
        lags: list[float] = []
        answers: list[Answer] = []
        ticking = asyncio.create_task(_tick(lags))
        try:
            if isinstance(job, LoadJob):
                result = await run_plan(client, plan, model=model.name, begin_at=begin_at, limit_s=job.limit_s)
            elif isinstance(job, AnswersJob):
                answers = await _answers(client, job, model.vocab_size)
                result = LoadResult(model.name, [], 0.0)
            else:
                result = await _sequence(client, job, model.name, model.vocab_size)
        finally:
            ticking.cancel()
            gc.enable()
        return ClientResult(replace(result, paced=model.paced), lags, answers)


async def _answers(client: Client, job: AnswersJob, vocab_size: int) -> list[Answer]:
    rng, ids = random.Random(job.seed), plain_ids(vocab_size)
    found: list[Answer] = []
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(job.limit_s):
            for length in job.prompt_lens:
                prompt = TokenIds(ids=rng.choices(ids, k=length))
                sampling = Sampling(max_tokens=job.output_len, ignore_eos=True, temperature=0.0)
                tokens: list[int] = []
                finished = Finished()
                async with aclosing(client.generate(GenerateRequest(token_ids=prompt, sampling=sampling))) as events:
                    async for event in events:
                        tokens += event.tokens.token_ids
                        finished.MergeFrom(event.finished)
                found.append(Answer(tokens, finished.prefill_worker != finished.decode_worker))
    return found


async def _sequence(client: Client, job: SequenceJob, model: str, vocab_size: int) -> LoadResult:
    profile = LoadProfile(
        concurrency=1,
        num_requests=job.repeats,
        input_len=Length(mean=job.prompt_len),
        output_len=Length(mean=job.output_len),
    )
    prompts = PromptMaker(profile, vocab_size, job.seed)
    records: list[RequestRecord] = []
    began = time.monotonic()
    for _ in range(job.repeats):
        request = prompts.next()
        await asyncio.sleep(job.rest_s)
        records += (await run_plan(client, [Planned(0.0, request)], limit_s=job.limit_s)).records
    return LoadResult(model, records, time.monotonic() - began)


async def _tick(lags: list[float]) -> None:
    """Note how much later than asked this event loop wakes up."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + TICK_S
        await asyncio.sleep(TICK_S)
        lags.append(loop.time() - due)


def steady_gap_s(record: RequestRecord) -> float | None:
    """The median gap between tokens of a stream from its second token on; None for fewer than three tokens."""
    gaps = record.itls_s()[1:]
    return statistics.median(gaps) if gaps else None


def second_gap_s(record: RequestRecord) -> float | None:
    """First token to second token; None for fewer than two."""
    gaps = record.itls_s()
    return gaps[0] if gaps else None
