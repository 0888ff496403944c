"""A recorded load, in the Mooncake format, as requests that are due when the trace says.

One JSON object a line: `timestamp` (ms), `input_length` and `output_length` (tokens), and `hash_ids`, one for each
512 tokens of the prompt, the last of which may be less. Equal ids stand for equal tokens behind an equal beginning,
so what two prompts share is told by the ids that both begin with; the tokens themselves are not in a trace, and are
drawn here from the id alone. Answers are no part of it: the next prompt of a conversation has ids of its own where
the answer stands, so nothing that a server generates is found again.

A trace is READ, SELECTED (cut to a time, sampled by conversation), FITTED to the model's limit, and sent.

The format, and what it was recorded from: Qin et al., "Mooncake: Trading More Storage for Less Computation", FAST '25.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from cluster.client import Client
from cluster.load import (
    LoadProfile,
    LoadResult,
    OnProgress,
    Planned,
    PromptMaker,
    is_paced,
    plain_ids,
    run_plan,
    served_model,
    warm_up,
)
from protos.inference_pb2 import GenerateRequest, Sampling, TokenIds

BLOCK_TOKENS = 512
"""Tokens of a prompt that one hash id stands for."""
FIELDS = "timestamp, input_length, output_length and hash_ids"
TooLong = Literal["clip", "drop"]


class TraceError(ValueError):
    """A trace that cannot be read, or of which nothing is left to send."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """How much of a trace to send: one of the two."""

    count: int | None = None
    """Requests."""
    share: float | None = None
    """Of the requests."""

    def __post_init__(self) -> None:
        if self.count is not None and self.count < 1:
            raise ValueError(f"a sample of a trace needs at least 1 request, got {self.count}")
        if self.share is not None and not 0.0 < self.share <= 1.0:
            raise ValueError(f"a sample's share must be more than 0 and at most 1, got {self.share:g}")

    @classmethod
    def parse(cls, text: str) -> Sample:
        """From `300` (requests), `0.1` or `10%` (a share)."""
        count, share = None, None
        try:
            if text.endswith("%"):
                share = float(text[:-1]) / 100
            elif "." in text:
                share = float(text)
            else:
                count = int(text)
        except ValueError as error:
            raise ValueError(f"a sample is a number of requests or a share (300, 0.1, 10%), got {text!r}") from error
        return cls(count=count, share=share)

    def of(self, num_requests: int) -> int:
        """Requests to send of so many."""
        return self.count if self.count is not None else max(1, round((self.share or 1.0) * num_requests))


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceProfile:
    """How a trace is sent."""

    sample: Sample | None = None
    """Default: all of it."""
    time_scale: float = 1.0
    """How many times as fast as it was recorded."""
    length_scale: int = 1
    """What all lengths are divided by; must divide BLOCK_TOKENS."""
    too_long: TooLong = "clip"
    """What becomes of a request over the model's limit: cut to it, or left out."""
    duration_s: float | None = None
    """Send what is due within this time, after scaling. Default: all of it."""
    num_warmup: int = 2
    """Requests sent one after another before the measurement, and not part of it."""
    deadline_s: float | None = None
    """Deadline of each request; default: the server's."""
    seed: int = 0
    """Decides the sample and which tokens an id stands for."""

    def __post_init__(self) -> None:
        for name in ("time_scale", "duration_s", "deadline_s"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} must be more than 0, got {value}")
        if self.length_scale < 1 or BLOCK_TOKENS % self.length_scale:
            allowed = ", ".join(str(1 << power) for power in range(BLOCK_TOKENS.bit_length()))
            raise ValueError(
                f"length_scale must leave whole tokens of a block of {BLOCK_TOKENS}: one of {allowed}, "
                f"got {self.length_scale}"
            )
        if self.num_warmup < 0:
            raise ValueError(f"num_warmup must be at least 0, got {self.num_warmup}")


@dataclass(frozen=True, slots=True)
class TraceLine:
    """One request as it was recorded."""

    at_ms: float
    input_length: int
    output_length: int
    hash_ids: list[int]


@dataclass(frozen=True, slots=True)
class Selection:
    """What of a trace is to be sent, in the order of time."""

    lines: list[TraceLine]
    num_read: int
    num_families: int
    began_ms: float
    """When the trace begins."""


@dataclass(frozen=True, slots=True)
class Due:
    """A request of the replay, scaled and within the model's limit."""

    due_s: float
    hash_ids: list[int]
    prompt_len: int
    output_len: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceFigures:
    """What of a trace was sent, and what its prompts have in common."""

    num_read: int
    num_requests: int
    num_families: int
    """Conversations, or whatever else begins with words of its own, among what was sent."""
    num_clipped: int
    num_dropped: int
    max_model_len: int
    prompt_tokens: int
    best_cached_share: float
    """Share of the prompt tokens that stand in an earlier prompt behind the same beginning: what a cache that forgets
    nothing, and is there at once, would hold. A prompt's last token is always computed."""


def read_trace(path: Path) -> list[TraceLine]:
    """All lines in the order of time; raises TraceError with the file and the line that is wrong."""
    lines: list[TraceLine] = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, text in enumerate(file, 1):
                if text.strip():
                    lines.append(_line(text, f"{path}, line {number}"))
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"{path} cannot be read as a trace: {error}") from error
    if not lines:
        raise TraceError(f"{path} is empty: expected a JSON object a line with {FIELDS}")
    lines.sort(key=lambda line: line.at_ms)
    return lines


def select(lines: Sequence[TraceLine], profile: TraceProfile) -> Selection:
    """Cut the trace to its first `duration_s`, then draw whole families until the sample is reached.

    A family is what shares the first block behind the beginning that all requests of the trace have in common (a
    system prompt): a conversation with its later turns, or several that begin alike.
    """
    began_ms = lines[0].at_ms
    end_ms = began_ms + (profile.duration_s or float("inf")) * profile.time_scale * 1e3
    common = _num_common([line.hash_ids for line in lines])
    families: dict[int | None, list[TraceLine]] = {}
    num_within = 0
    for line in lines:
        if line.at_ms < end_ms:
            num_within += 1
            families.setdefault(line.hash_ids[common] if len(line.hash_ids) > common else None, []).append(line)
    drawn = list(families.values())
    if profile.sample is not None:
        wanted, taken = profile.sample.of(num_within), 0
        random.Random(profile.seed).shuffle(drawn)
        for count, family in enumerate(drawn, 1):
            taken += len(family)
            if taken >= wanted:
                drawn = drawn[:count]
                break
    kept = sorted((line for family in drawn for line in family), key=lambda line: line.at_ms)
    return Selection(kept, len(lines), len(drawn), began_ms)


class Replay:
    """The requests of a selection, for a model."""

    def __init__(self, selection: Selection, profile: TraceProfile, *, vocab_size: int, max_model_len: int) -> None:
        self._profile = profile
        self._ids = plain_ids(vocab_size)
        self._block = BLOCK_TOKENS // profile.length_scale
        self.due: list[Due] = []
        num_clipped = num_dropped = 0
        for line in selection.lines:
            due_s = (line.at_ms - selection.began_ms) / 1e3 / profile.time_scale
            prompt_len, output_len = self._scaled(line.input_length), self._scaled(line.output_length)
            if prompt_len + output_len > max_model_len:
                if profile.too_long == "drop":
                    num_dropped += 1
                    continue
                num_clipped += 1
                output_len = min(output_len, max_model_len - 1)
                prompt_len = min(prompt_len, max_model_len - output_len)
            self.due.append(Due(due_s, line.hash_ids, prompt_len, output_len))
        if not self.due:
            raise TraceError(
                f"no request is left of the trace: all {num_dropped} are over the model's limit of {max_model_len} "
                "tokens for prompt and answer together; give a larger --length-scale, or --trace-too-long clip"
            )
        self.figures = TraceFigures(
            num_read=selection.num_read,
            num_requests=len(self.due),
            num_families=selection.num_families,
            num_clipped=num_clipped,
            num_dropped=num_dropped,
            max_model_len=max_model_len,
            prompt_tokens=sum(due.prompt_len for due in self.due),
            best_cached_share=self._best_cached() / sum(due.prompt_len for due in self.due),
        )

    def plan(self) -> Iterator[Planned]:
        """Each request, made when it is asked for: a whole trace can be more than a memory holds."""
        for due in self.due:
            request = GenerateRequest(
                token_ids=TokenIds(ids=self.prompt(due)),
                sampling=Sampling(max_tokens=due.output_len, ignore_eos=True, temperature=0.0),
            )
            if self._profile.deadline_s is not None:
                request.deadline_s = self._profile.deadline_s
            yield Planned(due.due_s, request)

    def prompt(self, due: Due) -> list[int]:
        """Its tokens: for each id those that the seed gives to it, the last one's cut to the length."""
        tokens: list[int] = []
        for hash_id in due.hash_ids[: -(-due.prompt_len // self._block)]:
            tokens += random.Random(f"{self._profile.seed} {hash_id}").choices(self._ids, k=self._block)
        return tokens[: due.prompt_len]

    def _scaled(self, length: int) -> int:
        return -(-length // self._profile.length_scale)

    def _best_cached(self) -> int:
        """Prompt tokens that an earlier prompt has, behind the same ids."""
        seen: dict[int, int] = {}
        total = 0
        for due in self.due:
            cached, whole = 0, True
            for index in range(-(-due.prompt_len // self._block)):
                hash_id, length = due.hash_ids[index], min(self._block, due.prompt_len - index * self._block)
                known = seen.get(hash_id, 0)
                if whole:
                    cached += min(known, length)
                    whole = known >= length
                seen[hash_id] = max(known, length)
            total += min(cached, due.prompt_len - 1)
        return total


async def run_trace(
    client: Client, selection: Selection, profile: TraceProfile, on_progress: OnProgress | None = None
) -> tuple[LoadResult, TraceFigures]:
    """Warm up, then send the selection at its own times; `on_progress` hears of each request that has ended.

    Raises ClientError as `run_load` does, and TraceError where every request is over the model's limit.
    """
    model = await served_model(client)
    replay = Replay(selection, profile, vocab_size=model.vocab_size, max_model_len=model.max_model_len)
    plain = LoadProfile(concurrency=1, num_requests=1, num_warmup=profile.num_warmup)
    await warm_up(client, PromptMaker(plain, model.vocab_size, ~profile.seed), profile.num_warmup)
    result = await run_plan(client, replay.plan(), model=model.name, limit_s=None, on_progress=on_progress)
    return replace(result, paced=await is_paced(client)), replay.figures


def trace_rows(figures: TraceFigures, profile: TraceProfile) -> list[tuple[str, str]]:
    """What a report of a replay says beside the load's own figures, as (name, text)."""
    sent = f"{figures.num_requests} of {figures.num_read} requests, in {figures.num_families} families"
    scaling = f"lengths / {profile.length_scale}, {profile.time_scale:g} times as fast"
    over = f"{figures.num_clipped} clipped, {figures.num_dropped} dropped"
    return [
        ("trace", sent),
        ("scaling", scaling),
        (f"over the limit of {figures.max_model_len} tokens", over),
        ("prompt tokens", str(figures.prompt_tokens)),
        ("prompt tokens cached, at best", f"{figures.best_cached_share:.0%}"),
    ]


def _num_common(rows: list[list[int]]) -> int:
    """Numbers that all rows begin with: what the least and the greatest of them have in common."""
    pairs = zip(min(rows), max(rows), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _line(text: str, where: str) -> TraceLine:
    try:
        found: Any = json.loads(text)
    except ValueError as error:
        raise TraceError(f"{where}: expected a JSON object with {FIELDS}, got {text.strip()[:60]!r}") from error
    if not isinstance(found, dict):
        raise TraceError(f"{where}: expected a JSON object with {FIELDS}, got {text.strip()[:60]!r}")
    at_ms = found.get("timestamp")
    if not (isinstance(at_ms, int | float) and 0 <= at_ms < float("inf")):
        raise TraceError(f"{where}: timestamp must be milliseconds from 0 on, got {at_ms!r}")
    for name in ("input_length", "output_length"):
        if type(found.get(name)) is not int or found[name] < 1:
            raise TraceError(f"{where}: {name} must be a whole number of tokens from 1 on, got {found.get(name)!r}")
    ids, length = found.get("hash_ids"), found["input_length"]
    if not (isinstance(ids, list) and all(type(each) is int for each in ids)):
        raise TraceError(f"{where}: hash_ids must be a list of whole numbers, got {str(ids)[:60]}")
    if len(ids) != -(-length // BLOCK_TOKENS):
        raise TraceError(
            f"{where}: {len(ids)} hash_ids for an input_length of {length}, expected {-(-length // BLOCK_TOKENS)}: "
            f"one for each {BLOCK_TOKENS} tokens, and one for what is left"
        )
    return TraceLine(at_ms, length, found["output_length"], ids)
