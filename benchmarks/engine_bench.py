"""One engine under measurement: built once, then every case timed on it, and traced."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from benchmarks.engine_cases import Case, Figure, decode_figure, demand, prefill_figure, random_prompts
from benchmarks.engine_ceilings import rest
from benchmarks.engine_driver import Driver, Run, Watch
from benchmarks.engine_trace import Breakdown, Tracer, break_down, step_marks
from engine.config import CacheOptions, EngineOptions, ModelOptions
from engine.engine import Engine
from engine.runner import CPU_STEP_TOKENS, GPU_STEP_TOKENS

NUM_FIGURES = 2
WARM_STEPS = 4
SPARE_BLOCKS = 64
DEFAULT_STEP_TOKENS = {"cuda": GPU_STEP_TOKENS, "cpu": CPU_STEP_TOKENS}

TRACE_STEPS = 32
TRACE_FIRST, TRACE_LAST = 4, 28
"""Of the steps in which all sequences decode: recording begins after one and ends after the other."""
TRACE_SKIP = 2
"""Recorded steps left out at the beginning: the engine stood still while recording began."""

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How the engine is built and how long each case is measured."""

    directory: Path
    """Holds the config.json."""
    device: Literal["cpu", "cuda"]
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    block_size: int = 16
    attention: Literal["auto", "sdpa", "triton", "flash"] = "auto"
    cuda_graphs: bool = True
    max_step_tokens: int | None = None
    max_running: int = 256
    steps: int = 128
    """Decode steps of one figure."""
    quick: bool = False
    rest: bool = True
    """Whether a prompt to be prefilled comes to a GPU that has rested, rather than behind another one."""
    trace: bool = True
    """Whether to record kernels afterwards; never on a CPU."""


@dataclass(slots=True)
class Outcome:
    """What was measured of one case."""

    case: Case
    block_size: int
    figures: list[Figure] = field(default_factory=list)
    breakdown: Breakdown | None = None


class Bench:
    """An engine with dummy weights whose KV pool holds the largest of the cases."""

    def __init__(self, settings: Settings, cases: list[Case]) -> None:
        start = time.perf_counter()
        self.settings = settings
        self._step_tokens = settings.max_step_tokens or DEFAULT_STEP_TOKENS[settings.device]
        steps = max(settings.steps, TRACE_STEPS)
        num_blocks = max(case.num_blocks(steps, settings.block_size) for case in cases) + SPARE_BLOCKS
        self._engine = Engine(
            ModelOptions(path=str(settings.directory), load_format="dummy", dtype=settings.dtype),
            CacheOptions(block_size=settings.block_size, num_blocks=num_blocks, prefix_caching=False),
            EngineOptions(
                device=settings.device,
                max_step_tokens=settings.max_step_tokens,
                max_running=settings.max_running,
                attention=settings.attention,
                cuda_graphs=settings.cuda_graphs,
            ),
        )
        self._engine.runner.warm_up()
        self._engine.start()
        self._driver = Driver(self._engine)
        self._vocab_size = self._engine.runner.config.vocab_size
        self._seeds = itertools.count(1)
        self.start_s = time.perf_counter() - start
        """Seconds to load and warm up."""

    def warm(self, case: Case) -> None:
        """A short run of the case's shapes, not counted: kernels that compile themselves at first use do it here."""
        self._run(case, WARM_STEPS)

    def measure(self, case: Case) -> Figure:
        """One figure, on prompts that the engine has not seen."""
        steps = self.settings.steps
        if case.kind == "decode":
            return decode_figure(self._run(case, steps), demand(case, steps, self._step_tokens).prompt_lens, steps)
        runs = []
        for _ in range(case.repeats(quick=self.settings.quick)):
            if self.settings.rest:
                rest(torch.device(self.settings.device))
            runs.append(self._run(case, steps))
        return prefill_figure(runs, case.length)

    def trace(self, case: Case) -> Breakdown | None:
        """Where the time goes in some steps of a decode case, or in one prefill from its first kernel to its last.

        None if the profiler recorded no kernel. The profiler slows a step down: compare its window with the figures.
        """
        tracer = Tracer()
        watch = _trace_steps(tracer, case) if case.kind == "decode" else _trace_all(tracer, case)
        self._run(case, TRACE_STEPS, watch)
        kernels = tracer.kernels()
        if case.kind == "prefill":
            return break_down(kernels, [])
        marks = step_marks(kernels, TRACE_LAST - TRACE_FIRST)
        return break_down(kernels, marks[TRACE_SKIP:])

    def close(self) -> None:
        """Stop the engine and give its memory back."""
        self._engine.stop()
        del self._engine, self._driver
        gc.collect()
        if self.settings.device == "cuda":
            torch.cuda.empty_cache()

    def _run(self, case: Case, steps: int, watch: Watch | None = None) -> Run:
        wanted = demand(case, steps, self._step_tokens)
        prompts = random_prompts(wanted.prompt_lens, self._vocab_size, next(self._seeds))
        return self._driver.run(prompts, wanted.max_tokens, watch)


def _trace_steps(tracer: Tracer, case: Case) -> Watch:
    together = 0

    def watch(run: Run) -> None:
        nonlocal together
        if not run.steps or len(run.steps[-1].emitted) != case.num_seqs:
            return
        together += 1
        if together == TRACE_FIRST:
            tracer.start()
        elif together == TRACE_LAST:
            tracer.stop()

    return watch


def _trace_all(tracer: Tracer, case: Case) -> Watch:
    def watch(run: Run) -> None:
        if not run.steps:
            tracer.start()
        elif sum(len(step.emitted) for step in run.steps) == case.num_seqs:
            tracer.stop()

    return watch


def measure_cases(settings: Settings, cases: list[Case], say: Say) -> tuple[list[Outcome], float]:
    """All cases on one engine: each warmed up and timed, all timed again, then all traced; and seconds to start it."""
    say(f"starting an engine, block size {settings.block_size}")
    bench = Bench(settings, cases)
    outcomes = [Outcome(case, settings.block_size) for case in cases]
    try:
        for number in range(1, NUM_FIGURES + 1):
            for outcome in outcomes:
                if number == 1:
                    say(f"{outcome.case.name}: warming up")
                    bench.warm(outcome.case)
                outcome.figures.append(bench.measure(outcome.case))
                say(f"{outcome.case.name}, run {number}: {outcome.figures[-1].time_s * 1e3:.3f} ms")
        if settings.trace and settings.device == "cuda":
            _trace_cases(bench, outcomes, say)
        return outcomes, bench.start_s
    finally:
        bench.close()


def _trace_cases(bench: Bench, outcomes: list[Outcome], say: Say) -> None:
    """Add breakdowns; if the profiler fails, the figures are still worth having."""
    say("starting the profiler")
    try:
        _start_profiler()
        for outcome in outcomes:
            outcome.breakdown = bench.trace(outcome.case)
            say(f"{outcome.case.name}: " + ("traced" if outcome.breakdown else "the profiler saw no kernel"))
    except Exception as error:
        say(f"tracing failed: {error!r}")


def _start_profiler() -> None:
    """Record something once: what the profiler sets up at first use is then done."""
    tracer = Tracer()
    tracer.start()
    torch.ones(1, device="cuda").add_(1)
    tracer.stop()
