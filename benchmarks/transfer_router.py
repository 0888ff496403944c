"""The run's side of section `hand-over`: it asks, times and compares."""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from benchmarks.budget import Budget
from benchmarks.transfer_plan import Plan
from benchmarks.transfer_report import Report, Sheet, median_and_p90, note
from benchmarks.transfer_rig import Rig
from engine import wire
from engine.api import GenerateRequest, SamplingParams
from protos import worker_pb2 as pb

NUM_WARM = 2
SECOND_TOKEN_GOOD_MS, TTFT_GOOD_MS, HIDDEN_GOOD = 10.0, 10.0, 0.90
COLUMNS = (
    "prompt", "alone ms", "p90", "split ms", "p90", "1st-2nd ms", "p90", "step ms",
    "move ms", "p90", "tail ms", "p90", "hidden", "pieces",
)  # fmt: skip


@dataclass(slots=True)
class Times:
    """Of prompts of one length, in seconds."""

    alone: list[float] = field(default_factory=list)
    """From asking to having the first token, where the same engine goes on."""
    split: list[float] = field(default_factory=list)
    """From reserving to having the first token."""
    alone_inside: list[float] = field(default_factory=list)
    """The same as the engine sees it: from the prompt's arrival to the first token."""
    split_inside: list[float] = field(default_factory=list)
    reserve: list[float] = field(default_factory=list)
    """From asking for blocks to having them."""
    gap: list[float] = field(default_factory=list)
    """First token at the prefill worker to the second at the decode worker."""
    step: list[float] = field(default_factory=list)
    """Between tokens that follow."""
    move: list[float] = field(default_factory=list)
    """A ticket of that size whose KV is all there: from the first push to its being home."""
    tail: list[float] = field(default_factory=list)
    """First token computed to the last piece home; 0 if it was home before."""
    pieces: list[int] = field(default_factory=list)


class Router:
    """Asks both processes for answers to fresh random prompts."""

    def __init__(self, rig: Rig, vocab_size: int, *, reserve_first: bool = False) -> None:
        self._rig = rig
        self._reserve_first = reserve_first
        self._sender, self._receiver = rig.both("crafts.identity")
        self._computed_at = 0.0
        self._vocab_size = vocab_size
        self._random = random.Random(time.monotonic_ns())
        self._numbers = itertools.count(1)

    def request(self, length: int, max_tokens: int, prompt: Sequence[int] | None = None) -> tuple[str, bytes]:
        """A request's id and message; its prompt is random unless it is given."""
        request_id = f"request-{next(self._numbers)}"
        tokens = tuple(prompt or self.prompt(length))
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        request = GenerateRequest(request_id=request_id, prompt_token_ids=tokens, params=params)
        return request_id, wire.request_to_wire(request).SerializeToString()

    def prompt(self, length: int) -> list[int]:
        """Tokens that nobody has seen."""
        return self._random.choices(range(self._vocab_size), k=length)

    def alone(self, request: bytes) -> tuple[float, float, list[int]]:
        """Have the sender's engine answer the request alone; seconds of it all and to its first token, its tokens."""
        began = time.monotonic()
        steps, inside_s = self._rig.sender.call("crafts.alone", request)
        self._computed_at = time.monotonic()
        return self._computed_at - began, inside_s, [token for _, tokens in steps for token in tokens]

    def rest(self, seconds: float) -> None:
        """Return so long after the prefill GPU has computed last: whatever it did then, it begins equally cool."""
        time.sleep(max(0.0, self._computed_at + seconds - time.monotonic()))

    def split(self, requests: list[tuple[str, bytes]], times: Times) -> list[list[int]]:
        """Prefill on the sender, decode on the receiver, all asked for at once; their tokens.

        As the router does it, a prompt goes to the one while the other reserves blocks for it, which tells the first
        of them over the pair; the run brings the ticket too, and the first to come counts.
        """
        rig, began = self._rig, time.monotonic()
        messages = [request for _, request in requests]
        if not self._reserve_first:
            rig.sender.begin("crafts.begin", messages, self._receiver)
        reserved = rig.receiver.call("crafts.reserve_all", messages, self._sender)
        reserved_at = time.monotonic()
        if self._reserve_first:
            rig.sender.begin("crafts.begin", messages, self._receiver)
        rig.sender.wait()
        rig.sender.call("crafts.take_tickets", reserved)
        replies = rig.sender.call("crafts.replies")
        answered = self._computed_at = time.monotonic()
        times.reserve.append((reserved_at - began) / len(requests))
        times.split.append(answered - began)
        answers = []
        for (request_id, _), (data, first_at) in zip(requests, replies, strict=True):
            steps, noted = rig.receiver.call("crafts.collect_with_timing", request_id)
            moments = [moment for moment, _ in steps]
            reply = pb.PrefillReply.FromString(data)
            times.split_inside.append(reply.queue_s + reply.prefill_s)
            times.gap.append(moments[0] - first_at)
            times.step += [end - start for start, end in itertools.pairwise(moments)]
            times.tail.append(noted["tail_s"])
            answers.append([*reply.first.token_ids, *(token for _, tokens in steps for token in tokens)])
        rig.both("crafts.settled")
        return answers

    def move(self, num_tokens: int) -> float:
        """Seconds of a ticket of that size alone."""
        self._rig.receiver.call("node.grant", 1, num_tokens, False)
        (pushed,) = self._rig.sender.call("node.push", 1)
        (arrival,) = self._rig.receiver.call("node.arrivals", 1)
        self._rig.receiver.call("node.forget_grants")
        return float(arrival.moment - pushed.moment)

    def num_pieces(self) -> int:
        """Pieces received so far."""
        return int(self._rig.receiver.call("node.traffic")["received_pieces"])


def run_handover(rig: Rig, plan: Plan, report: Report, budget: Budget, vocab_size: int) -> dict[str, Any]:
    """The section."""
    found: dict[str, Any] = report.figures.setdefault("hand-over", {"lengths": [], "together": None, "answers": None})
    rig.both("node.open", plan.ctas)
    try:
        rig.both("crafts.open")
        router = Router(rig, vocab_size, reserve_first=plan.reserve_first)
        sheet = Sheet(f"hand-over: {plan.ctas} CTAs, medians of {plan.repeats} prompts", COLUMNS)
        for length in plan.lengths:
            if not budget.allows(f"hand-over of {length} tokens"):
                continue
            times = _measure(router, plan, length, budget)
            row = _row(length, times)
            found["lengths"].append(row)
            _show(sheet, row)
            report.say(f"hand-over: {length} tokens, TTFT {row['ttft_extra_ms']:+.2f} ms")
        _judge(found["lengths"])
        if budget.allows("prompts together"):
            found["together"] = _together(router, plan)
        if budget.allows("comparing answers"):
            found["answers"] = _compare(rig, router, plan, budget)
            _tell(found["answers"])
    finally:
        rig.both("crafts.close")
    return found


def _measure(router: Router, plan: Plan, length: int, budget: Budget) -> Times:
    """Alone and split, each first in every other repeat, and moved; with fresh prompts each time."""
    times = Times()
    for number in range(NUM_WARM + plan.repeats):
        counts = number >= NUM_WARM
        if counts and times.split and not budget.allows(f"repeat {number} of {length} tokens"):
            break
        here = times if counts else Times()
        parts = [partial(_alone, router, length, here), partial(_split, router, plan, length, here)]
        for part in parts if number % 2 else reversed(parts):
            router.rest(plan.rest_s)
            part()
        here.move.append(router.move(length))
    return times


def _alone(router: Router, length: int, times: Times) -> None:
    alone_s, inside_s, _ = router.alone(router.request(length, 1)[1])
    times.alone.append(alone_s)
    times.alone_inside.append(inside_s)


def _split(router: Router, plan: Plan, length: int, times: Times) -> None:
    pieces = router.num_pieces()
    router.split([router.request(length, plan.answer)], times)
    times.pieces.append(router.num_pieces() - pieces)


def _row(length: int, times: Times) -> dict[str, Any]:
    """Medians and 90th percentiles, in milliseconds."""
    row: dict[str, Any] = {"length": length, "count": len(times.split)}
    for name in ("alone", "split", "alone_inside", "split_inside", "reserve", "gap", "step", "move", "tail"):
        values = [value * 1e3 for value in getattr(times, name)]
        row[f"{name}_ms"], row[f"{name}_p90_ms"] = median_and_p90(values)
    row["pieces"] = statistics.median(times.pieces)
    row["ttft_extra_ms"] = row["split_ms"] - row["alone_ms"]
    row["each_ms"] = {name: [value * 1e3 for value in getattr(times, name)] for name in ("alone", "split")}
    row["each_extra_ms"] = [(split - alone) * 1e3 for split, alone in zip(times.split, times.alone, strict=True)]
    row["engine_extra_ms"] = row["split_inside_ms"] - row["alone_inside_ms"]
    row["gap_extra_ms"] = row["gap_ms"] - row["step_ms"]
    row["hidden"] = 1 - row["tail_ms"] / row["move_ms"]
    return row


def _show(sheet: Sheet, row: dict[str, Any]) -> None:
    names: Iterator[str] = iter(("alone", "split", "gap"))
    cells: list[Any] = [row["length"]]
    for name in names:
        cells += [row[f"{name}_ms"], row[f"{name}_p90_ms"]]
    cells.append(row["step_ms"])
    for name in ("move", "tail"):
        cells += [row[f"{name}_ms"], row[f"{name}_p90_ms"]]
    sheet.row([*cells, f"{row['hidden']:.1%}", row["pieces"]])


def _judge(rows: list[dict[str, Any]]) -> None:
    """The targets beside the longest prompt's figures."""
    if not rows:
        return
    for row in rows:
        each = ", ".join(f"{extra:+.1f}" for extra in row["each_extra_ms"])
        note(f"{row['length']} tokens, TTFT over the engine alone, repeat by repeat, ms: {each}")
    row = max(rows, key=lambda each: each["length"])
    note(
        f"at {row['length']} tokens: "
        f"TTFT {row['ttft_extra_ms']:+.2f} ms over the engine alone (good {TTFT_GOOD_MS:g}), of which the engine "
        f"itself {row['engine_extra_ms']:+.2f}; blocks reserved after {row['reserve_ms']:.2f} ms; "
        f"first to second token {row['gap_extra_ms']:+.2f} ms over a step (good {SECOND_TOKEN_GOOD_MS:g}); "
        f"{row['hidden']:.1%} of the transfer hidden (good {HIDDEN_GOOD:.0%})"
    )


def _together(router: Router, plan: Plan) -> dict[str, Any]:
    """Several prompts at once over one pair: no prompt's KV should wait for another's to be computed."""
    count, length = plan.together
    times = Times()
    for number in range(NUM_WARM + max(2, plan.repeats // 3)):
        requests = [router.request(length, plan.answer) for _ in range(count)]
        router.split(requests, times if number >= NUM_WARM else Times())
    found: dict[str, Any] = {"count": count, "length": length, "samples": len(times.tail)}
    for name in ("gap", "tail", "step"):
        values = [value * 1e3 for value in getattr(times, name)]
        found[f"{name}_ms"], found[f"{name}_p90_ms"] = median_and_p90(values)
        found[f"{name}_max_ms"] = max(values)
    note(
        f"{count} prompts of {length} tokens at once: "
        f"tail {found['tail_ms']:.2f} ms (most {found['tail_max_ms']:.2f}), "
        f"first to second token {found['gap_ms']:.2f} ms (most {found['gap_max_ms']:.2f}), step {found['step_ms']:.2f}"
    )
    return found


def _compare(rig: Rig, router: Router, plan: Plan, budget: Budget) -> dict[str, Any]:
    """The same prompts answered by one engine and by two: how many answers are equal, and where others part."""
    first, step = plan.check_prompt
    parted: list[int] = []
    equal = 0
    for number in range(plan.checks):
        if not budget.allows(f"comparing answer {number}"):
            break
        length = first + number * step
        prompt = router.prompt(length)
        _, _, wanted = router.alone(router.request(length, plan.check_tokens, prompt)[1])
        rig.both("crafts.forget")
        (found,) = router.split([router.request(length, plan.check_tokens, prompt)], Times())
        rig.both("crafts.forget")
        if found == wanted:
            equal += 1
        else:
            pairs = enumerate(itertools.zip_longest(found, wanted))
            parted.append(next(index for index, (ours, theirs) in pairs if ours != theirs))
    return {"count": equal + len(parted), "equal": equal, "parted_at": parted, "tokens": plan.check_tokens}


def _tell(answers: dict[str, Any]) -> None:
    parted = f", the others part at tokens {sorted(answers['parted_at'])}" if answers["parted_at"] else ""
    note(f"{answers['equal']} of {answers['count']} answers of {answers['tokens']} tokens equal one engine's{parted}")
