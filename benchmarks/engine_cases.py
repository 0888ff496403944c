"""What is measured of an engine: the cases by name, the prompts each one needs, and what its run says.

`decode-64` is 64 sequences that decode at a mean context of about 1,088 tokens, `decode-1-32768` one sequence at a
context of 32,768, `prefill-2048` one prompt of 2,048 tokens, `prefill-32x2048` 32 of them together.
"""

from __future__ import annotations

import itertools
import re
import statistics
from dataclasses import dataclass
from typing import Literal

import torch

from benchmarks.engine_driver import Run

CONTEXT = 1088
CASES = (
    "decode-1",
    "decode-8",
    "decode-32",
    "decode-64",
    "decode-128",
    "decode-256",
    "decode-1-32768",
    "prefill-512",
    "prefill-2048",
    "prefill-8192",
    "prefill-16384",
    "prefill-32x2048",
)
TARGETS = {
    "decode-1": 0.80,
    "decode-8": 0.80,
    "decode-32": 0.80,
    "decode-64": 0.80,
    "decode-128": 0.78,
    "decode-256": 0.72,
    "prefill-512": 0.65,
    "prefill-2048": 0.78,
    "prefill-8192": 0.82,
}
"""Floor / measured that counts as good."""

_NAME = re.compile(r"decode-(?P<batch>\d+)(?:-(?P<context>\d+))?|prefill-(?:(?P<num>\d+)x)?(?P<length>\d+)")


@dataclass(frozen=True, slots=True)
class Case:
    """One line of the table."""

    kind: Literal["decode", "prefill"]
    num_seqs: int
    length: int
    """decode: the mean context in the middle of the measured steps; prefill: tokens of each prompt."""

    @classmethod
    def parse(cls, name: str) -> Case:
        """The case of that name; ValueError for a name that is none."""
        match = _NAME.fullmatch(name)
        if match is None:
            raise ValueError(f"{name!r} is no case: decode-BATCH[-CONTEXT] or prefill-[NUMx]LENGTH, such as {CASES[0]}")
        if name.startswith("decode"):
            case = cls("decode", int(match["batch"]), int(match["context"] or CONTEXT))
        else:
            case = cls("prefill", int(match["num"] or 1), int(match["length"]))
        if case.num_seqs < 1 or case.length < 1:
            raise ValueError(f"{name!r}: every number must be at least 1")
        return case

    @property
    def name(self) -> str:
        """What `parse` understands."""
        if self.kind == "decode":
            return f"decode-{self.num_seqs}" + (f"-{self.length}" if self.length != CONTEXT else "")
        return "prefill-" + (f"{self.num_seqs}x" if self.num_seqs > 1 else "") + str(self.length)

    @property
    def target(self) -> float | None:
        """Floor / measured that counts as good; None where none is set."""
        return TARGETS.get(self.name)

    def num_blocks(self, steps: int, block_size: int) -> int:
        """Blocks that hold all its sequences to their end, with one to spare for each."""
        tokens = self.length + (steps // 2 + 2 if self.kind == "decode" else 1)
        return self.num_seqs * (-(-tokens // block_size) + 1)

    def repeats(self, *, quick: bool) -> int:
        """How often a run of it is repeated for one figure."""
        if self.kind == "decode":
            return 1
        tokens = self.num_seqs * self.length
        return max(2, min(10, (16384 if quick else 49152) // tokens))


@dataclass(frozen=True, slots=True)
class Demand:
    """What to ask of the engine: for each sequence the length of its prompt and its output."""

    prompt_lens: tuple[int, ...]
    max_tokens: tuple[int, ...]


def demand(case: Case, steps: int, max_step_tokens: int) -> Demand:
    """For a decode case: all sequences decode together for at least `steps` steps.

    Prompts are computed one after another, so the first sequences already decode while the last ones wait. They get
    shorter prompts and longer outputs for it, so that all have the case's context halfway through those steps.
    """
    if case.kind == "prefill":
        return Demand((case.length,) * case.num_seqs, (1,) * case.num_seqs)
    prompt = case.length - steps // 2
    if prompt < 1:
        raise ValueError(f"{case.name}: a context of {case.length} is too short for {steps} steps")
    free = max(max_step_tokens - case.num_seqs, max_step_tokens // 4, 1)
    leads = [-(-later * prompt // free) for later in range(case.num_seqs - 1, -1, -1)]
    return Demand(
        tuple(max(1, prompt - lead) for lead in leads),
        tuple(steps + 1 + lead for lead in leads),
    )


def random_prompts(lengths: tuple[int, ...], vocab_size: int, seed: int) -> list[tuple[int, ...]]:
    """Prompts that share nothing."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab_size, (sum(lengths),), generator=generator)
    return [tuple(piece.tolist()) for piece in ids.split(list(lengths))]


@dataclass(frozen=True, slots=True)
class Figure:
    """What one measurement of a case gave."""

    time_s: float
    """decode: mean over the whole window, gaps between steps included; prefill: median of the repeats."""
    median_s: float
    best_s: float
    context: float
    """decode: mean tokens of KV that a sequence read in a step of the window; prefill: tokens of a prompt."""
    count: int
    """Steps or repeats."""


def decode_figure(run: Run, prompt_lens: tuple[int, ...], steps: int) -> Figure:
    """Of the first `steps` steps after the one from which on all sequences decode.

    Raises ValueError if they did not decode together long enough to say anything.
    """
    together = [step for step in run.steps if len(step.emitted) == len(prompt_lens)][: steps + 1]
    if len(together) < max(3, steps // 2):
        raise ValueError(f"all {len(prompt_lens)} sequences decoded together in {len(together)} steps of {steps} only")
    times = [end.moment - start.moment for start, end in itertools.pairwise(together)]
    generated = sum(output.offset for step in together[1:] for _, output in step.emitted)
    return Figure(
        time_s=(together[-1].moment - together[0].moment) / len(times),
        median_s=statistics.median(times),
        best_s=min(times),
        context=(sum(prompt_lens) + generated / len(times)) / len(prompt_lens),
        count=len(times),
    )


def prefill_figure(runs: list[Run], length: int) -> Figure:
    """From posting the prompts to the first token of the last one."""
    times = [run.steps[-1].moment - run.start for run in runs]
    return Figure(statistics.median(times), statistics.median(times), min(times), float(length), len(times))
