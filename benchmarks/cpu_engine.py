"""One engine against transformers on the same CPU, in the same run: decode steps and prefill, float32, one thread.

    python -m benchmarks.cpu_engine [demo | model.gguf] [--json result.json]

Both sides' `generate` runs turn by turn, `--repeats` times over, because other work on the machine slows both, and
each token's moment is noted. Prefill is the time from the call to the first token; a decode step is the time between
two tokens, at a context of about 256. The table shows each side's median and its best, and the ratios of both (above
1: this engine is faster). On a machine that does other work meanwhile, `--clock cpu` counts CPU time instead.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from engine.api import GenerateRequest, SamplingParams
from engine.config import CacheOptions, EngineOptions, ModelOptions
from engine.engine import Engine
from engine.model_source import resolve
from engine.scheduler import Emitted
from engine.sequence import Sequence

CONTEXT = 240
DECODE_STEPS = 32
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True, slots=True)
class Answer:
    """What one side generated, and when."""

    tokens: list[list[int]]
    moments: list[float]
    """Seconds by the clock: the call, then the end of each step that gave every prompt a token. (With several
    prompts the engine lets the first ones decode while the last is being computed; those steps are not noted.)"""


@dataclass(slots=True)
class Outcome:
    """Times of one case: seconds a decode step, or seconds a prompt."""

    case: str
    num_tokens: int
    """Tokens computed in the time measured."""
    ours_s: list[float] = field(default_factory=list)
    theirs_s: list[float] = field(default_factory=list)
    same_tokens: bool = True
    """Whether both sides always chose the same tokens."""


class Ours:
    """This repository's engine, colocated: prompts in, tokens out, as a worker's loop runs it."""

    def __init__(self, model: str, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._engine = Engine(
            ModelOptions(path=model),
            CacheOptions(prefix_caching=False),
            EngineOptions(device="cpu", threads=1),
        )
        self._engine.runner.warm_up()
        self._engine.start()

    def generate(self, prompts: list[list[int]], num_new: int) -> Answer:
        """Greedy tokens of each prompt, all given at once."""
        params = SamplingParams(max_tokens=num_new, ignore_eos=True)
        requests = [
            GenerateRequest(request_id=str(index), prompt_token_ids=tuple(prompt), params=params)
            for index, prompt in enumerate(prompts)
        ]
        tokens: list[list[int]] = [[] for _ in prompts]
        moments = [self._clock()]
        done = threading.Event()

        def on_step(emitted: list[Emitted]) -> None:
            for sequence, output in emitted:
                tokens[int(sequence.request.request_id)] += output.token_ids
            if len(emitted) == len(prompts):
                moments.append(self._clock())
            if all(len(each) == num_new for each in tokens):
                done.set()

        self._engine.loop.on_step = on_step
        sequences = [Sequence.from_request(request, arrival=index) for index, request in enumerate(requests)]
        self._engine.loop.post(lambda: [self._engine.scheduler.add(sequence) for sequence in sequences] and None)
        if not done.wait(600):
            raise TimeoutError("the engine did not answer within 600 s")
        return Answer(tokens, moments)


class Marks:
    """A streamer for transformers that only notes when it is called."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.moments: list[float] = []

    def put(self, tokens: torch.Tensor) -> None:
        """The prompt first, then each step's tokens."""
        self.moments.append(self._clock())

    def end(self) -> None:
        """Nothing is left to do."""


class Theirs:
    """transformers' generate, with its default (SDPA) attention and cache."""

    def __init__(self, model: str, clock: Callable[[], float]) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        log: Any = logging
        log.disable_progress_bar()
        log.set_verbosity_error()
        path = resolve(model).path
        names: dict[str, Any] = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
        self._clock = clock
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            path.parent if names else path, dtype=torch.float32, **names
        )

    def generate(self, prompts: list[list[int]], num_new: int) -> Answer:
        """Greedy tokens of each prompt (all of one length)."""
        ids, marks = torch.tensor(prompts), Marks(self._clock)
        out = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_new,
            min_new_tokens=num_new,
            do_sample=False,
            pad_token_id=0,
            streamer=marks,
        )
        return Answer(out[:, ids.shape[1] :].tolist(), marks.moments)


def decode_case(sides: tuple[Ours, Theirs], batch: int, repeats: int) -> Outcome:
    outcome = Outcome(f"decode, batch {batch}", num_tokens=batch)
    prompts = make_prompts(batch, CONTEXT)
    for _ in range(repeats):
        ours, theirs = (side.generate(prompts, 1 + DECODE_STEPS) for side in sides)
        for times, answer in ((outcome.ours_s, ours), (outcome.theirs_s, theirs)):
            times += [end - start for start, end in itertools.pairwise(answer.moments[1:])]
        outcome.same_tokens &= ours.tokens == theirs.tokens
    return outcome


def prefill_case(sides: tuple[Ours, Theirs], length: int, repeats: int) -> Outcome:
    outcome = Outcome(f"prefill, {length} tokens", num_tokens=length)
    prompts = make_prompts(1, length)
    for _ in range(repeats):
        ours, theirs = (side.generate(prompts, 1) for side in sides)
        outcome.ours_s.append(ours.moments[1] - ours.moments[0])
        outcome.theirs_s.append(theirs.moments[1] - theirs.moments[0])
        outcome.same_tokens &= ours.tokens == theirs.tokens
    return outcome


def make_prompts(count: int, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(length)
    ids: list[list[int]] = torch.randint(100, 20000, (count, length), generator=generator).tolist()
    return ids


def print_table(outcomes: list[Outcome]) -> None:
    print(f"{'case':<22}{'ours ms':>18}{'transformers ms':>18}{'ours tok/s':>12}{'ratio':>14}  tokens")
    for outcome in outcomes:
        median = [statistics.median(times) for times in (outcome.ours_s, outcome.theirs_s)]
        best = [min(times) for times in (outcome.ours_s, outcome.theirs_s)]
        cells = [f"{m * 1e3:.1f} / {b * 1e3:.1f}" for m, b in zip(median, best, strict=True)]
        ratios = f"{median[1] / median[0]:.2f} / {best[1] / best[0]:.2f}"
        rate = outcome.num_tokens / median[0]
        same = "same" if outcome.same_tokens else "DIFFER"
        print(f"{outcome.case:<22}{cells[0]:>18}{cells[1]:>18}{rate:>12.0f}{ratios:>14}  {same}")
    print("Each pair of figures: median / best.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo", help="demo, a .gguf file or a Hugging Face directory")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall")
    parser.add_argument("--json", type=Path, help="write every time measured to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    clock = CLOCKS[arguments.clock]
    sides = Ours(arguments.model, clock), Theirs(arguments.model, clock)
    outcomes = [decode_case(sides, batch, arguments.repeats) for batch in (1, 8)]
    outcomes += [prefill_case(sides, length, arguments.repeats) for length in (512, 1024)]
    print_table(outcomes)
    if arguments.json is not None:
        about = {"machine": platform.machine(), "torch": torch.__version__, "threads": 1, "clock": arguments.clock}
        arguments.json.write_text(json.dumps({**about, "cases": [asdict(outcome) for outcome in outcomes]}, indent=2))


if __name__ == "__main__":
    main()
