"""The same cases through Hugging Face transformers: its generate, default attention, random weights on the device."""

from __future__ import annotations

import itertools
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.cpu_engine import Marks
from benchmarks.engine_cases import Case, Figure, demand, random_prompts

REPEATS = 5


def measure_peer(directory: Path, device: str, dtype: str, *, cases: list[Case], steps: int) -> list[Figure]:
    """One figure of each case (of one sequence); for a process that does nothing else."""
    from transformers.utils import logging

    log: Any = logging
    log.set_verbosity_error()
    peer = Peer(directory, torch.device(device), getattr(torch, dtype))
    return [peer.measure(case, steps) for case in cases]


class Peer:
    """A transformers model of the same config."""

    def __init__(self, directory: Path, device: torch.device, dtype: torch.dtype) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        config: Any = AutoConfig.from_pretrained(directory)
        with device:
            self._model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        self._model.generation_config.eos_token_id = None
        self._device = device
        self._vocab_size = int(config.vocab_size)

    def measure(self, case: Case, steps: int) -> Figure:
        """Its figure for a case of one sequence, after a run that is not counted."""
        prompt_lens = demand(case, steps, max_step_tokens=1).prompt_lens
        num_new = 1 + steps if case.kind == "decode" else 1
        self._generate(prompt_lens, num_new, seed=0)
        if case.kind == "prefill":
            times = []
            for seed in range(1, 1 + REPEATS):
                moments = self._generate(prompt_lens, num_new, seed)
                times.append(moments[1] - moments[0])
            return Figure(statistics.median(times), statistics.median(times), min(times), float(case.length), REPEATS)
        moments = self._generate(prompt_lens, num_new, seed=1)[1:]
        times = [end - start for start, end in itertools.pairwise(moments)]
        mean = (moments[-1] - moments[0]) / len(times)
        context = prompt_lens[0] + (1 + steps) / 2
        return Figure(mean, statistics.median(times), min(times), context, len(times))

    def _generate(self, prompt_lens: tuple[int, ...], num_new: int, seed: int) -> list[float]:
        """The moments of the call and of each step's tokens."""
        prompts = random_prompts(prompt_lens, self._vocab_size, seed)
        ids, marks = torch.tensor(prompts, device=self._device), Marks(time.perf_counter)
        start = time.perf_counter()
        self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_new,
            min_new_tokens=num_new,
            do_sample=False,
            pad_token_id=0,
            streamer=marks,
        )
        return [start, *marks.moments[1:]]
