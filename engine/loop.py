"""The engine's thread: takes in what others ask, then schedules, runs and updates, step after step.

    NEW --start--> RUNNING --stop--> STOPPED

Everything that touches sequences or blocks happens on this thread; other threads hand it functions
with `post` (no answer) or `call` (a Future). A function that fails harms nobody else: `post` logs
it, `call` carries the error to its Future. A step that fails ends the sequences of the engine with
FAILED, and the loop goes on. While there is nothing to compute the thread sleeps on its inbox.

Where the runner computes on its own (a GPU), the loop runs ahead of it: it schedules and launches the next step while
the present one is computed, and takes in each step's tokens one step later, so the GPU never waits for Python.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol, TypeVar

from engine.batch import LayerHook, StepPlan, StepResult
from engine.errors import EngineError
from engine.prompt_rate import PromptRate
from engine.scheduler import Emitted, Scheduler

log = logging.getLogger(__name__)

T = TypeVar("T")
OnStep = Callable[[list[Emitted]], None]
"""Called once after each step that produced tokens or endings, on the loop's thread."""
StepHook = Callable[[StepPlan], LayerHook | None]
"""Called before each step with its plan; what it returns hears of each layer's KV as it is written."""


class StepUnderWay(Protocol):
    """A step that is being computed."""

    def result(self) -> StepResult:
        """Wait for its end; its outcome, or the error that ended it."""


class Runner(Protocol):
    """What the loop asks of a model runner."""

    @property
    def run_ahead(self) -> int:
        """Steps that may be launched before the one before them is done: 0 or 1."""

    def launch(self, plan: StepPlan, hook: LayerHook | None = None) -> StepUnderWay:
        """Begin to compute a step; steps are computed in the order of their launches."""


@dataclass(frozen=True, slots=True)
class _Launched:
    """A step under way."""

    plan: StepPlan
    step: StepUnderWay
    at: float


class EngineLoop:
    """Runs one engine's steps on a thread of its own."""

    def __init__(self, scheduler: Scheduler, runner: Runner) -> None:
        self.scheduler = scheduler
        self.on_step: OnStep | None = None
        self.step_hook: StepHook | None = None
        self.on_idle: Callable[[], None] | None = None
        """Called when there is nothing to compute, before the thread sleeps."""
        self._runner = runner
        self.prompt_rate = PromptRate()
        self._under_way: deque[_Launched] = deque()
        self._updated_at = 0.0
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine-loop", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, timeout_s: float = 30.0) -> None:
        """End after the step under way; EngineError if that takes longer than timeout_s."""
        self._inbox.put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise EngineError(f"the engine loop did not end its step within {timeout_s} s")

    def post(self, function: Callable[[], None]) -> None:
        """Have the loop's thread call a function between steps."""
        self._inbox.put(function)

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Have the loop's thread call a function between steps; the Future brings its result."""
        future: Future[T] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except BaseException as error:
                    future.set_exception(error)

        self._inbox.put(run)
        return future

    def step(self) -> bool:
        """Schedule, run, update: one step. False if there was nothing to compute."""
        try:
            plan = self.scheduler.schedule()
            if plan is not None:
                hook = self.step_hook(plan) if self.step_hook is not None else None
                began = time.monotonic()
                self._under_way.append(_Launched(plan, self._runner.launch(plan, hook), began))
            if not self._under_way:
                return False
            ahead = self._runner.run_ahead if plan is not None else 0
            emitted = self._update() if len(self._under_way) > ahead else []
        except Exception as error:
            log.exception("a step failed")
            self._under_way.clear()
            emitted = self.scheduler.fail_all(f"a step failed: {error}")
        if emitted and self.on_step is not None:
            try:
                self.on_step(emitted)
            except Exception:
                log.exception("handing on the tokens of a step failed")
        return True

    def _update(self) -> list[Emitted]:
        """Wait for the oldest step under way and take in its tokens."""
        launched = self._under_way.popleft()
        result = launched.step.result()
        now = time.monotonic()
        self.prompt_rate.add(launched.plan, now - max(launched.at, self._updated_at))
        self._updated_at = now
        return self.scheduler.update(launched.plan, result)

    def _run(self) -> None:
        idle = True
        while self._take_in(wait=idle):
            idle = not self.step()
            if idle and self.on_idle is not None:
                self.on_idle()
        for launched in self._under_way:  # nobody reads them any more, but their memory is in use until then
            with contextlib.suppress(Exception):
                launched.step.result()

    def _take_in(self, *, wait: bool) -> bool:
        """Call everything in the inbox (waiting for the first if there is nothing else to do); False to end."""
        while True:
            try:
                function = self._inbox.get(block=wait)
            except queue.Empty:
                return True
            if function is None:
                return False
            wait = False
            try:
                function()
            except Exception:
                log.exception("a function posted to the engine loop failed")
