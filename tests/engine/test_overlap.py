"""A step scheduled while the one before it is computed gives what it would have given after it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.api import FinishReason, GenerateRequest, SamplingParams, TokenOutput
from engine.batch import OnLayer, StepPlan
from engine.config import CacheOptions, EngineOptions, ModelOptions
from engine.engine import Engine, tokens_of
from engine.runner import LaunchedStep
from engine.scheduler import Emitted
from engine.sequence import Sequence
from tests.engine.checkpoints import VOCAB_SIZE
from tests.engine.driver import random_prompt

BLOCK_SIZE, NUM_BLOCKS = 8, 40
DRAWN = {"temperature": 0.9, "top_p": 0.9}


def make_engine(path: Path, overlap: str, *, num_blocks: int = NUM_BLOCKS, prefix_caching: bool = True) -> Engine:
    cache = CacheOptions(block_size=BLOCK_SIZE, num_blocks=num_blocks, prefix_caching=prefix_caching)
    options = EngineOptions(overlap=overlap, device="cpu", max_step_tokens=64, max_running=12)  # type: ignore[arg-type]
    return Engine(ModelOptions(path=str(path)), cache, options)


def make_request(name: str, length: int, **params: Any) -> GenerateRequest:
    prompt = tuple(random_prompt(length, VOCAB_SIZE, seed=len(name)))
    return GenerateRequest(request_id=name, prompt_token_ids=prompt, params=SamplingParams(**params))


def mixed_requests(stop: int) -> list[GenerateRequest]:
    """Every way to choose and to end, of prompts from one token to more than a step holds."""
    return [
        make_request("greedy", 1, max_tokens=40),
        make_request("one token", 30, max_tokens=1),
        make_request("two tokens", 16, max_tokens=2, logprobs=2),
        make_request("long prompt", 150, max_tokens=30, ignore_eos=True),
        make_request("drawn", 20, max_tokens=50, seed=3, ignore_eos=True, **DRAWN),
        make_request("drawn among few", 9, max_tokens=33, seed=4, temperature=1.4, top_k=5, min_p=0.1),
        make_request("repetition", 40, max_tokens=40, repetition_penalty=1.6, ignore_eos=True),
        make_request("presence", 8, max_tokens=40, presence_penalty=1.2, frequency_penalty=0.6, logprobs=5),
        make_request("drawn, penalised", 7, max_tokens=40, seed=5, repetition_penalty=1.3, logprobs=0, **DRAWN),
        make_request("late end", 12, max_tokens=40, min_tokens=15, stop_token_ids=tuple(range(0, VOCAB_SIZE, 2))),
        make_request("stops", 20, max_tokens=50, seed=3, ignore_eos=True, stop_token_ids=(stop,), **DRAWN),
        make_request("logprobs", 70, max_tokens=20, logprobs=20),
    ]


def answers(engine: Engine, requests: list[GenerateRequest]) -> list[list[TokenOutput]]:
    """All outputs of requests given at once, after which no block may be left held."""
    found = engine.generate(requests, timeout_s=120.0)
    engine.loop.call(engine.check_integrity).result(10.0)
    stats = engine.loop.call(engine.scheduler.stats).result(10.0)
    assert (stats.num_running, stats.num_waiting, stats.free_blocks) == (0, 0, stats.num_blocks)
    return found


def stripped(outputs: list[TokenOutput]) -> list[tuple[Any, ...]]:
    """What a client sees, log-probabilities apart: they are as near as rounding allows."""
    return [(output.offset, output.token_ids, output.finish_reason, output.reason) for output in outputs]


@pytest.fixture(scope="module")
def stop(tiny_llama: Path) -> int:
    """A token that the request `stops` draws in the middle of its answer, and not before."""
    with make_engine(tiny_llama, "off", num_blocks=100) as engine:
        request = make_request("stops", 20, max_tokens=50, seed=3, ignore_eos=True, **DRAWN)
        drawn = list(tokens_of(answers(engine, [request])[0]))
    return next(token for index, token in enumerate(drawn) if index >= 20 and token not in drawn[:index])


@pytest.mark.parametrize("num_blocks", [NUM_BLOCKS, 400], ids=["preempted", "with room for all"])
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_running_ahead_changes_no_token(tiny_llama: Path, stop: int, num_blocks: int, prefix_caching: bool) -> None:
    found: dict[str, list[list[TokenOutput]]] = {}
    for overlap in ("off", "on"):
        with make_engine(tiny_llama, overlap, num_blocks=num_blocks, prefix_caching=prefix_caching) as engine:
            assert engine.runner.run_ahead == (overlap == "on")
            found[overlap] = answers(engine, mixed_requests(stop))
            assert (engine.scheduler.stats().preemptions > 0) == (num_blocks == NUM_BLOCKS)
    reasons = {outputs[-1].finish_reason for outputs in found["off"]}
    assert {FinishReason.STOP, FinishReason.LENGTH} <= reasons
    for request, off, on in zip(mixed_requests(stop), found["off"], found["on"], strict=True):
        assert stripped(on) == stripped(off), request.request_id
        check_logprobs(request, off, on)


def check_logprobs(request: GenerateRequest, off: list[TokenOutput], on: list[TokenOutput]) -> None:
    """Each token has its own log-probability, and those beside it that were asked for."""
    for first, second in zip(off, on, strict=True):
        assert len(first.logprobs) == len(second.logprobs) == (request.params.logprobs is not None)
        for ours, theirs in zip(second.logprobs, first.logprobs, strict=True):
            assert (ours.token_id,) == second.token_ids
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
            assert len(ours.top) == request.params.logprobs
            known = dict(theirs.top)
            for token, value in ours.top:
                assert known.get(token, value) == pytest.approx(value, abs=1e-4)


def test_a_stop_token_ends_an_answer_in_the_middle(tiny_llama: Path, stop: int) -> None:
    """The step that was launched too far leaves nothing behind."""
    with make_engine(tiny_llama, "on") as engine:
        outputs = answers(engine, mixed_requests(stop))[-2]
        tokens = list(tokens_of(outputs))
        assert outputs[-1].finish_reason is FinishReason.STOP
        assert 20 < len(tokens) < 50
        assert tokens.index(stop) == len(tokens) - 1


@pytest.fixture
def engine(tiny_llama: Path) -> Iterator[Engine]:
    with make_engine(tiny_llama, "on") as engine:
        yield engine


@pytest.mark.parametrize("moment", ["launch", "result"])
def test_a_step_that_fails_ends_its_requests_and_the_next_are_served(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """The seventh step fails, when another is under way."""
    good = [make_request("a", 20, max_tokens=12), make_request("b", 100, max_tokens=12, logprobs=3)]
    expected = [list(tokens_of(outputs)) for outputs in answers(engine, good)]
    launched: list[StepPlan] = []
    launch = engine.runner.launch

    def broken(plan: StepPlan, on_layer: OnLayer | None = None) -> Any:
        launched.append(plan)
        if len(launched) != 7:
            return launch(plan, on_layer)
        if moment == "launch":
            raise RuntimeError("out of luck")
        return Broken(launch(plan, on_layer))

    monkeypatch.setattr(engine.runner, "launch", broken)
    failed = answers(engine, good)
    for outputs, whole in zip(failed, expected, strict=True):
        tokens = list(tokens_of(outputs))
        assert tokens == whole[: len(tokens)]
        assert (outputs[-1].finish_reason, outputs[-1].token_ids) == (FinishReason.FAILED, ())
        assert outputs[-1].offset == len(tokens) < len(whole)
        assert "out of luck" in outputs[-1].reason
    assert any(list(tokens_of(outputs)) for outputs in failed)
    assert [list(tokens_of(outputs)) for outputs in answers(engine, good)] == expected


def test_a_step_launched_behind_one_that_failed_is_forgotten(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own failure must not end the requests that came since; the loop is driven by hand."""
    engine, launched = make_engine(tiny_llama, "on"), 0
    launch, outputs = engine.runner.launch, dict[str, list[TokenOutput]](a=[], b=[])

    def broken(plan: StepPlan, on_layer: OnLayer | None = None) -> Any:
        nonlocal launched
        launched += 1
        step = launch(plan, on_layer)
        return Broken(step) if launched in (3, 4) else step

    monkeypatch.setattr(engine.runner, "launch", broken)

    def on_step(emitted: list[Emitted]) -> None:
        for sequence, output in emitted:
            outputs[sequence.request.request_id].append(output)

    engine.loop.on_step = on_step
    for name in outputs:
        request = make_request(name, 20, max_tokens=6, ignore_eos=True)
        engine.scheduler.add(Sequence.from_request(request, arrival=0.0))
        while not (outputs[name] and outputs[name][-1].finish_reason):
            assert engine.loop.step()
    assert launched > 4
    assert [outputs[name][-1].finish_reason for name in "ab"] == [FinishReason.FAILED, FinishReason.LENGTH]
    assert len(list(tokens_of(outputs["b"]))) == 6
    engine.check_integrity()


class Broken:
    """A step that was computed, but whose outcome is lost."""

    def __init__(self, step: LaunchedStep) -> None:
        self._step = step

    def result(self) -> None:
        self._step.result()
        raise RuntimeError("out of luck")
