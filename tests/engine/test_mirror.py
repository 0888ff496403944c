"""Steps as messages: a mirror computes what rank 0 computes, whatever happens to the sequences."""

from __future__ import annotations

import random
from collections import deque

import pytest

from engine.batch import LayerHook, StepPlan, StepResult
from engine.errors import IntegrityError
from engine.mirror import StepMirror, StepTeller
from engine.sequence import Sequence
from protos import ranks_pb2 as pb
from tests.engine.toy import Done, ToyRunner, expected_answer, make_request, make_scheduler

NUM_BLOCKS, BLOCK_SIZE = 12, 4


class MirroredToy:
    """Two toys: the second computes what it is told in bytes, and checks its own memory as the first does."""

    def __init__(self, run_ahead: int) -> None:
        self.run_ahead = run_ahead
        self.teller, self.mirror = StepTeller(), StepMirror()
        self._toys = [ToyRunner(NUM_BLOCKS, BLOCK_SIZE, run_ahead) for _ in range(2)]

    def launch(self, plan: StepPlan, hook: LayerHook | None = None) -> Done:
        told = self.teller.tell(plan).SerializeToString()
        first = self._toys[0].launch(plan)
        mirrored = self.mirror.plan(pb.RankStep.FromString(told))
        for ours, theirs in zip(plan.shares, mirrored.shares, strict=True):
            assert (ours.start, ours.num_tokens, ours.samples, ours.life) == (
                theirs.start,
                theirs.num_tokens,
                theirs.samples,
                theirs.life,
            )
            assert ours.sequence.request == theirs.sequence.request
            assert ours.sequence.token_ids[: ours.stop] == theirs.sequence.token_ids[: ours.stop]
            assert ours.sequence.block_ids == theirs.sequence.block_ids
        second = self._toys[1].launch(mirrored)
        assert [item and item.token_id for item in first.result().sampled] == [
            item and item.token_id for item in second.result().sampled
        ]
        return first


@pytest.mark.parametrize("run_ahead", [0, 1])
@pytest.mark.parametrize("seed", range(6))
def test_a_mirror_follows_preemption_aborts_and_shared_prefixes(run_ahead: int, seed: int) -> None:
    dice = random.Random(seed)
    scheduler, runner = make_scheduler(NUM_BLOCKS, BLOCK_SIZE), MirroredToy(run_ahead)
    under_way: deque[tuple[StepPlan, Done]] = deque()
    answers: dict[Sequence, list[int]] = {}
    most = 0
    for turn in range(400):
        if turn < 300 and dice.random() < 0.3:
            prompt = [7] * dice.choice([0, 4, 8]) + [dice.randrange(48) for _ in range(dice.randint(1, 14))]
            request = make_request(f"r{turn}", prompt, max_tokens=dice.randint(1, 12), priority=dice.randint(0, 2))
            sequence = Sequence.from_request(request, float(turn))
            answers[sequence] = []
            scheduler.add(sequence)
        if scheduler.sequences() and dice.random() < 0.05:
            scheduler.abort(dice.choice(scheduler.sequences()))
        plan = scheduler.schedule()
        if plan is not None:
            under_way.append((plan, runner.launch(plan)))
        if under_way and (plan is None or len(under_way) > run_ahead):
            take_in(scheduler, under_way, answers)
        most = max(most, runner.mirror.num_mirrored())
        assert runner.mirror.num_mirrored() == runner.teller.num_mirrored() <= len(scheduler.sequences()) + 8
    assert scheduler.stats().preemptions > 0
    assert scheduler.stats().cached_tokens > 0
    finished = [sequence for sequence in answers if len(answers[sequence]) == sequence.request.params.max_tokens]
    assert len(finished) > 20
    for sequence in finished:
        assert answers[sequence] == expected_answer(sequence.request.prompt_token_ids, len(answers[sequence]))


def take_in(scheduler, under_way, answers) -> None:
    plan, step = under_way.popleft()
    result: StepResult = step.result()
    for sequence, output in scheduler.update(plan, result):
        answers[sequence] += output.token_ids


def test_what_is_told_of_a_token_is_little() -> None:
    scheduler, runner = make_scheduler(64, 16), ToyRunner(64, 16)
    scheduler.add(Sequence.from_request(make_request("a", range(15), max_tokens=40), 0.0))
    teller, sizes = StepTeller(), []
    while (plan := scheduler.schedule()) is not None:
        sizes.append(len(teller.tell(plan).SerializeToString()))
        scheduler.update(plan, runner.run(plan))
    assert len(sizes) == 40
    assert max(sizes[1:]) < 40


def test_a_share_of_a_sequence_that_nobody_knows_is_a_defect() -> None:
    step = pb.RankStep(shares=[pb.RankShare(sequence_id=3, start=0, num_tokens=1)])
    with pytest.raises(IntegrityError, match="rank 0 computes sequence 3, of which this rank was told nothing"):
        StepMirror().plan(step)
