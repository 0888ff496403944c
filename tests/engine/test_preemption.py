"""Who gives way: by age since the first arrival at a router, and perhaps back to the router."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.sequence import Sequence
from tests.engine.test_scheduler import add, run_to_end, tokens_of
from tests.engine.toy import ToyRunner, expected_answer, make_request, make_scheduler


@pytest.fixture(params=[0, 1], ids=["in step", "run ahead"])
def ahead(request: pytest.FixtureRequest) -> int:
    """How many steps the runner may be behind the scheduler."""
    return request.param


def test_age_counts_from_the_first_arrival_at_a_router(ahead):
    """The one that came here last has been about for longest: others give way, and its own answer is not held up."""
    scheduler, runner = make_scheduler(8), ToyRunner(8, 4, ahead)
    prompts = {"a": [1, 2, 5, 9, 11], "b": [2, 2, 5, 9, 11]}
    young = [add(scheduler, name, prompt, arrival=100.0, max_tokens=20) for name, prompt in prompts.items()]
    request = replace(make_request("old", [30, 2, 5, 9, 11], max_tokens=20), age_s=60.0)
    old = Sequence.from_request(request, 101.0)
    assert (old.came_at, old.arrival) == (101.0, 41.0)
    scheduler.add(old)
    outputs = run_to_end(scheduler, runner)
    assert old.num_preemptions == 0
    assert sum(sequence.num_preemptions for sequence in young) > 0
    assert all(len(tokens_of(said)) == 20 for said in outputs.values())


def test_a_preempted_sequence_may_be_given_back(ahead):
    """It ends here with the tokens that are known, and goes on from those; no step that is under way is told of."""
    scheduler, runner = make_scheduler(8), ToyRunner(8, 4, ahead)
    prompts = {name: [index * 3 + 1, index + 2, 5, 9, 11] for index, name in enumerate("abc")}
    given_back: dict[str, int] = {}

    def give_back(sequence: Sequence) -> bool:
        given_back[sequence.request.request_id] = sequence.num_known_tokens - sequence.num_prompt_tokens
        return True

    scheduler.give_back = give_back
    for arrival, (name, prompt) in enumerate(prompts.items()):
        add(scheduler, name, prompt, arrival=float(arrival), max_tokens=20)
    outputs = run_to_end(scheduler, runner)
    assert "c" in given_back
    assert "a" not in given_back
    for name, num_known in given_back.items():
        assert len(tokens_of(outputs[name])) == num_known
        rest = expected_answer(prompts[name], 20)[num_known:]
        request = make_request(name, prompts[name], max_tokens=20)
        known = tuple(tokens_of(outputs[name]))
        again = Sequence.from_request(replace(request, resume_from=known, num_preemptions=1), 9.0)
        assert again.num_preemptions == 1
        scheduler.give_back = lambda sequence: False
        scheduler.add(again)
        assert tokens_of(run_to_end(scheduler, runner)[name]) == rest
