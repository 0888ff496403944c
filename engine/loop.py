"""The engine's thread: takes in what others ask, then schedules, runs and updates, step after step.

    NEW --start--> RUNNING --stop--> STOPPED

Everything that touches sequences or blocks happens on this thread; other threads hand it functions
with `post` (no answer) or `call` (a Future). A function that fails harms nobody else: `post` logs
it, `call` carries the error to its Future. A step that fails ends the sequences of the engine with
FAILED, and the loop goes on. While there is nothing to compute the thread sleeps on its inbox.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol, TypeVar

from engine.batch import OnLayer, StepPlan, StepResult
from engine.errors import EngineError
from engine.scheduler import Emitted, Scheduler

log = logging.getLogger(__name__)

T = TypeVar("T")
OnStep = Callable[[list[Emitted]], None]
"""Called once after each step that produced tokens or endings, on the loop's thread."""
StepHook = Callable[[StepPlan], OnLayer | None]
"""Called before each step with its plan; what it returns is called as each layer's KV is written."""


class Runner(Protocol):
    """What the loop asks of a model runner."""

    def run(self, plan: StepPlan, on_layer: OnLayer | None = None) -> StepResult:
        """Compute a step."""


class EngineLoop:
    """Runs one engine's steps on a thread of its own."""

    def __init__(self, scheduler: Scheduler, runner: Runner) -> None:
        self.scheduler = scheduler
        self.on_step: OnStep | None = None
        self.step_hook: StepHook | None = None
        self.on_idle: Callable[[], None] | None = None
        """Called when there is nothing to compute, before the thread sleeps."""
        self._runner = runner
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
        num_tokens = 0
        try:
            plan = self.scheduler.schedule()
            if plan is None:
                return False
            num_tokens = plan.num_tokens
            on_layer = self.step_hook(plan) if self.step_hook is not None else None
            emitted = self.scheduler.update(plan, self._runner.run(plan, on_layer))
        except Exception as error:
            log.exception("a step of %d tokens failed", num_tokens)
            emitted = self.scheduler.fail_all(f"a step failed: {error}")
        if emitted and self.on_step is not None:
            try:
                self.on_step(emitted)
            except Exception:
                log.exception("handing on the tokens of a step failed")
        return True

    def _run(self) -> None:
        idle = True
        while self._take_in(wait=idle):
            idle = not self.step()
            if idle and self.on_idle is not None:
                self.on_idle()

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
