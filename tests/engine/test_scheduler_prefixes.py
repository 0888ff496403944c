"""Prompts that begin alike and come at once."""

from __future__ import annotations

import pytest

from engine.block_pool import BlockPool
from engine.scheduler import MAX_PUT_OFF, Scheduler
from engine.sequence import Sequence
from engine.step_budget import StepLimits
from tests.engine.test_scheduler import add, run_to_end, tokens_of
from tests.engine.toy import EOS, ToyRunner, expected_answer, make_request, make_scheduler

ALIKE = list(range(40, 52))
NUM_BLOCKS = 64


def prompts(num: int) -> dict[str, list[int]]:
    """Twelve tokens (three blocks) that all have, and three of their own."""
    return {f"p{index:02}": [*ALIKE, 60 + index, index, 7] for index in range(num)}


@pytest.mark.parametrize("ahead", [0, 1], ids=["in step", "run ahead"])
@pytest.mark.parametrize("max_step_tokens", [5, 16, 20])
def test_what_they_have_in_common_is_computed_once(ahead, max_step_tokens):
    scheduler, runner = make_scheduler(NUM_BLOCKS, max_step_tokens=max_step_tokens), ToyRunner(NUM_BLOCKS, 4, ahead)
    wanted = prompts(4)
    for index, (name, prompt) in enumerate(wanted.items()):
        add(scheduler, name, prompt, arrival=float(index), max_tokens=3)
    outputs = run_to_end(scheduler, runner)
    assert {name: tokens_of(outputs[name]) for name in wanted} == {
        name: expected_answer(prompt, 3) for name, prompt in wanted.items()
    }
    stats = scheduler.stats()
    assert stats.computed_tokens - stats.generated_tokens == 15 + 3 * 3 - 4  # the last of a prompt is its step's own
    assert stats.cached_tokens == 3 * 12


def test_others_are_not_held_up_meanwhile():
    scheduler = make_scheduler(NUM_BLOCKS, max_step_tokens=20)
    first, *_ = (add(scheduler, name, prompt) for name, prompt in prompts(3).items())
    other = add(scheduler, "x", [1, 2, 3], arrival=1.0)
    assert [share.sequence for share in scheduler.schedule().shares] == [first, other]


def test_one_that_is_held_computes_nothing_that_others_could_wait_for():
    scheduler, runner = make_scheduler(NUM_BLOCKS, max_step_tokens=8), ToyRunner(NUM_BLOCKS, 4)
    (_, prompt), (name, alike) = prompts(2).items()
    held = Sequence.from_request(make_request("held", prompt), 0.0)
    held.prefill_only = True
    scheduler.add(held)
    scheduler.update(plan := scheduler.schedule(), runner.run(plan))
    scheduler.is_held = lambda sequence: sequence is held
    sequence = add(scheduler, name, alike, arrival=1.0)
    (share,) = scheduler.schedule().shares
    assert (share.sequence, share.num_tokens) == (sequence, 7), "8 tokens are found, the rest is its own affair"


def test_not_all_that_wait_are_looked_at():
    scheduler = make_scheduler(NUM_BLOCKS * 4, max_step_tokens=400, max_running=100)
    for index, (name, prompt) in enumerate(prompts(MAX_PUT_OFF + 3).items()):
        add(scheduler, name, prompt, arrival=float(index))
    assert len(scheduler.schedule().shares) == 1 + 2


def test_without_prefix_caching_nothing_is_waited_for():
    limits = StepLimits(400, 400, 0)
    scheduler = Scheduler(
        BlockPool(NUM_BLOCKS, prefix_caching=False),
        block_size=4,
        root_hash=b"toy",
        limits=limits,
        max_running=8,
        max_model_len=256,
        eos_token_ids=[EOS],
    )
    for name, prompt in prompts(3).items():
        add(scheduler, name, prompt)
    assert len(scheduler.schedule().shares) == 3
