"""Drives one engine as a worker does: posts prompts to its loop and notes the moment of each step's tokens."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from engine.api import FinishReason, GenerateRequest, SamplingParams
from engine.engine import Engine
from engine.scheduler import Emitted
from engine.sequence import Sequence

ANSWER_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Step:
    """A step's tokens, and when they were handed on."""

    moment: float
    emitted: list[Emitted]


@dataclass(slots=True)
class Run:
    """What became of some prompts posted together."""

    start: float
    """Seconds of the clock at which they were posted."""
    steps: list[Step] = field(default_factory=list)


Watch = Callable[[Run], None]
"""Called on the loop's thread: before the prompts are added, and after each step that gave tokens."""


class Driver:
    """One engine that serves nobody else."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._ids = itertools.count()

    def run(self, prompts: list[tuple[int, ...]], max_tokens: tuple[int, ...], watch: Watch | None = None) -> Run:
        """Answer the prompts, all posted at once, greedily and past any end-of-sequence token.

        Raises RuntimeError for a sequence that fails, TimeoutError if there is no answer.
        """
        sequences = [self._sequence(prompt, most) for prompt, most in zip(prompts, max_tokens, strict=True)]
        run, done = Run(0.0), threading.Event()
        errors: list[Exception] = []
        left = len(sequences)

        def add() -> None:
            _guarded(watch, run, errors)
            for sequence in sequences:
                self.engine.scheduler.add(sequence)

        def on_step(emitted: list[Emitted]) -> None:
            nonlocal left
            run.steps.append(Step(time.perf_counter(), emitted))
            for _, output in emitted:
                if output.finish_reason is not None:
                    left -= 1
                    if output.finish_reason is FinishReason.FAILED:
                        errors.append(RuntimeError(output.reason))
            _guarded(watch, run, errors)
            if left == 0:
                done.set()

        self.engine.loop.on_step = on_step
        run.start = time.perf_counter()
        self.engine.loop.post(add)
        if not done.wait(ANSWER_TIMEOUT_S):
            raise TimeoutError(f"the engine did not answer {len(prompts)} prompts within {ANSWER_TIMEOUT_S:.0f} s")
        if errors:
            raise errors[0]
        return run

    def _sequence(self, prompt: tuple[int, ...], max_tokens: int) -> Sequence:
        number = next(self._ids)
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        request = GenerateRequest(request_id=str(number), prompt_token_ids=prompt, params=params)
        return Sequence.from_request(request, arrival=float(number))


def _guarded(watch: Watch | None, run: Run, errors: list[Exception]) -> None:
    """Keep what the watcher raises for the caller: the loop would only log it."""
    if watch is None:
        return
    try:
        watch(run)
    except Exception as error:
        errors.append(error)
