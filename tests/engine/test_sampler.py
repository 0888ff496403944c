from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from engine.api import GenerateRequest, SamplingParams
from engine.batch import SampledToken, ScheduledSequence
from engine.errors import EngineError
from engine.sampler import Sampler, candidates, choose_greedy, uniform
from engine.sequence import PENDING, Sequence

VOCAB = 200
EOS = 7


def make_sequence(prompt: list[int] | None = None, generated: list[int] | None = None, **params: Any) -> Sequence:
    request = GenerateRequest(
        request_id="r",
        prompt_token_ids=tuple(prompt or [1]),
        params=SamplingParams(**params),
        resume_from=tuple(generated or []),
    )
    return Sequence.from_request(request, arrival=0.0)


def random_logits(rows: int = 1, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * spread


def sample(logits: torch.Tensor, *sequences: Sequence) -> list[SampledToken]:
    shares = [ScheduledSequence.next_of(sequence, sequence.num_tokens) for sequence in sequences]
    choices = torch.empty(len(shares), 2, dtype=torch.int64)
    inputs = torch.tensor([sequence.token_ids[-1] for sequence in sequences])
    choose_greedy(logits, choices)
    return Sampler([EOS]).sample(logits, shares, inputs, range(len(shares)), choices).wait()


def test_greedy_takes_the_first_of_the_largest() -> None:
    logits = torch.zeros(3, VOCAB)
    logits[0, [30, 40]] = 5.0
    logits[1, 199] = 1.0
    sampled = sample(logits, *(make_sequence() for _ in range(3)))
    assert [token.token_id for token in sampled] == [30, 199, 0]
    assert [token.logprobs for token in sampled] == [None] * 3


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_never_sampled(bad: float, temperature: float) -> None:
    logits = random_logits(2)
    logits[1, 5] = bad
    with pytest.raises(EngineError, match="logits of request r are not finite"):
        sample(logits, make_sequence(), make_sequence(temperature=temperature))


@pytest.mark.parametrize(
    "params",
    [
        {"repetition_penalty": 1e-38},
        {"repetition_penalty": 1e-38, "temperature": 1.0},
        {"temperature": 1e-308},
        {"min_tokens": 5, "stop_token_ids": tuple(range(VOCAB))},
    ],
)
def test_no_setting_of_one_request_makes_its_logits_unusable(params: dict[str, Any]) -> None:
    """They would end the step, and with it everybody's requests."""
    logits = random_logits() + 5.0
    (token,) = sample(logits, make_sequence([3, 4], [5, 11], logprobs=2, **params))
    assert 0 <= token.token_id < VOCAB
    if params == {"temperature": 1e-308}:
        assert token.token_id == int(logits[0].argmax())


def test_a_row_without_any_possible_token_is_an_error() -> None:
    with pytest.raises(EngineError, match="not finite"):
        sample(torch.full((1, VOCAB), -math.inf), make_sequence(temperature=1.0))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [0, 1, 5, 150, 1000])
@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.5, 0.01])
@pytest.mark.parametrize("min_p", [0.0, 0.05, 1.0])
def test_candidates_are_those_of_transformers(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    warpers += [TopPLogitsWarper(top_p), MinPLogitsWarper(min_p)]
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    for seed in range(5):
        row = random_logits(seed=seed)
        expected = torch.softmax(warpers(torch.tensor([[0]]), row.double()), dim=-1)[0]
        probabilities = candidates(row, [params])[0]
        assert probabilities.nonzero().tolist() == expected.nonzero().tolist()
        torch.testing.assert_close(probabilities / probabilities.sum(), expected)


def test_equals_at_the_limit_of_top_p_go_by_id() -> None:
    row = torch.zeros(VOCAB)
    row[[20, 10, 30]] = 9.0
    probabilities = candidates(row[None], [SamplingParams(temperature=1.0, top_p=0.5)])
    assert probabilities[0].nonzero().squeeze(1).tolist() == [10, 20]


def test_each_row_is_filtered_by_its_own_settings() -> None:
    settings = [
        SamplingParams(temperature=0.7, top_k=3),
        SamplingParams(temperature=1.3, top_p=0.6),
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=1.0, top_k=9, top_p=0.9, min_p=0.1),
    ]
    rows = random_logits(4)
    together = candidates(rows, settings)
    for row, params, found in zip(rows, settings, together, strict=True):
        torch.testing.assert_close(found, candidates(row[None], [params])[0])


@pytest.mark.parametrize(
    "params",
    [{"repetition_penalty": 1.7}, {"presence_penalty": 1.5, "frequency_penalty": 0.7}, {"min_tokens": 4}],
)
def test_a_token_only_the_device_knows_counts_as_one_that_is_known(params: dict[str, Any]) -> None:
    logits = random_logits()
    known = make_sequence([3, 4], [5, 5, 11], logprobs=20, **params)
    pending = make_sequence([3, 4], [5, 5, PENDING], logprobs=20, **params)
    pending.num_pending = 1
    shares = [ScheduledSequence.next_of(pending, 5)]
    choices = torch.empty(1, 2, dtype=torch.int64)
    choose_greedy(logits, choices)
    found = Sampler([EOS]).sample(logits, shares, torch.tensor([9, 11]), [1], choices).wait()
    assert found == sample(logits, known)


def test_repetition_penalty_equals_transformers() -> None:
    logits, prompt, generated = random_logits(), [3, 4, 4, 9], [11, 3, 12]
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([prompt + generated]), logits.clone())
    sequence = make_sequence(prompt, generated, repetition_penalty=1.7, logprobs=20)
    logprobs = sample(logits, sequence)[0].logprobs
    assert logprobs is not None
    assert dict(logprobs.top) == pytest.approx(top_of(torch.log_softmax(expected[0], 0)))


def test_presence_and_frequency_count_generated_tokens_only() -> None:
    logits = random_logits()
    expected = logits[0].clone()
    expected[11] -= 0.5 + 3 * 0.25
    expected[12] -= 0.5 + 0.25
    sequence = make_sequence([3, 11, 11], [11, 12, 11, 11], presence_penalty=0.5, frequency_penalty=0.25, logprobs=20)
    logprobs = sample(logits, sequence)[0].logprobs
    assert logprobs is not None
    assert dict(logprobs.top) == pytest.approx(top_of(torch.log_softmax(expected, 0)))


def top_of(logprobs: torch.Tensor) -> dict[int, float]:
    best = logprobs.topk(20)
    return dict(zip(best.indices.tolist(), best.values.tolist(), strict=True))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_ends_before_min_tokens(temperature: float) -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, [EOS, 9, 50]] = torch.tensor([90.0, 80.0, 70.0])
    settings: dict[str, Any] = {"temperature": temperature, "min_tokens": 2, "stop_token_ids": (9, VOCAB + 5)}
    assert sample(logits, make_sequence(generated=[1], **settings))[0].token_id == 50
    assert sample(logits, make_sequence(generated=[1, 1], **settings))[0].token_id == EOS
    assert sample(logits, make_sequence(generated=[1], ignore_eos=True, **settings))[0].token_id == EOS


def test_logprobs_are_taken_after_penalties_and_before_temperature() -> None:
    logits = random_logits()
    expected = torch.log_softmax(logits[0], 0)
    result = sample(logits, make_sequence(temperature=5.0, logprobs=3, seed=3))[0]
    assert result.logprobs is not None
    assert result.logprobs.token_id == result.token_id
    assert result.logprobs.logprob == pytest.approx(float(expected[result.token_id]))
    assert [token for token, _ in result.logprobs.top] == expected.topk(3).indices.tolist()
    none = sample(logits, make_sequence(logprobs=0))[0].logprobs
    assert none is not None
    assert none.top == ()


def test_a_draw_follows_the_distribution() -> None:
    """Pearson's chi-squared over 4,000 positions: five standard deviations above its mean is beyond chance."""
    row = random_logits(spread=1.5)
    params = {"temperature": 0.8, "top_p": 0.97, "seed": 5}
    probabilities = candidates(row, [SamplingParams(**params)])[0]
    token_ids = probabilities.nonzero().squeeze(1)
    probabilities = probabilities[token_ids]
    expected = dict(zip(token_ids.tolist(), (probabilities / probabilities.sum() * 4000).tolist(), strict=True))
    counts = dict.fromkeys(expected, 0)
    for position in range(4000):
        counts[sample(row, make_sequence([1] * (position + 1), **params))[0].token_id] += 1
    statistic = sum((counts[token] - expected[token]) ** 2 / expected[token] for token in expected)
    freedom = len(expected) - 1
    assert freedom > 30
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    logits = random_logits(spread=1.0)
    by_prompt = make_sequence([1, 2, 3, 4], temperature=1.0, seed=9)
    resumed = make_sequence([5, 6], [7, 8], temperature=1.0, seed=9)
    others = [make_sequence(temperature=1.5, seed=seed) for seed in range(3)]
    first = sample(logits, by_prompt)[0].token_id
    assert sample(logits.expand(4, -1), *others, resumed)[-1].token_id == first
    drawn = {sample(logits, make_sequence([1] * 4, temperature=1.0, seed=seed))[0].token_id for seed in range(20)}
    assert len(drawn) > 5


def test_random_numbers_are_the_same_everywhere() -> None:
    assert [uniform(seed, position) for seed, position in ((0, 0), (0, 1), (1, 0), (2**64 - 1, 2**40))] == UNIFORMS


def test_random_numbers_are_spread_evenly() -> None:
    numbers = torch.tensor([uniform(seed, position) for seed in range(50) for position in range(200)])
    assert float(numbers.min()) >= 0.0
    assert float(numbers.max()) < 1.0
    assert numbers.unique().numel() > 9_990
    assert float(numbers.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(numbers.histc(20, 0, 1).std()) < 60
    neighbours = torch.corrcoef(torch.stack((numbers[:-1], numbers[1:])))[0, 1]
    assert abs(float(neighbours)) < 0.05


UNIFORMS = [0.6524484863740322, 0.1663964394676608, 0.36818951565166946, 0.4814939902929428]
