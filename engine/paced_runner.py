"""A model runner whose steps take at least as long as they would elsewhere (see `pace.py`).

The tokens are the model's own; only their time is another's. A paced runner computes like a GPU: one step after the
other, so a step that was launched while another was under way begins when that one ends.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from engine.batch import LayerHook, StepPlan, StepResult
from engine.loop import Runner, StepUnderWay
from engine.pace import PaceOptions, StepWork

log = logging.getLogger(__name__)

LATE_S = 0.001
"""A step this much longer than its pace is late: this machine is too slow for the rehearsal."""
NUM_JUDGED = 1000
"""Steps after which the late ones among them are judged."""
TOLERATED = 0.05
"""Share of late steps that nobody hears of."""


class PacedRunner:
    """Wraps the runner of rank 0; the other ranks of a worker wait for it."""

    def __init__(
        self,
        runner: Runner,
        pace: PaceOptions,
        kv_bytes_per_token: int,
        *,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        """`kv_bytes_per_token` is the served model's; `wait` spends seconds without a core."""
        self.clock = clock
        self.wait = wait
        self._runner = runner
        self._pace = pace
        self._kv_bytes_per_token = kv_bytes_per_token
        self._free_at = 0.0
        """When the step launched last ends."""
        self._num_steps = 0
        self._num_late = 0

    @property
    def run_ahead(self) -> int:
        """As the runner's."""
        return self._runner.run_ahead

    def launch(self, plan: StepPlan, hook: LayerHook | None = None) -> StepUnderWay:
        """Compute the step; its end is due when the pace says. Its layers are told as they are computed."""
        begins = max(self.clock(), self._free_at)
        step = self._runner.launch(plan, hook)
        self._free_at = begins + self._pace.step_s(work_of(plan), self._kv_bytes_per_token)
        return _PacedStep(step, self, self._free_at)

    def ended(self, late_s: float) -> None:
        """Count a step that was over so long after it was due."""
        self._num_steps += 1
        self._num_late += late_s > LATE_S
        if self._num_steps == NUM_JUDGED:
            if self._num_late > TOLERATED * NUM_JUDGED:
                log.warning(
                    "%d of %d steps took longer than their pace: this machine is too slow for what it rehearses; "
                    "use a smaller model or fewer workers",
                    self._num_late,
                    NUM_JUDGED,
                )
            self._num_steps = self._num_late = 0


class _PacedStep:
    """A step that is over when its pace says, or when it is computed, whichever is later."""

    def __init__(self, step: StepUnderWay, runner: PacedRunner, due: float) -> None:
        self._step = step
        self._runner = runner
        self._due = due

    def result(self) -> StepResult:
        """As the step's own; a step that fails does so at once."""
        result = self._step.result()
        left_s = self._due - self._runner.clock()
        if left_s > 0:
            self._runner.wait(left_s)
        self._runner.ended(-left_s)
        return result


def work_of(plan: StepPlan) -> StepWork:
    """What a plan asks of the hardware."""
    prompt_tokens = sum(share.num_tokens for share in plan.shares if share.num_tokens > 1)
    return StepWork(
        prompt_tokens=prompt_tokens,
        tokens=plan.num_tokens - prompt_tokens,
        kv_tokens=sum(share.stop for share in plan.shares),
    )
