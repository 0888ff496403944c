"""Steps that take another machine's time: what is waited for, on a clock of the test's own."""

from __future__ import annotations

import logging
import queue
import time
from pathlib import Path

import pytest

from engine.batch import LayerHook, ScheduledSequence, StepPlan
from engine.config import CacheOptions, EngineOptions, ModelOptions
from engine.engine import Engine, tokens_of
from engine.loop import EngineLoop
from engine.pace import PaceOptions, StepWork
from engine.paced_runner import NUM_JUDGED, PacedRunner, work_of
from engine.sequence import Sequence
from tests.engine.ranked import RankedEngine, cache_options, engine_options
from tests.engine.test_overlap import answers, mixed_requests, stripped
from tests.engine.toy import ToyRunner, expected_answer, make_request, make_scheduler

KV_BYTES = 10
PACE = PaceOptions(fixed_ms=10, prompt_token_us=100, token_us=1000)


class Clock:
    """Time that passes when somebody waits, or computes."""

    def __init__(self) -> None:
        self.now = 100.0
        self.waits: list[float] = []

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds


class BusyRunner(ToyRunner):
    """Takes some of that time itself."""

    def __init__(self, clock: Clock, compute_s: float, run_ahead: int = 0) -> None:
        super().__init__(16, 4, run_ahead)
        self._clock, self._compute_s = clock, compute_s

    def launch(self, plan, hook=None):
        self._clock.now += self._compute_s
        return super().launch(plan, hook)


def paced(clock: Clock, compute_s: float = 0.0, run_ahead: int = 0) -> PacedRunner:
    return PacedRunner(BusyRunner(clock, compute_s, run_ahead), PACE, KV_BYTES, clock=clock, wait=clock.wait)


def plan_of(prompt: int = 4) -> StepPlan:
    sequence = Sequence.from_request(make_request("a", list(range(prompt))), 0.0)
    sequence.block_ids = [0, 1]
    return StepPlan((ScheduledSequence.next_of(sequence, prompt),))


def test_the_work_of_a_plan():
    sequence = Sequence.from_request(make_request("a", range(40)), 0.0)
    shares = [ScheduledSequence(sequence, start, num, False) for start, num in ((0, 10), (20, 1), (8, 32))]
    assert work_of(StepPlan(tuple(shares))) == StepWork(prompt_tokens=42, tokens=1, kv_tokens=10 + 21 + 40)


def test_what_computing_leaves_of_a_step_is_waited_for():
    clock = Clock()
    paced(clock, compute_s=0.004).launch(plan_of()).result()
    assert clock.waits == [pytest.approx(0.010 + 4 * 100e-6 - 0.004)]


def test_a_step_that_takes_longer_than_its_pace_is_not_waited_for():
    clock = Clock()
    paced(clock, compute_s=0.5).launch(plan_of()).result()
    assert clock.waits == []
    assert clock.now == pytest.approx(100.5)


def test_a_step_launched_behind_another_begins_when_that_ends():
    clock = Clock()
    runner = paced(clock, compute_s=0.002, run_ahead=1)
    first, second = runner.launch(plan_of()), runner.launch(plan_of())
    first.result()
    assert clock.now == pytest.approx(100.0104)
    second.result()
    assert clock.now == pytest.approx(100.0208)
    clock.now = 200.0
    runner.launch(plan_of()).result()
    assert clock.now == pytest.approx(200.0104)


def test_layers_are_told_while_the_step_is_launched():
    clock, layers = Clock(), []
    step = paced(clock).launch(plan_of(), LayerHook(lambda layer, event: layers.append((layer, clock.now))))
    assert layers == [(0, 100.0)]
    step.result()


def test_a_failure_is_told_at_once():
    clock = Clock()
    runner = paced(clock)
    runner._runner.fail_next = True
    with pytest.raises(RuntimeError, match="toy failure"):
        runner.launch(plan_of())
    assert clock.waits == []


@pytest.mark.parametrize(("compute_s", "warns"), [(0.005, False), (0.02, True)])
def test_a_machine_that_is_too_slow_says_so_once_in_a_while(caplog, compute_s, warns):
    runner = paced(Clock(), compute_s)
    with caplog.at_level(logging.WARNING, "engine.paced_runner"):
        for _ in range(NUM_JUDGED):
            runner.launch(plan_of()).result()
    assert [f"{NUM_JUDGED} of {NUM_JUDGED} steps took longer" in record.message for record in caplog.records] == (
        [True] * warns
    )


@pytest.mark.parametrize("run_ahead", [0, 1])
def test_a_loop_takes_commands_between_paced_steps_and_reckons_prompts_by_them(run_ahead):
    outputs: queue.Queue = queue.Queue()
    runner = PacedRunner(ToyRunner(16, 4, run_ahead), PaceOptions(fixed_ms=5, prompt_token_us=100), KV_BYTES)
    loop = EngineLoop(make_scheduler(16), runner)
    loop.on_step = lambda emitted: [outputs.put(output) for _, output in emitted]
    loop.start()
    loop.post(lambda: loop.scheduler.add(Sequence.from_request(make_request("a", [1, 2, 3]), 0.0)))
    tokens = list(outputs.get(timeout=5.0).token_ids)
    assert loop.call(lambda: "between steps").result(5.0) == "between steps"
    while len(tokens) < 8:
        tokens += outputs.get(timeout=5.0).token_ids
    loop.stop(5.0)
    assert tokens == expected_answer([1, 2, 3], 8)
    assert 0 < loop.prompt_rate.tokens_per_s <= 3 / 0.0053


@pytest.mark.parametrize("size", [1, 2], ids=["one rank", "two ranks"])
def test_a_paced_engine_gives_the_tokens_of_an_unpaced_one(tiny_llama: Path, tmp_path: Path, size: int) -> None:
    model, cache = ModelOptions(path=str(tiny_llama)), cache_options()
    with Engine(model, CacheOptions(block_size=8, num_blocks=40), engine_options(1)) as engine:
        assert not engine.is_paced
        expected = [stripped(each) for each in answers(engine, mixed_requests(7))]
    options = engine_options(size, pace=PaceOptions(fixed_ms=0.1, token_us=10, kv_gb_per_s=1))
    if size > 1:
        with RankedEngine(tiny_llama, tmp_path, options, cache) as worker:
            found = answers(worker.engine, mixed_requests(7))
    else:
        with Engine(model, cache, options) as engine:
            assert engine.is_paced
            assert engine.runner.run_ahead == 1
            found = answers(engine, mixed_requests(7))
    assert [stripped(each) for each in found] == expected


def test_steps_of_an_engine_take_their_pace(tiny_llama: Path) -> None:
    """Sixteen tokens at 10 ms: never faster."""
    options = EngineOptions(device="cpu", pace=PaceOptions(fixed_ms=10))
    with Engine(ModelOptions(path=str(tiny_llama)), CacheOptions(num_blocks=8), options) as engine:
        began = time.monotonic()
        (outputs,) = engine.generate([make_request("a", [5, 6, 7], max_tokens=16, ignore_eos=True)])
        assert time.monotonic() - began >= 0.16
    assert len(list(tokens_of(outputs))) == 16
