"""Split answers are token for token a colocated cluster's, whichever way a prompt takes and whoever must wait."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from decode_pool.config import DecodeOptions
from engine.config import CacheOptions, ModelOptions
from protos import worker_pb2
from router.config import RouterConfig
from router.local_prefill import LocalPrefillConfig
from tests.e2e.test_mini_cluster import prompt_of, request_of
from tests.mini_cluster import Answer, MiniCluster, Shape

NUM_TALKS, SAID, ANSWER = 8, 40, 60
ROOMY, TIGHT = 256, 40
NEVER = LocalPrefillConfig(max_share=0.0)
HALF = LocalPrefillConfig(max_share=0.5, short_tokens=4096, max_load=1.0)
"""Half of all prompt tokens by decode workers, however many are missing there."""


@dataclass
class Told:
    """What a cluster answered, turn by turn, and what it took."""

    turns: list[list[Answer]]
    prefill: worker_pb2.WorkerStats | None
    decode: worker_pb2.WorkerStats
    local_prompt_tokens: int

    @property
    def tokens(self) -> list[list[list[int]]]:
        return [[answer.token_ids for answer in turn] for turn in self.turns]


async def converse(cluster: MiniCluster) -> list[list[Answer]]:
    """Two turns of all talks, each turn at once; every other talk is sampled."""
    histories = [prompt_of(SAID, seed=index) for index in range(NUM_TALKS)]
    turns: list[list[Answer]] = []
    for turn in range(2):
        settings = [{"temperature": 1.0, "top_k": 50, "seed": index} if index % 2 else {} for index in range(NUM_TALKS)]
        asked = (
            cluster.generate(request_of(history, max_tokens=ANSWER, **sampling))
            for history, sampling in zip(histories, settings, strict=True)
        )
        turns.append(list(await asyncio.gather(*asked)))
        for index, answer in enumerate(turns[-1]):
            histories[index] += [*answer.token_ids, *prompt_of(20, seed=100 * turn + index)]
    return turns


def told(model: Path, directory: Path, *, num_blocks: int = ROOMY, predicted: int = 256, **shape: Any) -> Told:
    made = Shape(
        model=ModelOptions(path=str(model)),
        cache=CacheOptions(block_size=16, num_blocks=num_blocks),
        decode=DecodeOptions(predicted_answer_tokens=predicted),
        **shape,
    )

    async def main() -> Told:
        async with MiniCluster(made, directory) as cluster:
            turns = await converse(cluster)
            await cluster.until_idle()
            cluster.router.check_integrity()
            stats = {name: worker.front.link.stats for name, worker in cluster.workers.items()}
            local = cluster.router.stats().local_prompt_tokens
            return Told(turns, stats.get("prefill-0"), stats["decode-0"], local)

    return asyncio.run(main())


def split(model: Path, directory: Path, local_prefill: LocalPrefillConfig, **shape: Any) -> Told:
    return told(model, directory, router=RouterConfig(port=0, local_prefill=local_prefill), **shape)


@pytest.fixture(scope="module")
def colocated(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Told:
    made = told(tiny_llama, tmp_path_factory.mktemp("colocated"), colocated=True)
    assert made.decode.preemptions == 0
    assert len({tuple(answer) for turn in made.tokens for answer in turn}) == 2 * NUM_TALKS
    return made


def test_where_the_decode_worker_holds_the_history(tiny_llama: Path, tmp_path: Path, colocated: Told) -> None:
    made = split(tiny_llama, tmp_path, NEVER)
    assert made.tokens == colocated.tokens
    assert made.local_prompt_tokens == 0
    first, second = (sum(answer.finished.timing.transfer_bytes for answer in turn) for turn in made.turns)
    assert made.decode.cached_tokens >= NUM_TALKS * SAID
    assert 0 < second < first, "the second prompt is three times as long, and most of it is there"


def test_where_the_decode_worker_computes_half_of_all_prompts(
    tiny_llama: Path, tmp_path: Path, colocated: Told
) -> None:
    made = split(tiny_llama, tmp_path, HALF)
    assert made.tokens == colocated.tokens
    all_tokens = sum(answer.finished.usage.prompt_tokens for turn in made.turns for answer in turn)
    assert 0.2 * all_tokens < made.local_prompt_tokens < 0.8 * all_tokens
    assert made.prefill.computed_tokens > 0


@pytest.mark.parametrize("local_prefill", [NEVER, HALF], ids=["split", "half local"])
def test_where_sequences_are_preempted(
    tiny_llama: Path, tmp_path: Path, colocated: Told, local_prefill: LocalPrefillConfig
) -> None:
    made = split(tiny_llama, tmp_path, local_prefill, num_blocks=TIGHT, predicted=0)
    assert made.tokens == colocated.tokens
    assert made.decode.preemptions > 0
    assert made.decode.cached_tokens > 0
    assert (made.local_prompt_tokens > 0) == (local_prefill is HALF)
