from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.api import FinishReason
from engine.batch import ScheduledSequence, StepPlan
from engine.scheduler import Scheduler
from engine.sequence import Sequence, SequenceStatus
from tests.engine.toy import ToyRunner, expected_answer, make_request, make_scheduler


@pytest.fixture(params=[0, 1], ids=["in step", "run ahead"])
def ahead(request: pytest.FixtureRequest) -> int:
    """How many steps the runner may be behind the scheduler."""
    return request.param


class Steps:
    """The loop's part: schedules up to run_ahead steps before it takes one in."""

    def __init__(self, scheduler: Scheduler, runner: ToyRunner) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._under_way: deque = deque()

    def one(self) -> list | None:
        """What a step emitted; None if there is nothing to compute and nothing under way."""
        plan = self._scheduler.schedule()
        if plan is not None:
            assert plan.num_tokens <= 20
            self._under_way.append((plan, self._runner.launch(plan)))
        if not self._under_way:
            return None
        if plan is not None and len(self._under_way) <= self._runner.run_ahead:
            return []
        plan, step = self._under_way.popleft()
        return self._scheduler.update(plan, step.result())


def run_to_end(scheduler: Scheduler, runner: ToyRunner, held: tuple[Sequence, ...] = ()) -> dict[str, list]:
    """Step until nothing is left; returns each request's outputs."""
    outputs: dict[str, list] = {}
    steps = Steps(scheduler, runner)
    for _ in range(5000):
        emitted = steps.one()
        if emitted is None:
            assert not scheduler.sequences(), "sequences are left, but nothing can be computed"
            return outputs
        for sequence, output in emitted:
            outputs.setdefault(sequence.request.request_id, []).append(output)
        scheduler.pool.check_integrity([item.block_ids for item in {*scheduler.sequences(), *held}])
    raise AssertionError("no end in sight")


def add(scheduler: Scheduler, name: str, prompt: list[int], arrival: float = 0.0, **params) -> Sequence:
    sequence = Sequence.from_request(make_request(name, prompt, **params), arrival)
    scheduler.add(sequence)
    return sequence


def tokens_of(outputs: list) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def test_a_prompt_is_cut_into_chunks_that_fit_the_budget():
    scheduler, runner = make_scheduler(32), ToyRunner(32, 4)
    add(scheduler, "a", list(range(40)), max_tokens=1)
    sizes = []
    while (plan := scheduler.schedule()) is not None:
        sizes.append(plan.num_tokens)
        scheduler.update(plan, runner.run(plan))
    assert sizes == [16, 16, 8]


def test_running_streams_come_before_a_long_prompt():
    scheduler, runner = make_scheduler(64), ToyRunner(64, 4)
    add(scheduler, "short", [1, 2], arrival=1.0, max_tokens=20)
    plan = scheduler.schedule()
    scheduler.update(plan, runner.run(plan))
    add(scheduler, "long", list(range(40)), arrival=0.5)
    for _ in range(3):
        plan = scheduler.schedule()
        assert {share.sequence.request.request_id: share.num_tokens for share in plan.shares}["short"] == 1
        scheduler.update(plan, runner.run(plan))


def test_a_long_prompt_takes_a_bounded_part_of_each_step_beside_a_stream():
    scheduler, runner = make_scheduler(64, mixed_tokens=5), ToyRunner(64, 4)
    add(scheduler, "short", [1, 2], arrival=0.5, max_tokens=20)
    scheduler.update(plan := scheduler.schedule(), runner.run(plan))
    add(scheduler, "long", list(range(12)), arrival=1.0)
    add(scheduler, "longer", list(range(20, 32)), arrival=2.0)
    home = Sequence.from_request(make_request("home", [7, 8, 9]), 3.0)
    home.block_ids = scheduler.pool.allocate(1)
    runner.run(StepPlan((ScheduledSequence.next_of(home, 2),)))
    home.num_computed_tokens = 2
    sizes = []
    for step in range(5):
        if step == 1:
            scheduler.add(home)
        scheduler.update(plan := scheduler.schedule(), runner.run(plan))
        sizes.append({share.sequence.request.request_id: share.num_tokens for share in plan.shares})
    assert sizes[0] == {"short": 1, "long": 5}
    assert sizes[1] == {"short": 1, "long": 5, "home": 1}
    assert sizes[2] == {"short": 1, "long": 2, "home": 1, "longer": 3}
    assert [step.get("longer") for step in sizes[3:]] == [5, 4]


@pytest.mark.parametrize("arrival", [0.0, 2.0])
def test_received_kv_does_not_wait_for_the_end_of_a_long_prompt(arrival):
    scheduler, runner = make_scheduler(64, mixed_tokens=4), ToyRunner(64, 4)
    add(scheduler, "long", list(range(40)), arrival=1.0)
    scheduler.update(plan := scheduler.schedule(), runner.run(plan))
    home = Sequence.from_request(make_request("home", [7, 8, 9]), arrival)
    home.block_ids = scheduler.pool.allocate(1)
    home.num_computed_tokens = 2
    scheduler.add(home)
    sizes = {share.sequence.request.request_id: share.num_tokens for share in scheduler.schedule().shares}
    assert sizes == {"home": 1, "long": 4}


def test_the_end_of_a_prompt_needs_no_step_of_its_own():
    scheduler, runner = make_scheduler(32, slack_tokens=4), ToyRunner(32, 4)
    add(scheduler, "a", list(range(36)), arrival=1.0, max_tokens=1)
    add(scheduler, "b", list(range(50, 60)), arrival=2.0, max_tokens=1)
    sizes = []
    while (plan := scheduler.schedule()) is not None:
        sizes.append([share.num_tokens for share in plan.shares])
        scheduler.update(plan, runner.run(plan))
    assert sizes == [[16], [20], [10]]


def test_equal_prefixes_are_computed_once(ahead):
    scheduler, runner = make_scheduler(32), ToyRunner(32, 4, ahead)
    prompt = list(range(10))
    add(scheduler, "a", prompt, max_tokens=3)
    run_to_end(scheduler, runner)
    again = add(scheduler, "b", prompt, max_tokens=3)
    outputs = run_to_end(scheduler, runner)["b"]
    assert again.num_cached_tokens == 8
    assert tokens_of(outputs) == expected_answer(prompt, 3)
    assert scheduler.stats().cached_tokens == 8


def test_a_wholly_cached_prompt_still_computes_its_last_block(ahead):
    scheduler, runner = make_scheduler(32), ToyRunner(32, 4, ahead)
    for name in "ab":
        sequence = add(scheduler, name, list(range(8)), max_tokens=2)
        run_to_end(scheduler, runner)
    assert sequence.num_cached_tokens == 4


def test_the_youngest_is_preempted_and_answers_stay_right(ahead):
    scheduler, runner = make_scheduler(8), ToyRunner(8, 4, ahead)
    prompts = {name: [index * 3 + 1, index + 2, 5, 9, 11] for index, name in enumerate("abc")}
    for arrival, (name, prompt) in enumerate(prompts.items()):
        add(scheduler, name, prompt, arrival=float(arrival), max_tokens=20)
    outputs = run_to_end(scheduler, runner)
    assert scheduler.stats().preemptions > 0
    for name, prompt in prompts.items():
        assert tokens_of(outputs[name]) == expected_answer(prompt, 20)
        assert [output.offset for output in outputs[name]] == list(range(20))


def test_received_kv_that_waits_gives_way_to_an_older_sequence(ahead):
    scheduler, runner = make_scheduler(6, max_running=1), ToyRunner(6, 4, ahead)
    old = add(scheduler, "old", list(range(8)), arrival=0.0, max_tokens=14)
    plan = scheduler.schedule()
    scheduler.update(plan, runner.run(plan))
    received = Sequence.from_request(make_request("received", [7] * 10, max_tokens=3), 1.0)
    received.block_ids = scheduler.pool.allocate(3)
    received.num_computed_tokens = 9
    scheduler.add(received)
    outputs = run_to_end(scheduler, runner)
    assert old.finish_reason is FinishReason.LENGTH
    assert received.num_preemptions == 1
    assert tokens_of(outputs["received"]) == expected_answer([7] * 10, 3)


def test_those_that_wait_for_each_others_blocks_give_way(ahead):
    """An urgent one finds no blocks, received KV waits behind it, and what runs needs the blocks of that."""
    scheduler, runner = make_scheduler(10, 2, max_model_len=16), ToyRunner(10, 2, ahead)
    received = Sequence.from_request(make_request("received", [3] * 4, max_tokens=6, priority=1), 1.0)
    received.block_ids = scheduler.pool.allocate(3)
    scheduler.add(Sequence.from_request(make_request("young", [5] * 12, max_tokens=4, priority=1), 2.0))
    steps = Steps(scheduler, runner)
    outputs: dict[str, list] = {}

    def take(emitted: list | None) -> None:
        for sequence, output in emitted or []:
            outputs.setdefault(sequence.request.request_id, []).append(output)

    take(steps.one())
    scheduler.add(Sequence.from_request(make_request("urgent", [7] * 3, max_tokens=6), 3.0))
    for position in range(4):
        slot = received.block_ids[position // 2] * 2 + position % 2
        runner.memory[slot] = (position, received.token_ids[position])
    received.num_computed_tokens = 4
    received.token_ids.append(expected_answer([3] * 4, 1)[0])
    scheduler.add(received)
    for _ in range(100):
        if (emitted := steps.one()) is None:
            break
        take(emitted)
    assert not scheduler.sequences()
    for name, prompt, count in (("urgent", [7] * 3, 6), ("young", [5] * 12, 4)):
        assert tokens_of(outputs[name]) == expected_answer(prompt, count)
    assert tokens_of(outputs["received"]) == expected_answer([3] * 4, 6)[1:]


def test_endings(ahead):
    scheduler, runner = make_scheduler(64), ToyRunner(64, 4, ahead)
    stop = expected_answer([1, 2, 3], 4)[3]
    add(scheduler, "stop", [1, 2, 3], stop_token_ids=(stop,), max_tokens=20)
    add(scheduler, "length", [1, 2, 3], max_tokens=2)
    outputs = run_to_end(scheduler, runner)
    assert outputs["stop"][-1].finish_reason is FinishReason.STOP
    assert tokens_of(outputs["stop"]) == expected_answer([1, 2, 3], 4)
    assert outputs["length"][-1].finish_reason is FinishReason.LENGTH


def test_min_tokens_outlasts_a_stop_token(ahead):
    scheduler, runner = make_scheduler(64), ToyRunner(64, 4, ahead)
    answer = expected_answer([1, 2, 3], 12)
    add(scheduler, "a", [1, 2, 3], stop_token_ids=(answer[0],), min_tokens=5, max_tokens=12)
    outputs = run_to_end(scheduler, runner)["a"]
    assert len(tokens_of(outputs)) >= 5


def test_a_context_that_is_full_ends_by_length(ahead):
    scheduler, runner = make_scheduler(4, max_model_len=16), ToyRunner(4, 4, ahead)
    add(scheduler, "a", [1, 2, 3], max_tokens=100)
    outputs = run_to_end(scheduler, runner)["a"]
    assert len(tokens_of(outputs)) == 13
    assert outputs[-1].finish_reason is FinishReason.LENGTH


def test_a_prefill_only_sequence_keeps_its_blocks_until_released(ahead):
    scheduler, runner = make_scheduler(16), ToyRunner(16, 4, ahead)
    sequence = Sequence.from_request(make_request("p", list(range(9))), 0.0)
    sequence.prefill_only = True
    scheduler.add(sequence)
    outputs = run_to_end(scheduler, runner, held=(sequence,))["p"]
    assert tokens_of(outputs) == expected_answer(list(range(9)), 1)
    assert outputs[0].finish_reason is None
    assert scheduler.pool.num_free == 13
    scheduler.release(sequence)
    assert scheduler.pool.num_free == 16


def test_while_a_prompt_is_held_and_another_finds_no_blocks_received_kv_is_used():
    """The held one will go on: nobody has to make way."""
    scheduler, runner = make_scheduler(8), ToyRunner(8, 4)
    prompt = Sequence.from_request(make_request("held", list(range(20))), 1.0)
    prompt.prefill_only = True
    held: list[Sequence] = []
    scheduler.is_held = held.__contains__
    scheduler.add(prompt)
    scheduler.update(plan := scheduler.schedule(), runner.run(plan))
    held.append(prompt)
    add(scheduler, "large", list(range(30, 39)), arrival=2.0)
    received = Sequence.from_request(make_request("received", [1, 2, 3, 4, 5]), 3.0)
    received.block_ids = scheduler.pool.allocate(2)
    received.num_computed_tokens = 4
    scheduler.add(received)
    assert [share.sequence for share in scheduler.schedule().shares] == [received]
    assert (received.num_preemptions, len(received.block_ids)) == (0, 2)
    held.clear()
    assert {share.sequence for share in scheduler.schedule().shares} == {received, prompt}


def test_a_step_too_far_is_dropped():
    """Only the token itself tells that the sequence ends: it has been scheduled once more by then."""
    scheduler, runner = make_scheduler(16), ToyRunner(16, 4, run_ahead=1)
    stop = expected_answer([1, 2, 3], 2)[1]
    sequence = add(scheduler, "a", [1, 2, 3], stop_token_ids=(stop,), max_tokens=20)
    other = add(scheduler, "b", [4, 5], arrival=1.0, max_tokens=20)
    outputs = run_to_end(scheduler, runner)
    assert tokens_of(outputs["a"]) == expected_answer([1, 2, 3], 2)
    assert sequence.token_ids == [1, 2, 3, *expected_answer([1, 2, 3], 2)]
    assert sequence.num_pending == other.num_pending == 0
    assert tokens_of(outputs["b"]) == expected_answer([4, 5], 20)


def test_a_failed_step_leaves_no_pending_token():
    scheduler = make_scheduler(16)
    sequence = add(scheduler, "a", [1, 2, 3])
    scheduler.schedule()
    assert sequence.num_pending == 1
    ((_, output),) = scheduler.fail_all("out of luck")
    assert (output.offset, output.token_ids) == (0, ())
    assert sequence.token_ids == [1, 2, 3]


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_abort_gives_all_blocks_back(steps):
    scheduler, runner = make_scheduler(16), ToyRunner(16, 4)
    sequence = add(scheduler, "a", list(range(20)), max_tokens=20)
    for _ in range(steps):
        plan = scheduler.schedule()
        scheduler.update(plan, runner.run(plan))
    scheduler.abort(sequence)
    scheduler.abort(sequence)
    assert scheduler.pool.num_free == 16
    assert scheduler.schedule() is None


def test_priority_goes_before_arrival():
    scheduler = make_scheduler(64, max_running=1)
    for name, priority in [("late", 0), ("urgent", -1)]:
        request = make_request(name, [1, 2])
        sequence = Sequence.from_request(request, 0.0)
        object.__setattr__(request, "priority", priority)
        scheduler.add(sequence)
    assert scheduler.schedule().shares[0].sequence.request.request_id == "urgent"


requests = st.lists(
    st.tuples(st.integers(1, 24), st.integers(1, 12), st.integers(0, 3), st.booleans()), min_size=1, max_size=12
)


@settings(deadline=None, max_examples=60)
@given(
    requests,
    st.integers(10, 20),
    st.integers(0, 1),
    st.sampled_from([1, 5, 16]),
    st.sampled_from([0, 4]),
    st.randoms(use_true_random=False),
)
def test_any_mixture_ends_with_right_answers_and_free_blocks(shapes, num_blocks, run_ahead, mixed, slack, random):
    scheduler = make_scheduler(num_blocks, mixed_tokens=mixed, slack_tokens=slack)
    runner = ToyRunner(num_blocks, 4, run_ahead)
    steps = Steps(scheduler, runner)
    prompts, aborted = {}, []
    for index, (length, answer, group, abort) in enumerate(shapes):
        name = f"r{index}"
        prompts[name] = ([group] * length, answer)
        sequence = add(scheduler, name, prompts[name][0], arrival=float(index), max_tokens=answer)
        if abort:
            aborted.append(sequence)
    outputs: dict[str, list[int]] = {}
    for _ in range(3000):
        if aborted and random.random() < 0.2:
            scheduler.abort(aborted.pop())
        emitted = steps.one()
        if emitted is None:
            break
        for sequence, output in emitted:
            outputs.setdefault(sequence.request.request_id, []).extend(output.token_ids)
            if output.finish_reason is not None:
                aborted = [item for item in aborted if item is not sequence]
    assert not scheduler.sequences()
    assert scheduler.pool.num_free == num_blocks
    for name, tokens in outputs.items():
        prompt, answer = prompts[name]
        assert tokens == expected_answer(prompt, answer)[: len(tokens)]


def test_fail_all_ends_everything_once():
    scheduler, runner = make_scheduler(16), ToyRunner(16, 4)
    for name in "ab":
        add(scheduler, name, [1, 2, 3])
    plan = scheduler.schedule()
    scheduler.update(plan, runner.run(plan))
    failed = scheduler.fail_all("out of luck")
    assert [output.finish_reason for _, output in failed] == [FinishReason.FAILED] * 2
    assert all(sequence.status is SequenceStatus.FINISHED for sequence, _ in failed)
    assert scheduler.pool.num_free == 16


def test_content_of_before_a_failure_is_not_given_out_again():
    scheduler, runner = make_scheduler(32), ToyRunner(32, 4)
    prompt = list(range(10))
    add(scheduler, "a", prompt, max_tokens=3)
    run_to_end(scheduler, runner)
    scheduler.fail_all("out of luck")
    again = add(scheduler, "b", prompt, max_tokens=3)
    assert tokens_of(run_to_end(scheduler, runner)["b"]) == expected_answer(prompt, 3)
    assert again.num_cached_tokens == 0
