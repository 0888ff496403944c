"""The whole request path without Ray: router, fronts, engines, KV transfer, in one process."""

import asyncio
import random
import shutil

import grpc
import pytest

from engine.config import CacheOptions, EngineOptions, ModelOptions
from engine.engine import Engine, tokens_of
from protos import inference_pb2 as pb
from router.config import RouterConfig
from router.local_prefill import LocalPrefillConfig
from tests.mini_cluster import DEADLINE_S, Answer, MiniCluster, Shape
from tests.session_pair import make_request

VOCAB = 400


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed * 10_007 + length).choices(range(3, VOCAB), k=length)


def request_of(prompt: list[int], name: str = "", **sampling) -> pb.GenerateRequest:
    settings = {"max_tokens": 12, "ignore_eos": True} | sampling
    return pb.GenerateRequest(request_id=name, token_ids=pb.TokenIds(ids=prompt), sampling=pb.Sampling(**settings))


@pytest.fixture(scope="module")
def alone(tiny_llama):
    cache = CacheOptions(block_size=16, num_blocks=256)
    with Engine(ModelOptions(path=str(tiny_llama)), cache, EngineOptions(max_step_tokens=64)) as engine:
        yield lambda prompt, **params: list(tokens_of(engine.generate([make_request("x", prompt, **params)])[0]))


def run(shape: Shape, directory, scenario) -> None:
    """Start a cluster, run a scenario on it, and check that nothing is left."""

    async def main() -> None:
        async with MiniCluster(shape, directory) as cluster:
            await scenario(cluster)
            await cluster.until_idle()
            cluster.router.check_integrity()

    asyncio.run(main())


@pytest.mark.parametrize(("num_prefill", "num_decode", "colocated"), [(1, 1, False), (2, 1, False), (1, 2, True)])
def test_every_shape_gives_the_tokens_of_one_engine(tiny_llama, tmp_path, alone, num_prefill, num_decode, colocated):
    prompts = [prompt_of(length) for length in (1, 5, 16, 40, 150)]

    async def scenario(cluster: MiniCluster) -> None:
        answers = await asyncio.gather(*(cluster.generate(request_of(prompt)) for prompt in prompts))
        for prompt, answer in zip(prompts, answers, strict=True):
            assert answer.token_ids == alone(prompt)
            assert answer.finished.reason == pb.FINISH_REASON_LENGTH
            assert answer.finished.usage.prompt_tokens == len(prompt)
            assert answer.finished.usage.completion_tokens == 12
        sampled = await cluster.generate(request_of(prompts[3], temperature=1.0, seed=5))
        assert sampled.token_ids == alone(prompts[3], temperature=1.0, seed=5)

    shape = Shape(
        model=ModelOptions(path=str(tiny_llama)), num_prefill=num_prefill, num_decode=num_decode, colocated=colocated
    )
    run(shape, tmp_path, scenario)


def test_prompts_that_would_wait_are_computed_where_they_are_decoded(tiny_llama, tmp_path, alone):
    prompts = [prompt_of(100 + index, seed=index) for index in range(24)]
    rule = LocalPrefillConfig(max_share=0.5, short_tokens=0, when_waiting_s=0.0)
    shape = Shape(
        model=ModelOptions(path=str(tiny_llama)),
        cache=CacheOptions(block_size=16, num_blocks=256, prefix_caching=False),
        options=EngineOptions(max_step_tokens=64, max_running=32, prompt_share=0.25),
        router=RouterConfig(port=0, local_prefill=rule),
    )

    async def scenario(cluster: MiniCluster) -> None:
        async with asyncio.timeout(DEADLINE_S):
            local: list[bool] = []
            while not any(local):  # the first time the router may not know the worker's rate yet
                answers = await asyncio.gather(*(cluster.generate(request_of(prompt)) for prompt in prompts))
                for prompt, answer in zip(prompts, answers, strict=True):
                    assert answer.token_ids == alone(prompt)
                local += [answer.finished.prefill_worker == answer.finished.decode_worker for answer in answers]
        assert cluster.router.stats().local_prompt_tokens >= 100 * sum(local)
        assert sum(local) <= 0.5 * len(local) + 1

    run(shape, tmp_path, scenario)


def test_200_mixed_requests_a_third_of_them_cancelled(tiny_llama, tmp_path):
    dice = random.Random(7)
    shape = Shape(
        model=ModelOptions(path=str(tiny_llama)), num_prefill=2, cache=CacheOptions(block_size=16, num_blocks=160)
    )

    async def one(cluster: MiniCluster, index: int) -> str:
        prompt = prompt_of(dice.randint(1, 200), seed=index % 9)
        request = request_of(prompt, f"mix-{index}", max_tokens=dice.randint(1, 40), temperature=index % 2, seed=index)
        answer, call = Answer(), cluster.stub.Generate(request, timeout=120)
        cancel_after = dice.randint(0, 20) if index % 3 == 0 else None
        by_rpc = index % 2 == 0
        try:
            async for event in call:
                answer.take(event)
                if cancel_after is not None and len(answer.token_ids) >= cancel_after:
                    cancel_after = None
                    if by_rpc:
                        await cluster.stub.Cancel(pb.CancelRequest(request_id=f"mix-{index}"))
                    else:
                        call.cancel()
        except asyncio.CancelledError:
            return "cancelled"
        assert answer.finished is not None
        return pb.FinishReason.Name(answer.finished.reason)

    async def scenario(cluster: MiniCluster) -> None:
        endings = await asyncio.gather(*(one(cluster, index) for index in range(200)))
        assert endings.count("FINISH_REASON_LENGTH") >= 134
        assert "cancelled" in endings
        assert "FINISH_REASON_CANCELLED" in endings

    run(shape, tmp_path, scenario)


def test_logprobs_stop_tokens_and_usage(tiny_llama, tmp_path, alone):
    prompt = prompt_of(30)
    expected = alone(prompt)

    async def scenario(cluster: MiniCluster) -> None:
        answer = await cluster.generate(request_of(prompt, logprobs=3, stop_token_ids=[expected[4]]))
        stop = expected.index(expected[4]) + 1
        assert answer.token_ids == expected[:stop]
        assert answer.finished.reason == pb.FINISH_REASON_STOP
        assert [item.chosen.token_id for item in answer.logprobs] == expected[:stop]
        assert all(len(item.top) == 3 and item.top[0].logprob >= item.top[1].logprob for item in answer.logprobs)
        again = await cluster.generate(request_of(prompt))
        assert again.finished.usage.cached_prompt_tokens == 16
        timing = again.finished.timing
        assert timing.total_s > 0
        assert timing.transfer_bytes > 0
        parts = timing.queue_s + timing.prefill_s + timing.transfer_s + timing.first_decode_step_s + timing.decode_s
        assert parts == pytest.approx(timing.total_s, rel=0.5, abs=0.1)

    router = RouterConfig(port=0, local_prefill=LocalPrefillConfig(max_share=0.0))
    run(Shape(model=ModelOptions(path=str(tiny_llama)), router=router), tmp_path, scenario)


def test_a_decode_worker_that_loses_its_engine_link_is_replaced_without_a_gap(tiny_llama, tmp_path, alone):
    prompt = prompt_of(60)
    expected = alone(prompt, max_tokens=60)

    async def scenario(cluster: MiniCluster) -> None:
        answer, broken = Answer(), False
        async for event in cluster.stub.Generate(request_of(prompt, max_tokens=60), timeout=60):
            answer.take(event)
            if len(answer.token_ids) >= 5 and not broken:
                broken = True
                for worker in cluster.workers.values():
                    if worker.front.link.stats.num_running:
                        await worker.front.link.restart()
        assert broken
        assert answer.token_ids == expected

    run(Shape(model=ModelOptions(path=str(tiny_llama)), num_decode=2), tmp_path, scenario)


def test_a_prompt_over_the_limit_is_refused_at_once(tiny_llama, tmp_path):
    async def scenario(cluster: MiniCluster) -> None:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await cluster.generate(request_of(prompt_of(4097)))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "4097" in caught.value.details()

    run(Shape(model=ModelOptions(path=str(tiny_llama))), tmp_path, scenario)


def test_a_model_of_a_header_alone_takes_and_gives_token_ids(tiny_llama, tmp_path):
    header = tmp_path / "header"
    header.mkdir()
    shutil.copy(tiny_llama / "config.json", header)

    async def scenario(cluster: MiniCluster) -> None:
        answer = await cluster.generate(request_of(prompt_of(40)))
        assert (len(answer.token_ids), answer.text) == (12, "")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await cluster.generate(pb.GenerateRequest(text="Once upon a time"))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT

    run(Shape(model=ModelOptions(path=str(header), load_format="dummy")), tmp_path, scenario)
