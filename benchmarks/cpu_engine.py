"""One engine against transformers on the same CPU, in the same run: decode steps and prefill, float32.

    python benchmarks/cpu_engine.py model.gguf [--json result.json]

Each case is run by one side and then by the other, `--repeats` times over, because other work on the machine
slows both; the table shows each side's median and its best, and both ratios (above 1: this engine is faster).
Decode is the slope between two lengths of output at a context of about 256 tokens, so that neither side's prefill
is in it; prefill is the whole call that yields the first token.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from engine.api import GenerateRequest, SamplingParams
from engine.batch import ScheduledSequence, StepPlan
from engine.config import CacheOptions, EngineOptions, ModelOptions
from engine.runner import ModelRunner
from engine.sequence import Sequence

CONTEXT = 240
DECODE_STEPS = 32


@dataclass(frozen=True, slots=True)
class Outcome:
    """Times of one case; decode in seconds a step, prefill in seconds a prompt."""

    case: str
    num_tokens: int
    """Tokens computed in the time measured."""
    ours_s: list[float]
    theirs_s: list[float]
    same_tokens: bool
    """Whether both sides chose the same tokens."""

    def ratio(self, pick: Callable[[list[float]], float]) -> float:
        """How many times faster this engine is."""
        return pick(self.theirs_s) / pick(self.ours_s)


class Ours:
    """This repository's engine, driven step by step."""

    def __init__(self, model: str, max_tokens: int) -> None:
        options = EngineOptions(device="cpu", threads=1)
        self._runner = ModelRunner(ModelOptions(path=model), CacheOptions(), options)
        self._max_step_tokens = options.max_step_tokens
        self._max_tokens = max_tokens
        self._runner.warm_up()

    def generate(self, prompts: list[list[int]], num_new: int) -> list[list[int]]:
        """Greedy tokens of each prompt; prompts are computed one after the other, then decoded together."""
        sequences = [self._sequence(index, prompt) for index, prompt in enumerate(prompts)]
        for sequence in sequences:
            while sequence.num_missing_tokens > 0 and sequence.num_generated_tokens == 0:
                self._step([sequence])
        for _ in range(num_new - 1):
            self._step(sequences)
        return [sequence.token_ids[sequence.num_prompt_tokens :] for sequence in sequences]

    def _sequence(self, index: int, prompt: list[int]) -> Sequence:
        request = GenerateRequest(request_id=str(index), prompt_token_ids=tuple(prompt), params=SamplingParams())
        sequence = Sequence.from_request(request, arrival=0.0)
        per_sequence = -(-self._max_tokens // self._runner.kv_cache.block_size)
        sequence.block_ids = list(range(index * per_sequence, (index + 1) * per_sequence))
        return sequence

    def _step(self, sequences: list[Sequence]) -> None:
        shares = tuple(
            ScheduledSequence(s, s.num_computed_tokens, min(s.num_missing_tokens, self._max_step_tokens))
            for s in sequences
        )
        result = self._runner.run(StepPlan(shares))
        for share, sampled in zip(shares, result.sampled, strict=True):
            share.sequence.num_computed_tokens += share.num_tokens
            if sampled is not None:
                share.sequence.token_ids.append(sampled.token_id)


class Theirs:
    """transformers' generate, with its default (SDPA) attention and cache."""

    def __init__(self, model: str) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()
        path = Path(model)
        names: dict[str, Any] = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
        place = path.parent if names else path
        self._model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **names)

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], num_new: int) -> list[list[int]]:
        """Greedy tokens of each prompt (all of one length)."""
        ids = torch.tensor(prompts)
        out = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_new,
            min_new_tokens=num_new,
            do_sample=False,
            pad_token_id=0,
        )
        tokens: list[list[int]] = out[:, ids.shape[1] :].tolist()
        return tokens


def timed(side: Ours | Theirs, prompts: list[list[int]], num_new: int) -> tuple[float, list[list[int]]]:
    start = time.perf_counter()
    result = side.generate(prompts, num_new)
    return time.perf_counter() - start, result


def decode_case(ours: Ours, theirs: Theirs, batch: int, repeats: int) -> Outcome:
    prompts = make_prompts(batch, CONTEXT)
    times: tuple[list[float], list[float]] = ([], [])
    tokens: list[list[list[int]]] = []
    for _ in range(repeats):
        for side, own_times in zip((ours, theirs), times, strict=True):
            short, _ = timed(side, prompts, 1)
            long, result = timed(side, prompts, 1 + DECODE_STEPS)
            own_times.append((long - short) / DECODE_STEPS)
            tokens.append(result)
    return Outcome(f"decode, batch {batch}", batch, *times, same_tokens=tokens[0] == tokens[1])


def prefill_case(ours: Ours, theirs: Theirs, length: int, repeats: int) -> Outcome:
    prompts = make_prompts(1, length)
    times: tuple[list[float], list[float]] = ([], [])
    tokens: list[list[list[int]]] = []
    for _ in range(repeats):
        for side, own_times in zip((ours, theirs), times, strict=True):
            elapsed, result = timed(side, prompts, 1)
            own_times.append(elapsed)
            tokens.append(result)
    return Outcome(f"prefill, {length} tokens", length, *times, same_tokens=tokens[0] == tokens[1])


def make_prompts(count: int, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(length)
    ids: list[list[int]] = torch.randint(100, 20000, (count, length), generator=generator).tolist()
    return ids


def print_table(outcomes: list[Outcome]) -> None:
    print(f"{'case':<22}{'ours ms':>18}{'transformers ms':>18}{'ours tok/s':>12}{'ratio':>14}  tokens")
    for outcome in outcomes:
        cells = [
            f"{statistics.median(times) * 1e3:.1f} / {min(times) * 1e3:.1f}"
            for times in (outcome.ours_s, outcome.theirs_s)
        ]
        rate = outcome.num_tokens / statistics.median(outcome.ours_s)
        ratios = f"{outcome.ratio(statistics.median):.2f} / {outcome.ratio(min):.2f}"
        same = "same" if outcome.same_tokens else "DIFFER"
        print(f"{outcome.case:<22}{cells[0]:>18}{cells[1]:>18}{rate:>12.0f}{ratios:>14}  {same}")
    print("Each pair of figures: median / best.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a .gguf file or a Hugging Face directory")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write every time measured to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ours, theirs = Ours(arguments.model, max_tokens=1088), Theirs(arguments.model)
    outcomes = [decode_case(ours, theirs, batch, arguments.repeats) for batch in (1, 8)]
    outcomes += [prefill_case(ours, theirs, length, arguments.repeats) for length in (512, 1024)]
    print_table(outcomes)
    if arguments.json is not None:
        machine = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__, "threads": 1}
        arguments.json.write_text(json.dumps({**machine, "cases": [asdict(o) for o in outcomes]}, indent=2))


if __name__ == "__main__":
    main()
