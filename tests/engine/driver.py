"""Drives a ModelRunner by hand-made plans, in the scheduler's stead: blocks are dealt from a shuffled deck."""

from __future__ import annotations

import random
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import torch

from engine.api import GenerateRequest, SamplingParams
from engine.batch import LayerHook, ScheduledSequence, StepPlan
from engine.config import CacheOptions, EngineOptions, ModelOptions
from engine.parallel import TensorParallel
from engine.runner import ModelRunner
from engine.sequence import Sequence


def make_runner(
    path: Path | str, *, num_blocks: int = 256, block_size: int = 16, parallel: TensorParallel | None = None
) -> ModelRunner:
    cache = CacheOptions(num_blocks=num_blocks, block_size=block_size)
    options = EngineOptions(device="cpu", tensor_parallel=parallel.size if parallel else 1)
    return ModelRunner(ModelOptions(path=str(path)), cache, options, parallel=parallel)


def random_prompt(length: int, vocab_size: int, seed: int = 0) -> list[int]:
    generator = random.Random(seed * 10007 + length)
    return [generator.randrange(vocab_size) for _ in range(length)]


class Driver:
    """Sequences over one runner."""

    def __init__(self, runner: ModelRunner, *, seed: int = 0, shuffled: bool = True) -> None:
        self.runner = runner
        self._deck = list(range(runner.kv_cache.num_blocks))
        if shuffled:
            random.Random(seed).shuffle(self._deck)
        else:
            self._deck.reverse()

    def add(self, prompt: Seq[int], max_tokens: int = 8, **params: Any) -> Sequence:
        """A sequence that owns blocks for all it will ever hold."""
        request = GenerateRequest(
            request_id=f"r{len(self._deck)}",
            prompt_token_ids=tuple(prompt),
            params=SamplingParams(max_tokens=max_tokens, **params),
        )
        sequence = Sequence.from_request(request, arrival=0.0)
        for _ in range(-(-(len(prompt) + max_tokens) // self.runner.kv_cache.block_size)):
            sequence.block_ids.append(self._deck.pop())
        return sequence

    def step(self, sequences: Seq[Sequence], chunk: int = 512, hook: LayerHook | None = None) -> None:
        """One step in which every sequence advances by up to `chunk` tokens."""
        shares = tuple(
            ScheduledSequence.next_of(sequence, min(chunk, sequence.num_missing_tokens)) for sequence in sequences
        )
        result = self.runner.launch(StepPlan(shares), hook).result()
        assert [sampled is not None for sampled in result.sampled] == [share.samples for share in shares]
        for share, sampled in zip(shares, result.sampled, strict=True):
            sequence = share.sequence
            sequence.num_computed_tokens += share.num_tokens
            if sampled is not None:
                sequence.token_ids.append(sampled.token_id)
                if sampled.logprobs is not None:
                    sequence.logprobs.append(sampled.logprobs)

    def finish(self, sequences: Seq[Sequence], chunk: int = 512) -> list[list[int]]:
        """Step until each has its max_tokens; returns the answers."""
        while running := [s for s in sequences if s.num_generated_tokens < s.request.params.max_tokens]:
            self.step(running, chunk)
        return [answer(sequence) for sequence in sequences]


def answer(sequence: Sequence) -> list[int]:
    return sequence.token_ids[sequence.num_prompt_tokens :]


def largest_difference(first: Sequence, second: Sequence) -> float:
    """Over the log-probabilities of the same tokens that both reported."""
    gaps = [0.0]
    for ours, theirs in zip(first.logprobs, second.logprobs, strict=True):
        known = dict(theirs.top)
        gaps += [abs(value - known[token]) for token, value in ours.top if token in known]
    assert len(gaps) > 1
    return float(torch.tensor(gaps).max())
