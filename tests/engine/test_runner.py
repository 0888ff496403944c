from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.batch import LayerHook, ScheduledSequence, StepPlan
from engine.config import CacheOptions, EngineOptions, ModelOptions
from engine.errors import EngineError, IntegrityError
from engine.runner import ModelRunner, choose_device
from engine.sequence import Sequence
from tests.engine.checkpoints import VOCAB_SIZE, CheckpointFamily, make_checkpoint
from tests.engine.demo_model import demo_source
from tests.engine.driver import Driver, answer, largest_difference, make_runner, random_prompt
from tests.oracle import Judge

LENGTHS = (1, 2, 15, 16, 17, 33, 100, 257)


@pytest.fixture(scope="module")
def runner(tiny_llama: Path) -> ModelRunner:
    return make_runner(tiny_llama)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", list(CheckpointFamily))
def test_greedy_answers_equal_transformers(tmp_path: Path, family: CheckpointFamily, tied: bool) -> None:
    judge = Judge.of(make_checkpoint(tmp_path, family, tied=tied))
    driver = Driver(make_runner(tmp_path))
    prompts = [random_prompt(length, VOCAB_SIZE) for length in LENGTHS]
    answers = driver.finish([driver.add(prompt) for prompt in prompts], chunk=48)
    for prompt, tokens in zip(prompts, answers, strict=True):
        judge.check(prompt, tokens)
    judge.verdict()


@pytest.mark.parametrize("chunk", [16, 37, 128, 512])
def test_any_chunking_of_a_long_prompt_equals_transformers(tiny_llama: Path, chunk: int) -> None:
    judge = Judge.of(tiny_llama)
    for shuffled in (True, False):
        driver = Driver(make_runner(tiny_llama), seed=chunk, shuffled=shuffled)
        prompts = [random_prompt(2000, VOCAB_SIZE, chunk), random_prompt(700, VOCAB_SIZE, chunk)]
        for prompt, tokens in zip(prompts, driver.finish([driver.add(p) for p in prompts], chunk), strict=True):
            judge.check(prompt, tokens)
    judge.verdict()


def test_prefill_and_decode_share_steps(tiny_llama: Path, runner: ModelRunner) -> None:
    judge, driver = Judge.of(tiny_llama), Driver(runner)
    prompts = [random_prompt(length, VOCAB_SIZE, 5) for length in (40, 300, 3, 90)]
    sequences: list[Sequence] = []
    for prompt in prompts:
        sequences.append(driver.add(prompt, max_tokens=20))
        driver.step(sequences, chunk=32)
        driver.step(sequences, chunk=32)
    for prompt, tokens in zip(prompts, driver.finish(sequences, chunk=32), strict=True):
        judge.check(prompt, tokens)
    judge.verdict()


@pytest.mark.parametrize("family", [CheckpointFamily.LLAMA, CheckpointFamily.QWEN3])
def test_company_does_not_change_a_result(tmp_path: Path, family: CheckpointFamily) -> None:
    """Up to rounding, which is each processor's own."""
    runner = make_runner(make_checkpoint(tmp_path, family, tied=True))
    alone = Driver(runner)
    lonely = alone.add(random_prompt(50, VOCAB_SIZE), logprobs=20, max_tokens=12)
    alone.finish([lonely])
    crowd = Driver(runner, seed=1)
    others = [crowd.add(random_prompt(n, VOCAB_SIZE, 3), max_tokens=n) for n in (3, 9, 4, 11, 6)]
    together = crowd.add(random_prompt(50, VOCAB_SIZE), logprobs=20, max_tokens=12)
    crowd.finish([*others, together])
    assert [item.token_id for item in together.logprobs] == [item.token_id for item in lonely.logprobs]
    for one, other in zip(together.logprobs, lonely.logprobs, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


def test_seeded_sampling_does_not_depend_on_company_or_chunks(runner: ModelRunner) -> None:
    settings = {"temperature": 0.9, "top_p": 0.9, "seed": 7, "max_tokens": 16}
    driver = Driver(runner)
    lonely = driver.add(random_prompt(60, VOCAB_SIZE), **settings)
    driver.finish([lonely])
    together = [driver.add(random_prompt(60, VOCAB_SIZE), **settings), driver.add([1, 2, 3], temperature=2.0)]
    driver.finish(together, chunk=16)
    assert answer(together[0]) == answer(lonely)


def slots_of(sequence: Sequence, num_tokens: int) -> np.ndarray:
    tokens = np.arange(num_tokens)
    return np.asarray(sequence.block_ids)[tokens // 16] * 16 + tokens % 16


def test_each_layer_is_told_once_its_kv_is_there(runner: ModelRunner) -> None:
    driver, cache = Driver(runner), runner.kv_cache
    sequence = driver.add(random_prompt(40, VOCAB_SIZE))
    places, heads = cache.locate(slots_of(sequence, 40)), range(cache.num_kv_heads)
    cache.data.zero_()
    seen: list[torch.Tensor] = []

    def on_layer(layer: int, event: object) -> None:
        assert layer == len(seen)
        assert event is None
        seen.append(torch.empty(1, 2, 40, cache.num_kv_heads, cache.head_dim))
        transfer.submit(cache.gather, layer, 1, places, heads, seen[-1]).result(10.0)

    with ThreadPoolExecutor(1) as transfer:
        driver.step([sequence], hook=LayerHook(on_layer))
    after = torch.empty(cache.num_layers, 2, 40, cache.num_kv_heads, cache.head_dim)
    cache.gather(0, cache.num_layers, places, heads, after)
    assert torch.equal(torch.cat(seen), after)
    assert after.abs().amin(dim=(0, 1, 3, 4)).gt(0).all()


def test_only_the_layers_that_a_hook_names_are_told(runner: ModelRunner) -> None:
    driver, told = Driver(runner), []
    layers = range(1, runner.config.num_layers, 2)
    hook = LayerHook(lambda layer, _: told.append(layer), layers=layers)
    driver.step([driver.add(random_prompt(40, VOCAB_SIZE))], hook=hook)
    assert told == list(layers)


def test_another_runner_goes_on_with_transferred_kv(tiny_llama: Path) -> None:
    """Split equals colocated: KV gathered here and scattered into other blocks there."""
    first, second = Driver(make_runner(tiny_llama)), Driver(make_runner(tiny_llama, num_blocks=64), seed=9)
    prompt = random_prompt(100, VOCAB_SIZE)
    whole, half = (first.add(prompt, logprobs=20, max_tokens=10) for _ in range(2))
    first.finish([whole])
    first.step([half])
    cache = first.runner.kv_cache
    data = torch.empty(cache.num_layers, 2, 100, cache.num_kv_heads, cache.head_dim)
    heads = range(cache.num_kv_heads)
    cache.gather(0, cache.num_layers, cache.locate(slots_of(half, 100)), heads, data)
    moved = second.add(prompt, logprobs=20, max_tokens=10)
    other = second.runner.kv_cache
    other.scatter(0, cache.num_layers, other.locate(slots_of(moved, 100)), heads, data)
    moved.num_computed_tokens = 100
    moved.token_ids.append(half.token_ids[-1])
    second.finish([moved])
    assert moved.token_ids == whole.token_ids
    assert moved.logprobs == whole.logprobs[1:]


def test_the_answer_is_near_the_same_for_any_block_size(tiny_llama: Path) -> None:
    found: list[Sequence] = []
    for block_size in (8, 128):
        driver = Driver(make_runner(tiny_llama, block_size=block_size, num_blocks=64))
        found.append(driver.add(random_prompt(150, VOCAB_SIZE), logprobs=20))
        driver.finish(found[-1:], chunk=64)
    assert largest_difference(*found) < 1e-4


def test_logits_that_are_no_numbers_are_an_error(tiny_llama: Path) -> None:
    driver = Driver(make_runner(tiny_llama))
    sequence = driver.add([1, 2, 3])
    driver.step([sequence])
    driver.runner.kv_cache.data.fill_(math.nan)
    with pytest.raises(EngineError, match=f"request {sequence.request.request_id} are not finite"):
        driver.step([sequence])


def test_a_share_without_blocks_or_tokens_is_a_defect(runner: ModelRunner) -> None:
    sequence = Driver(runner).add([1, 2, 3])
    with pytest.raises(IntegrityError, match="tokens 1 to 5 of request"):
        runner.run(StepPlan((ScheduledSequence(sequence, 1, 4, samples=True),)))
    sequence.block_ids.clear()
    with pytest.raises(IntegrityError, match="has 0 blocks of 16, too few for its first 3 tokens"):
        runner.run(StepPlan((ScheduledSequence(sequence, 0, 3, samples=True),)))


def test_warm_up_leaves_the_cache_usable(tiny_llama: Path) -> None:
    judge, driver = Judge.of(tiny_llama), Driver(make_runner(tiny_llama, num_blocks=8))
    driver.runner.warm_up()
    prompt = random_prompt(20, VOCAB_SIZE)
    judge.check(prompt, driver.finish([driver.add(prompt)])[0])


def test_a_longer_context_than_the_models_is_refused(tiny_llama: Path) -> None:
    model = ModelOptions(path=str(tiny_llama), max_model_len=5000)
    with pytest.raises(EngineError, match="max_model_len is 5000, but this model was trained for 4096"):
        ModelRunner(model, CacheOptions(), EngineOptions(device="cpu"))


def test_the_number_of_ranks_must_be_the_configured_one(tiny_llama: Path) -> None:
    with pytest.raises(EngineError, match="tensor_parallel is 2, but this runner is one of 1 ranks"):
        ModelRunner(ModelOptions(path=str(tiny_llama)), CacheOptions(), EngineOptions(tensor_parallel=2))


def test_bfloat16_is_near_float32(tiny_llama: Path) -> None:
    found: list[Sequence] = []
    for dtype in ("float32", "bfloat16"):
        model = ModelOptions(path=str(tiny_llama), dtype=dtype)
        driver = Driver(ModelRunner(model, CacheOptions(num_blocks=8), EngineOptions(device="cpu")))
        assert driver.runner.kv_cache.data.dtype == driver.runner.dtype == getattr(torch, dtype)
        found.append(driver.add(random_prompt(70, VOCAB_SIZE), logprobs=20, max_tokens=1))
        driver.finish(found[-1:], chunk=32)
    assert largest_difference(*found) < 0.5


def test_the_device_is_chosen_by_name() -> None:
    assert choose_device("cpu").type == "cpu"
    if not torch.cuda.is_available():
        assert choose_device("auto").type == "cpu"
        with pytest.raises(EngineError, match="sees no GPU"):
            choose_device("cuda")


def test_the_demo_model_answers_as_transformers_does() -> None:
    source = demo_source()
    judge, driver = Judge.of(source.path), Driver(make_runner(source.path))
    prompts = [random_prompt(length, 40000) for length in (1, 60, 200)]
    sequences = [driver.add(prompt, max_tokens=6) for prompt in prompts]
    for prompt, tokens in zip(prompts, driver.finish(sequences, chunk=64), strict=True):
        judge.check(prompt, tokens)
    judge.verdict()
