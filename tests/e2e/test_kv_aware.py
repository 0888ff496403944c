"""Conversations on two prefill and two decode workers: what is held somewhere is not computed again."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.config import CacheOptions, EngineOptions, ModelOptions
from engine.engine import Engine, tokens_of
from protos import inference_pb2 as pb
from router.config import RouterConfig
from router.local_prefill import LocalPrefillConfig
from tests.mini_cluster import MiniCluster, Shape
from tests.session_pair import make_request

NUM_TALKS, NUM_TURNS, ANSWER = 5, 8, 12


@pytest.fixture(scope="module")
def alone(tiny_llama: Path) -> Iterator[Callable[[list[int]], list[int]]]:
    cache = CacheOptions(block_size=16, num_blocks=256)
    with Engine(ModelOptions(path=str(tiny_llama)), cache, EngineOptions(max_step_tokens=64)) as engine:
        yield lambda prompt: list(tokens_of(engine.generate([make_request("x", prompt, max_tokens=ANSWER)])[0]))


def said(dice: random.Random, length: int) -> list[int]:
    return dice.choices(range(3, 400), k=length)


async def converse(cluster: MiniCluster, alone: Callable[[list[int]], list[int]]) -> None:
    """Talks in turn, each with the history of its own; all begin with the same words."""
    dice = random.Random(3)
    system = said(dice, 64)
    talks = [list(system) for _ in range(NUM_TALKS)]
    for _ in range(NUM_TURNS):
        dice.shuffle(talks)
        for talk in talks:
            talk += said(dice, 30)
            sampling = pb.Sampling(max_tokens=ANSWER, ignore_eos=True)
            answer = await cluster.generate(pb.GenerateRequest(token_ids=pb.TokenIds(ids=talk), sampling=sampling))
            assert answer.token_ids == alone(talk)
            talk += answer.token_ids
            await asyncio.sleep(0.02)  # a reader's pause; less than news of blocks may need


def computed_tokens(
    model: Path, directory: Path, alone: Callable[[list[int]], list[int]], **router: Any
) -> tuple[int, int]:
    """Prompt tokens that the cluster computed for the same conversations, and those of decode workers among them."""
    shape = Shape(
        model=ModelOptions(path=str(model)),
        num_prefill=2,
        num_decode=2,
        options=EngineOptions(max_step_tokens=64, max_running=32, prompt_share=0.25),
        router=RouterConfig(port=0, **router),
    )

    async def main() -> tuple[int, int]:
        async with MiniCluster(shape, directory) as cluster:
            await converse(cluster, alone)
            await cluster.until_idle()
            computed = {
                name: worker.front.link.stats.computed_tokens - worker.front.link.stats.generated_tokens
                for name, worker in cluster.workers.items()
            }
            return sum(computed.values()), sum(count for name, count in computed.items() if "decode" in name)

    return asyncio.run(main())


def test_conversations_are_computed_half_as_often_as_in_turn(
    tiny_llama: Path, tmp_path: Path, alone: Callable[[list[int]], list[int]]
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    aware, local = computed_tokens(tiny_llama, tmp_path / "a", alone)
    never = LocalPrefillConfig(max_share=0.0)
    in_turn, none = computed_tokens(tiny_llama, tmp_path / "b", alone, policy="round_robin", local_prefill=never)
    assert 2 * aware <= in_turn
    assert local > 0
    assert none <= 0, "a decode worker's first step is for a token that it was given"
