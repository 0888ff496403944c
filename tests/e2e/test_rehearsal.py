"""A cluster of paced workers: what clients get, what they are told, and that capacity grows with workers."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from engine.config import EngineOptions, ModelOptions
from engine.pace import PaceOptions
from protos import inference_pb2 as pb
from tests.mini_cluster import MiniCluster, Shape

STEP_S = 0.04
AT_ONCE, REQUESTS, TOKENS = 4, 16, 16
TRIES = 3


def request(number: int) -> pb.GenerateRequest:
    prompt = pb.TokenIds(ids=[number + 20, 7, 9])
    return pb.GenerateRequest(token_ids=prompt, sampling=pb.Sampling(max_tokens=TOKENS, ignore_eos=True))


def shape(model: Path, num: int) -> Shape:
    options = EngineOptions(max_step_tokens=64, max_running=AT_ONCE, pace=PaceOptions(fixed_ms=STEP_S * 1e3))
    return Shape(model=ModelOptions(path=str(model)), colocated=True, num_decode=num, options=options)


def test_capacity_grows_with_workers_and_clients_know_that_they_are_paced(tiny_llama: Path, tmp_path: Path) -> None:
    async def tokens_per_s(num: int) -> float:
        directory = tmp_path / str(num)
        directory.mkdir()
        async with MiniCluster(shape(tiny_llama, num), directory) as cluster:
            best = 0.0
            for _ in range(TRIES if num > 1 else 1):
                began = time.monotonic()
                answers = await asyncio.gather(*(cluster.generate(request(number)) for number in range(REQUESTS)))
                best = max(best, REQUESTS * TOKENS / (time.monotonic() - began))
                assert all(len(answer.token_ids) == TOKENS for answer in answers)
            (model,) = (await cluster.stub.ListModels(pb.ListModelsRequest())).models
            assert model.paced
            assert all(worker["paced"] for worker in cluster.router.status()["workers"])
            await cluster.until_idle()
            return best

    one, two = asyncio.run(tokens_per_s(1)), asyncio.run(tokens_per_s(2))
    assert one <= AT_ONCE / STEP_S
    assert two >= 1.5 * one
