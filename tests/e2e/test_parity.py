"""Greedy output is token for token that of transformers in float32; see `tests.oracle` for the rule."""

import random
from pathlib import Path

import pytest

from engine.config import CacheOptions, EngineOptions, ModelOptions
from engine.engine import Engine, tokens_of
from tests.engine.checkpoints import CheckpointFamily, make_checkpoint
from tests.engine.demo_model import demo_source
from tests.oracle import Judge
from tests.session_pair import Peer, make_request, split_generate

LENGTHS = (1, 2, 15, 16, 17, 33, 64, 129, 300, 777, 2000)
NEW_TOKENS = 24


def prompts_of(vocab_size: int, lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    dice = random.Random(3)
    return [dice.choices(range(3, vocab_size), k=length) for length in lengths]


def engine_for(path: Path, chunk: int, num_blocks: int = 320) -> Engine:
    cache = CacheOptions(block_size=16, num_blocks=num_blocks)
    options = EngineOptions(max_step_tokens=chunk, max_running=min(chunk, 16))
    return Engine(ModelOptions(path=str(path)), cache, options)


def answers(engine: Engine, prompts: list[list[int]], name: str, new_tokens: int = NEW_TOKENS) -> list[list[int]]:
    """Greedy answers to prompts given at once."""
    requests = [make_request(f"{name}-{index}", prompt, max_tokens=new_tokens) for index, prompt in enumerate(prompts)]
    return [list(tokens_of(outputs)) for outputs in engine.generate(requests)]


@pytest.fixture(
    scope="module",
    params=[(family, tied) for family in CheckpointFamily for tied in (True, False)],
    ids=lambda value: f"{value[0].value}-{'tied' if value[1] else 'untied'}",
)
def checkpoint(request, tmp_path_factory):
    family, tied = request.param
    return make_checkpoint(tmp_path_factory.mktemp("model"), family, tied=tied, sharded=not tied)


@pytest.fixture(scope="module")
def judge(checkpoint):
    made = Judge.of(checkpoint)
    yield made
    made.verdict()


@pytest.mark.parametrize("chunk", [16, 100, 512])
def test_one_engine_alone_mixed_and_with_prefix_hits(checkpoint, judge, chunk):
    prompts = prompts_of(400)
    with engine_for(checkpoint, chunk) as engine:
        for index in (0, 4, 8):
            judge.check(prompts[index], answers(engine, [prompts[index]], f"alone{index}")[0])
        mixed = answers(engine, prompts, "mixed")
        for prompt, answer in zip(prompts, mixed, strict=True):
            judge.check(prompt, answer)
        before = engine.scheduler.stats().cached_tokens
        again = answers(engine, prompts, "again")
        assert engine.scheduler.stats().cached_tokens - before > 2500
        for prompt, answer in zip(prompts, again, strict=True):
            judge.check(prompt, answer)


def test_split(checkpoint, judge, tmp_path):
    prompts = prompts_of(400)
    with (
        Peer("p", checkpoint, tmp_path, num_blocks=320, max_step_tokens=64) as prefill,
        Peer("d", checkpoint, tmp_path, num_blocks=320, max_step_tokens=512) as decode,
    ):
        for repeat in range(2):
            for index, prompt in enumerate(prompts):
                request = make_request(f"split-{repeat}-{index}", prompt, max_tokens=NEW_TOKENS)
                judge.check(prompt, split_generate(prefill, decode, request))


def test_a_pool_too_small_for_all_preempts_and_stays_exact(checkpoint, judge):
    prompts = prompts_of(400, (60, 70, 80, 90))
    with engine_for(checkpoint, 64, num_blocks=30) as engine:
        for prompt, answer in zip(prompts, answers(engine, prompts, "tight", 60), strict=True):
            judge.check(prompt, answer)
        assert engine.scheduler.stats().preemptions > 0


@pytest.fixture(scope="module")
def demo_judge():
    made = Judge.of(demo_source().path)
    yield made
    made.verdict()


@pytest.mark.parametrize("chunk", [16, 512])
def test_the_demo_model_alone_and_mixed(demo_judge, chunk):
    prompts = prompts_of(49152, (1, 7, 16, 40, 150, 500))
    with engine_for(demo_source().path, chunk, num_blocks=128) as engine:
        for prompt, answer in zip(prompts, answers(engine, prompts, "demo", 12), strict=True):
            demo_judge.check(prompt, answer)


def test_the_demo_model_split_with_a_long_prompt(demo_judge, tmp_path):
    path = demo_source().path
    with (
        Peer("p", path, tmp_path, num_blocks=140, max_step_tokens=256) as prefill,
        Peer("d", path, tmp_path, num_blocks=140, max_step_tokens=64) as decode,
    ):
        for index, prompt in enumerate(prompts_of(49152, (3, 100, 2000))):
            request = make_request(f"demo-{index}", prompt, max_tokens=12)
            demo_judge.check(prompt, split_generate(prefill, decode, request))
