"""Whole models on a GPU against transformers there, and against the same model on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from engine.sequence import Sequence
from engine.tokenizer import Tokenizer
from tests.engine.checkpoints import VOCAB_SIZE, CheckpointFamily, make_checkpoint
from tests.engine.demo_model import demo_source
from tests.engine.driver import Driver, make_runner, random_prompt
from tests.gpu.common import DEVICE, DTYPES, GPU, count_alike, make_gpu_runner

pytestmark = GPU

LENGTHS = (1, 2, 17, 100, 300, 1000)
MAX_GAP = {"float32": 1e-3, "bfloat16": 0.25}
MEAN_GAP = {"float32": 1e-4, "bfloat16": 0.03}
"""Bounds for the log-probabilities of the 20 likeliest tokens; the CPU is off by up to 0.12 and 0.016 in bfloat16."""
TEXTS = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time there was a small dragon who",
    "1, 2, 4, 8, 16,",
    "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n",
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", list(CheckpointFamily))
def test_log_probabilities_are_those_of_transformers(
    tmp_path: Path, family: CheckpointFamily, tied: bool, dtype: str
) -> None:
    """The same weights (rounded, where they are) in float32."""
    make_checkpoint(tmp_path, family, tied=tied)
    kind = getattr(torch, dtype)
    oracle: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=kind).float().eval().to(DEVICE)
    driver = Driver(make_gpu_runner(tmp_path, dtype))
    sequences = [driver.add(random_prompt(n, VOCAB_SIZE), max_tokens=8, logprobs=20) for n in LENGTHS]
    driver.finish(sequences, chunk=64)
    gaps = torch.cat([gaps_to(oracle, sequence) for sequence in sequences])
    assert gaps.numel() == len(LENGTHS) * 8 * 20
    assert float(gaps.max()) <= MAX_GAP[dtype]
    assert float(gaps.mean()) <= MEAN_GAP[dtype]


def gaps_to(oracle: Any, sequence: Sequence) -> torch.Tensor:
    """How far each reported log-probability is from the oracle's."""
    with torch.inference_mode():
        logits = oracle(torch.tensor([sequence.token_ids[:-1]], device=DEVICE)).logits[0].float()
    expected = torch.log_softmax(logits[sequence.num_prompt_tokens - 1 :], dim=-1).cpu()
    gaps = [
        abs(value - float(row[token]))
        for found, row in zip(sequence.logprobs, expected, strict=True)
        for token, value in found.top
    ]
    return torch.tensor(gaps)


@pytest.mark.parametrize("attention", ["triton", "sdpa"])
def test_backends_answer_alike(tiny_llama: Path, attention: str) -> None:
    """Against the CPU, in chunks and among others."""
    found = []
    for runner in (make_runner(tiny_llama), make_gpu_runner(tiny_llama, "float32", attention=attention)):
        driver = Driver(runner)
        found.append([driver.add(random_prompt(n, VOCAB_SIZE), max_tokens=12, logprobs=20) for n in LENGTHS])
        driver.finish(found[-1], chunk=48)
    for here, there in zip(*found, strict=True):
        assert count_alike(there.logprobs, here.logprobs, bound=1e-3) == 12


def test_the_demo_model_answers_as_on_the_cpu() -> None:
    source = demo_source()
    tokenizer = Tokenizer.load(source)
    prompts = [tokenizer.encode(text) for text in TEXTS]
    runner = make_gpu_runner(source.path, "float32", num_blocks=64, max_running=8, max_step_tokens=128)
    runner.warm_up()
    found: list[list[Sequence]] = []
    for each in (make_runner(source.path, num_blocks=64), runner):
        driver = Driver(each)
        found.append([driver.add(prompt, max_tokens=48, logprobs=5) for prompt in prompts])
        driver.finish(found[-1])
    alike = 0
    for here, there in zip(*found, strict=True):
        alike += count_alike(there.logprobs, here.logprobs, bound=2e-3)
    assert alike >= 48 * (len(TEXTS) - 1), "more than one answer parts from the CPU's, if only at ties"
