"""Section `decode-load`: what a batch that decodes loses while KV arrives beside it.

One batch goes on decoding; phases without load stand before and behind each phase with one, and their mean is its
baseline, so that the growing context cancels. The tickets are granted on the engine's loop, into blocks of its pool.
"""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from typing import Any

from benchmarks.budget import Budget
from benchmarks.engine_cases import random_prompts
from benchmarks.transfer_pair import rig_pair
from benchmarks.transfer_plan import Plan
from benchmarks.transfer_report import Report, Sheet, note
from benchmarks.transfer_rig import Rig
from benchmarks.transfer_side import Side
from benchmarks.transfer_tickets import Node
from engine.api import GenerateRequest, SamplingParams
from engine.scheduler import Emitted
from engine.sequence import Sequence

STEP_TIMEOUT_S = 50.0
TARGET, AIM = 0.03, 0.01
"""Most that KV at one prefill GPU's rate may slow decode down."""
LOADS = ("paced", "full", "paced", "full")
COLUMNS = ("CTAs", "load", "GB/s", "base ms", "mean ms", "slower", "median ms", "slower", "p90 ms", "pieces", "MiB")


class Batch:
    """Sequences that decode together in one engine."""

    def __init__(self, side: Side, node: Node) -> None:
        self._side = side
        self._node = node
        self._seeds = itertools.count(1000)
        self._sequences: list[Sequence] = []
        self._moments: list[float] = []
        """When each step in which all decode was handed on."""
        self._changed = threading.Condition()
        self._wanted = 0
        self._trouble = ""

    def begin(self) -> float:
        """Post the prompts and wait until all decode; seconds it took."""
        plan, engine = self._side.plan, self._side.engine
        assert engine is not None, "start_engine comes first"
        began = time.monotonic()
        lengths = (plan.batch_prompt,) * plan.batch
        prompts = random_prompts(lengths, engine.runner.config.vocab_size, next(self._seeds))
        params = SamplingParams(max_tokens=plan.load_most_steps, ignore_eos=True)
        self._sequences = [
            Sequence.from_request(
                GenerateRequest(request_id=f"batch-{number}", prompt_token_ids=prompt, params=params), float(number)
            )
            for number, prompt in enumerate(prompts)
        ]
        self._moments, self._trouble = [], ""

        def add() -> None:
            engine.loop.on_step = self._on_step
            for sequence in self._sequences:
                engine.scheduler.add(sequence)

        engine.loop.post(add)
        self._wait_for(1)
        return time.monotonic() - began

    def phase(self, skip: int, steps: int) -> dict[str, Any]:
        """Times between consecutive steps from now on, and what the node received meanwhile."""
        first = len(self._moments) + skip
        self._wait_for(first + 1)
        before = self._node.traffic()
        self._wait_for(first + steps + 1)
        after = self._node.traffic()
        moments = self._moments[first : first + steps + 1]
        num_bytes = after["received_bytes"] - before["received_bytes"]
        return {
            "times": [end - start for start, end in itertools.pairwise(moments)],
            "gb_s": num_bytes / (after["moment"] - before["moment"]) / 1e9,
            "pieces": after["received_pieces"] - before["received_pieces"],
            "bytes": num_bytes,
            "context": statistics.mean(sequence.num_tokens for sequence in self._sequences),
        }

    def end(self) -> None:
        """Abort the sequences."""
        engine = self._side.engine
        assert engine is not None, "begin came before"
        for sequence in self._sequences:
            engine.loop.post(lambda sequence=sequence: engine.scheduler.abort(sequence))  # type: ignore[misc]
        engine.loop.call(lambda: None).result(STEP_TIMEOUT_S)
        engine.loop.on_step = None
        self._sequences = []

    def _on_step(self, emitted: list[Emitted]) -> None:
        now = time.monotonic()
        for sequence, output in emitted:
            if output.finish_reason is not None:
                self._trouble = f"sequence {sequence.request.request_id} ended: {output.finish_reason} {output.reason}"
        if len(emitted) == len(self._sequences):
            self._moments.append(now)
        if self._trouble or len(self._moments) >= self._wanted:
            with self._changed:
                self._changed.notify_all()

    def _wait_for(self, count: int) -> None:
        """Return when so many steps were taken in."""
        with self._changed:
            self._wanted = count
            done = self._changed.wait_for(lambda: len(self._moments) >= count or self._trouble, STEP_TIMEOUT_S)
        if self._trouble:
            raise RuntimeError(self._trouble)
        if not done:
            raise TimeoutError(f"{len(self._moments)} steps of all sequences, {count} were awaited")


def run_load(rig: Rig, plan: Plan, report: Report, budget: Budget) -> list[dict[str, Any]]:
    """The section."""
    rows: list[dict[str, Any]] = report.figures.setdefault("decode-load", [])
    title = f"decode-load: batch {plan.batch}, {plan.load_steps} steps a phase, paced is {plan.load_rate / 1e9:g} GB/s"
    sheet = Sheet(title, COLUMNS)
    for ctas in plan.load_ctas:
        if budget.allows(f"decode-load {ctas} CTAs"):
            _measure(rig, plan, ctas, report, sheet)
    note(f"good is at most {TARGET:.0%} slower when paced, {AIM:.0%} is what we are after; base: the phases around")
    return rows


def _measure(rig: Rig, plan: Plan, ctas: int, report: Report, sheet: Sheet) -> None:
    """All phases with one number of CTAs; each line is said as it is known."""
    rig.both("node.open", ctas)
    began = False
    try:
        rig.receiver.call("node.grant", plan.load_tickets, plan.load_tokens)
        rig.sender.call("node.push", plan.load_tickets)
        rig.sender.call("node.load_on", plan.load_rate)  # small pieces too are moved once before anything counts
        rig.receiver.call("node.arrivals", plan.load_tickets + 1)
        rig.sender.call("node.load_off")
        prefill_s = rig.receiver.call("batch.begin")
        began = True
        report.say(f"decode-load: {ctas} CTAs, {plan.batch} prompts computed in {prefill_s:.1f} s")
        before = _phase(rig, plan, None)
        for load in LOADS:
            loaded = _phase(rig, plan, load)
            behind = _phase(rig, plan, None)
            row = {"ctas": ctas, "load": load} | _row(before, loaded, behind)
            row["self_test_gb_s"] = rig_pair(rig.receiver.call("node.traffic"))[1] / 1e9
            report.figures["decode-load"].append(row)
            numbers = (row["gb_s"], row["base_mean_ms"], row["mean_ms"], f"{row['slower']:+.1%}", row["median_ms"])
            more = (f"{row['median_slower']:+.1%}", row["p90_ms"], row["pieces"], row["piece_mib"])
            sheet.row((ctas, load, *numbers, *more))
            before = behind
    finally:
        if began:
            rig.receiver.call("batch.end")
        rig.both("node.close")


def _phase(rig: Rig, plan: Plan, load: str | None) -> dict[str, Any]:
    """Some steps, with that load or without."""
    if load is None:
        idle: dict[str, Any] = rig.receiver.call("batch.phase", plan.load_skip, plan.load_steps)
        return idle
    rig.sender.call("node.load_on", plan.load_rate if load == "paced" else None)
    try:
        loaded: dict[str, Any] = rig.receiver.call("batch.phase", plan.load_skip, plan.load_steps)
    finally:
        rig.sender.call("node.load_off")
    return loaded


def _row(before: dict[str, Any], loaded: dict[str, Any], behind: dict[str, Any]) -> dict[str, Any]:
    """A phase with load beside those around it."""
    base = statistics.mean([statistics.mean(before["times"]), statistics.mean(behind["times"])])
    base_median = statistics.mean([statistics.median(before["times"]), statistics.median(behind["times"])])
    mean, median = statistics.mean(loaded["times"]), statistics.median(loaded["times"])
    ordered = sorted(loaded["times"])
    return {
        "gb_s": loaded["gb_s"],
        "base_mean_ms": base * 1e3,
        "base_median_ms": base_median * 1e3,
        "base_spread": abs(statistics.mean(before["times"]) - statistics.mean(behind["times"])) / base,
        "mean_ms": mean * 1e3,
        "median_ms": median * 1e3,
        "p90_ms": ordered[int(0.9 * (len(ordered) - 1))] * 1e3,
        "slower": mean / base - 1,
        "median_slower": median / base_median - 1,
        "pieces": loaded["pieces"],
        "piece_mib": loaded["bytes"] / max(1, loaded["pieces"]) / (1 << 20),
        "context": loaded["context"],
    }
