"""Loads a server with generated requests and records what became of each.

Open loop: requests are due at the arrivals of a Poisson process, whether or not the server keeps up, and
latencies count from when a request was due, so that a stall is not hidden by the requests it held back.
Closed loop: `concurrency` clients, each of which sends its next request when its last one has ended.

A request is DUE, SENT, and ends FINISHED (with its Finished event) or FAILED (with a status's name).

`run_load` is a whole measurement; `cluster.load_trace` sends a recorded load instead. Where one process cannot carry
the load, or must be on time to the millisecond, `make_plan` makes an open loop's requests beforehand, and `run_plan`
sends them from a moment that processes share.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field

from cluster.client import BrokenStreamError, Client, ClientError, NoClusterError, StatusError
from protos.inference_pb2 import Finished, FinishReason, GenerateRequest, Model, Sampling, TokenIds

UNFINISHED = "UNFINISHED"
"""The failure of a request that had not ended when its measurement did."""

OnProgress = Callable[["RequestRecord"], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Length:
    """A number of tokens: uniform over [mean - spread, mean + spread], at least 1."""

    mean: int
    spread: int = 0

    def __post_init__(self) -> None:
        if self.mean < 1 or not 0 <= self.spread < self.mean:
            raise ValueError(f"a length needs mean >= 1 and 0 <= spread < mean, got {self.mean},{self.spread}")

    @classmethod
    def parse(cls, text: str) -> Length:
        """From `mean` or `mean,spread`."""
        mean, _, spread = text.partition(",")
        try:
            numbers = int(mean), int(spread or "0")
        except ValueError as error:
            raise ValueError(f"a length is MEAN or MEAN,SPREAD in tokens, got {text!r}") from error
        return cls(mean=numbers[0], spread=numbers[1])

    def draw(self, rng: random.Random) -> int:
        """A length."""
        return rng.randint(self.mean - self.spread, self.mean + self.spread)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadProfile:
    """What to send, how fast, for how long."""

    rate: float | None = None
    """Open loop: mean arrivals per second."""
    concurrency: int | None = None
    """Closed loop: requests in flight."""
    num_requests: int | None = None
    """Send this many."""
    duration_s: float | None = None
    """Send for this long; what is in flight then is waited for."""
    input_len: Length = Length(mean=128)
    output_len: Length = Length(mean=32)
    """Tokens generated: end-of-sequence tokens are ignored."""
    shared_prefix: float = 0.0
    """Share of each prompt that is the same for all requests of a group."""
    num_groups: int = 1
    """Groups, each with a prefix of its own."""
    num_warmup: int = 2
    """Requests sent one after another before the measurement, and not part of it."""
    deadline_s: float | None = None
    """Deadline of each request; default: the server's."""
    seed: int = 0
    """Decides prompts, lengths and arrivals."""

    def __post_init__(self) -> None:
        if (self.rate is None) == (self.concurrency is None):
            raise ValueError("give one of rate (open loop) and concurrency (closed loop)")
        if (self.num_requests is None) == (self.duration_s is None):
            raise ValueError("give one of num_requests and duration_s")
        for name in ("rate", "concurrency", "num_requests", "duration_s", "num_groups", "deadline_s"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} must be more than 0, got {value}")
        if not 0.0 <= self.shared_prefix <= 1.0:
            raise ValueError(f"shared_prefix must be between 0 and 1, got {self.shared_prefix}")
        if self.num_warmup < 0:
            raise ValueError(f"num_warmup must be at least 0, got {self.num_warmup}")


@dataclass(slots=True)
class RequestRecord:
    """What became of one request; times are seconds since the measurement began."""

    due_s: float
    """When it should have been sent: what latencies count from."""
    sent_s: float = 0.0
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    """When a message with tokens came, and how many tokens it brought."""
    ended_s: float = 0.0
    finished: Finished | None = None
    failure: str | None = None
    """Name of the status it ended with, where it is no answer."""
    failure_message: str = ""

    @property
    def num_tokens(self) -> int:
        """Tokens received."""
        return sum(count for _, count in self.arrivals)

    @property
    def ttft_s(self) -> float | None:
        """Due to the first token; None where none came."""
        return self.arrivals[0][0] - self.due_s if self.arrivals else None

    @property
    def e2e_s(self) -> float:
        """Due to the end of the stream."""
        return self.ended_s - self.due_s

    def itls_s(self) -> list[float]:
        """Gaps between successive tokens; tokens of one message came together, with gaps of 0."""
        gaps: list[float] = []
        last_s: float | None = None
        for at_s, count in self.arrivals:
            if last_s is not None:
                gaps.append(at_s - last_s)
            gaps.extend([0.0] * (count - 1))
            last_s = at_s
        return gaps


@dataclass(frozen=True, slots=True)
class Planned:
    """A request and when it is due, in seconds since the measurement began."""

    due_s: float
    request: GenerateRequest


@dataclass(frozen=True, slots=True)
class LoadResult:
    """All requests of a measurement, in the order they were due."""

    model: str
    records: list[RequestRecord]
    wall_s: float
    """Begin of the measurement to the end of the last request."""
    paced: bool = False
    """Whether the server rehearses other hardware."""


class PromptMaker:
    """Draws requests from a seed: the same seed and profile give the same requests.

    Prompts are of `plain_ids`.
    """

    def __init__(self, profile: LoadProfile, vocab_size: int, seed: int) -> None:
        self._profile = profile
        self._ids = plain_ids(vocab_size)
        self._rng = random.Random(seed)
        longest = profile.input_len.mean + profile.input_len.spread
        self._prefixes = [self._draw_ids(longest) for _ in range(profile.num_groups)]

    def next(self) -> GenerateRequest:
        """The next request."""
        profile = self._profile
        length = profile.input_len.draw(self._rng)
        num_shared = round(length * profile.shared_prefix)
        prefix = self._rng.choice(self._prefixes)[:num_shared]
        num_tokens = profile.output_len.draw(self._rng)
        request = GenerateRequest(
            token_ids=TokenIds(ids=prefix + self._draw_ids(length - num_shared)),
            sampling=Sampling(max_tokens=num_tokens, ignore_eos=True, temperature=0.0),
        )
        if profile.deadline_s is not None:
            request.deadline_s = profile.deadline_s
        return request

    def _draw_ids(self, length: int) -> list[int]:
        return self._rng.choices(self._ids, k=length)


def plain_ids(vocab_size: int) -> range:
    """The middle half of a vocabulary, where no tokenizer keeps special tokens."""
    return range(vocab_size // 4, max(vocab_size // 4 + 1, vocab_size * 3 // 4))


async def served_model(client: Client) -> Model:
    """The model that is loaded; raises ClientError where the server serves none, or cannot be asked."""
    models = await client.list_models()
    if not models:
        raise ClientError("the server serves no model: look at `pdserve status`")
    return models[0]


async def warm_up(client: Client, prompts: PromptMaker, count: int) -> None:
    """Send so many requests one after another; raises ClientError where the server refuses one."""
    for _ in range(count):
        async with aclosing(client.generate(prompts.next())) as events:
            async for _event in events:
                pass


async def run_load(client: Client, profile: LoadProfile, on_progress: OnProgress | None = None) -> LoadResult:
    """Warm up, then load the server by the profile; `on_progress` hears of each request that has ended.

    Raises ClientError where the server cannot be asked for its model, or refuses the warm-up.
    """
    model = await served_model(client)
    await warm_up(client, PromptMaker(profile, model.vocab_size, ~profile.seed), profile.num_warmup)
    paced = await is_paced(client)
    run, prompts = _Run(client, on_progress), PromptMaker(profile, model.vocab_size, profile.seed)
    if profile.rate is not None:
        await run.follow(Planned(due_s, prompts.next()) for due_s in _arrivals(profile))
    else:
        await run.closed_loop(profile, prompts)
    run.records.sort(key=lambda record: record.due_s)
    return LoadResult(model.name, run.records, run.now_s(), paced)


async def is_paced(client: Client) -> bool:
    """Whether workers take other hardware's time; asked once one has served, so that the router knows them."""
    return any(each.paced for each in await client.list_models())


def make_plan(profile: LoadProfile, vocab_size: int) -> list[Planned]:
    """All requests of an open loop; the same as `run_load` would send."""
    prompts = PromptMaker(profile, vocab_size, profile.seed)
    return [Planned(due_s, prompts.next()) for due_s in _arrivals(profile)]


async def run_plan(
    client: Client,
    plan: Iterable[Planned],
    *,
    limit_s: float | None,
    model: str = "",
    begin_at: float | None = None,
    on_progress: OnProgress | None = None,
) -> LoadResult:
    """Send requests when they are due, counted from `begin_at` (the clock of `time.monotonic`; default: now).

    What has not ended `limit_s` seconds after the beginning fails as UNFINISHED.
    """
    run = _Run(client, on_progress, begin_at)
    try:
        async with asyncio.timeout_at(None if limit_s is None else run.began + limit_s):
            await run.follow(plan)
    except TimeoutError:
        pass
    run.records.sort(key=lambda record: record.due_s)
    return LoadResult(model, run.records, run.now_s())


def _arrivals(profile: LoadProfile) -> Iterator[float]:
    """When the requests of an open loop are due."""
    assert profile.rate is not None
    rng = random.Random(profile.seed ^ 0x5EED)
    due_s, count = rng.expovariate(profile.rate), 0
    while _goes_on(profile, count, due_s):
        yield due_s
        due_s += rng.expovariate(profile.rate)
        count += 1


def _goes_on(profile: LoadProfile, num_sent: int, now_s: float) -> bool:
    if profile.num_requests is not None:
        return num_sent < profile.num_requests
    return now_s < (profile.duration_s or 0.0)


class _Run:
    """One measurement."""

    def __init__(self, client: Client, on_progress: OnProgress | None, begin_at: float | None = None) -> None:
        self._client = client
        self._on_progress = on_progress
        self._loop = asyncio.get_running_loop()
        self.began = self._loop.time() if begin_at is None else begin_at
        self.records: list[RequestRecord] = []

    def now_s(self) -> float:
        """Seconds since the measurement began."""
        return self._loop.time() - self.began

    async def follow(self, plan: Iterable[Planned]) -> None:
        """Send each request when it is due, whatever became of those before."""
        async with asyncio.TaskGroup() as group:
            for planned in plan:
                await asyncio.sleep(planned.due_s - self.now_s())
                group.create_task(self._send(planned.request, planned.due_s))

    async def closed_loop(self, profile: LoadProfile, prompts: PromptMaker) -> None:
        """Keep the profile's `concurrency` requests in flight."""
        num_sent = 0

        async def one_client() -> None:
            nonlocal num_sent
            while _goes_on(profile, num_sent, now_s := self.now_s()):
                num_sent += 1
                await self._send(prompts.next(), now_s)

        async with asyncio.TaskGroup() as group:
            for _ in range(profile.concurrency or 1):
                group.create_task(one_client())

    async def _send(self, request: GenerateRequest, due_s: float) -> None:
        record = RequestRecord(due_s, sent_s=self.now_s())
        self.records.append(record)
        try:
            async with aclosing(self._client.generate(request)) as events:
                async for event in events:
                    if event.WhichOneof("event") == "tokens" and event.tokens.token_ids:
                        record.arrivals.append((self.now_s(), len(event.tokens.token_ids)))
                    elif event.WhichOneof("event") == "finished":
                        record.finished = event.finished
            if record.finished is not None and record.finished.reason == FinishReason.FINISH_REASON_CANCELLED:
                record.failure = "CANCELLED"
        except ClientError as error:
            record.failure, record.failure_message = _failure_name(error), str(error)
        except asyncio.CancelledError:
            record.failure, record.ended_s = UNFINISHED, self.now_s()
            record.failure_message = f"not ended {record.ended_s - record.due_s:.1f} s after it was due"
            raise
        record.ended_s = self.now_s()
        if self._on_progress is not None:
            self._on_progress(record)


def _failure_name(error: ClientError) -> str:
    match error:
        case StatusError():
            return error.code.name
        case NoClusterError():
            return "UNAVAILABLE"
        case BrokenStreamError():
            return "BROKEN_STREAM"
    return type(error).__name__
