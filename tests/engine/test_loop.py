import queue

import pytest

from engine.api import FinishReason
from engine.loop import EngineLoop
from engine.sequence import Sequence
from tests.engine.toy import ToyRunner, expected_answer, make_request, make_scheduler


@pytest.fixture(params=[0, 1], ids=["in step", "run ahead"])
def loop(request):
    loop = EngineLoop(make_scheduler(16), ToyRunner(16, 4, run_ahead=request.param))
    loop.start()
    yield loop
    loop.stop(5.0)


def answer(loop: EngineLoop, name: str) -> tuple[list[int], FinishReason]:
    """Run one request to its end."""
    outputs: queue.Queue = queue.Queue()
    loop.on_step = lambda emitted: [outputs.put(output) for _, output in emitted]
    loop.call(lambda: loop.scheduler.add(Sequence.from_request(make_request(name, [1, 2, 3]), 0.0))).result(5.0)
    tokens: list[int] = []
    while True:
        output = outputs.get(timeout=5.0)
        tokens += output.token_ids
        if output.finish_reason is not None:
            return tokens, output.finish_reason


@pytest.mark.parametrize("part", ["schedule", "launch"])
def test_a_step_that_fails_ends_its_requests_and_the_next_ones_are_served(loop, monkeypatch, part):
    def fail(*_args: object) -> None:
        monkeypatch.undo()
        raise RuntimeError("out of luck")

    monkeypatch.setattr(loop.scheduler if part == "schedule" else loop._runner, part, fail)
    assert answer(loop, "a") == ([], FinishReason.FAILED)
    assert answer(loop, "b") == (expected_answer([1, 2, 3], 8), FinishReason.LENGTH)


def test_a_call_brings_its_result_or_its_error(loop):
    assert loop.call(lambda: 7).result(5.0) == 7
    with pytest.raises(ZeroDivisionError):
        loop.call(lambda: 1 // 0).result(5.0)
