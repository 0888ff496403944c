"""Requests that outlive their stream, on a whole cluster in one process with one or two routers."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field

import grpc
import pytest

from decode_pool.config import DecodeOptions
from engine.config import EngineOptions, ModelOptions
from protos import inference_pb2 as pb
from router.config import ResumeConfig, RouterConfig
from router.local_prefill import LocalPrefillConfig
from tests.mini_cluster import DEADLINE_S, Answer, MiniCluster, Shape

NUM_TOKENS = 120
PROMPT = "A prompt of some length, so that there is something to compute and to hand over."


@dataclass
class Reading:
    """What a client has of a stream, over all calls that brought it."""

    answer: Answer = field(default_factory=Answer)

    async def read(self, call, limit: int | None = None) -> None:
        """Take events until the end, or until so many tokens are there; then let the call go."""
        self.answer.accepted = None
        async for event in call:
            self.answer.take(event)
            if limit is not None and len(self.answer.token_ids) >= limit:
                call.cancel()
                return

    @property
    def num_tokens(self) -> int:
        return len(self.answer.token_ids)


def request_of(name: str = "r", num: int = NUM_TOKENS, **sampling) -> pb.GenerateRequest:
    settings = {"max_tokens": num, "ignore_eos": True} | sampling
    return pb.GenerateRequest(request_id=name, text=PROMPT, sampling=pb.Sampling(**settings), resumable=True)


def resume(stub, name: str, offset: int):
    return stub.Resume(pb.ResumeRequest(request_id=name, next_offset=offset), timeout=DEADLINE_S)


def generate(stub, request: pb.GenerateRequest):
    return stub.Generate(request, timeout=DEADLINE_S)


async def status_of(call) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    return caught.value.code(), caught.value.details() or ""


async def until(condition, what: str) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110 (conditions of several parties)
            await asyncio.sleep(0.01)
    assert condition(), what


def shape_of(model, **changes) -> Shape:
    never = LocalPrefillConfig(max_share=0.0)
    router = RouterConfig(port=0, resume=changes.pop("resume", ResumeConfig()), local_prefill=never)
    return Shape(
        model=ModelOptions(path=str(model)),
        options=EngineOptions(max_step_tokens=64, max_running=32, overlap=changes.pop("overlap", "auto")),
        router=router,
        **changes,
    )


def run(shape: Shape, directory, scenario) -> None:
    async def main() -> None:
        async with MiniCluster(shape, directory) as cluster:
            await scenario(cluster)
            await cluster.until_idle()
            cluster.router.check_integrity()

    asyncio.run(main())


def generated(cluster: MiniCluster) -> int:
    """Tokens that decode workers have generated."""
    return sum(
        worker.host.engine.scheduler.stats().generated_tokens
        for name, worker in cluster.workers.items()
        if name.startswith("decode")
    )


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("colocated", [False, True], ids=["split", "colocated"])
def test_a_client_that_comes_back_misses_nothing(tiny_llama, tmp_path, sampling, colocated):
    async def scenario(cluster: MiniCluster) -> None:
        whole = Reading()
        await whole.read(generate(cluster.stub, request_of("whole", seed=7, **sampling)))
        reading = Reading()
        await reading.read(generate(cluster.stub, request_of("r", seed=7, **sampling)), limit=5)
        for limit in (20, 50, None):
            await reading.read(resume(cluster.stub, "r", reading.num_tokens), limit)
        assert reading.answer.token_ids == whole.answer.token_ids
        assert reading.answer.text == whole.answer.text
        assert reading.answer.finished.usage.completion_tokens == NUM_TOKENS
        assert cluster.router.stats().outcomes == {"length": 2}

    run(shape_of(tiny_llama, colocated=colocated), tmp_path, scenario)


@pytest.mark.parametrize("overlap", ["off", "on"])
def test_another_router_goes_on_with_it_and_nothing_is_generated_twice(tiny_llama, tmp_path, overlap):
    async def scenario(cluster: MiniCluster) -> None:
        whole = Reading()
        await whole.read(generate(cluster.stub, request_of("whole", num=400)))
        other, stub = await cluster.add_router("router-1")
        await until(lambda: other.stats().workers.get("ready") == 2, "the second router knows the workers")
        before = generated(cluster)
        reading = Reading()
        await reading.read(generate(cluster.stub, request_of("r", num=400)), limit=3)
        await reading.read(resume(stub, "r", reading.num_tokens))
        assert reading.answer.token_ids == whole.answer.token_ids
        assert reading.answer.text == whole.answer.text
        assert generated(cluster) - before == 400 - 1  # the prompt's own token is the prefill worker's
        await until(lambda: cluster.router.stats().in_flight == 0, "the first router has let it go")
        assert cluster.router.stats().outcomes == {"length": 1, "aborted": 1}
        assert other.stats().outcomes == {"length": 1}

    run(shape_of(tiny_llama, overlap=overlap), tmp_path, scenario)


def test_a_stream_that_is_read_is_cut_off_when_another_router_takes_it_over(tiny_llama, tmp_path):
    async def scenario(cluster: MiniCluster) -> None:
        other, stub = await cluster.add_router("router-1")
        await until(lambda: other.stats().workers.get("ready") == 2, "the second router knows the workers")
        first = Reading()
        reading = asyncio.create_task(status_of(generate(cluster.stub, request_of("r", num=1000))))
        await until(lambda: generated(cluster) > 5, "it generates")
        await first.read(resume(stub, "r", 0))
        code, message = await reading
        assert code is grpc.StatusCode.ABORTED, message
        assert first.num_tokens == 1000

    run(shape_of(tiny_llama), tmp_path, scenario)


def test_a_router_that_stops_leaves_it_to_another(tiny_llama, tmp_path):
    async def scenario(cluster: MiniCluster) -> None:
        whole = Reading()
        await whole.read(generate(cluster.stub, request_of("whole", num=1500)))
        leaving, stub = await cluster.add_router("router-1")
        await until(lambda: leaving.stats().workers.get("ready") == 2, "the second router knows the workers")
        before = generated(cluster)
        reading = Reading()
        await reading.read(generate(stub, request_of("r", num=1500)), limit=3)
        await leaving.stop()
        await reading.read(resume(cluster.stub, "r", reading.num_tokens))
        assert reading.answer.token_ids == whole.answer.token_ids
        assert generated(cluster) - before == 1500 - 1

    run(shape_of(tiny_llama), tmp_path, scenario)


def test_a_worker_that_lost_it_too_costs_only_time(tiny_llama, tmp_path):
    """No grace at the worker: the answer is computed again from its seed."""

    async def scenario(cluster: MiniCluster) -> None:
        whole = Reading()
        await whole.read(generate(cluster.stub, request_of("whole", num=600, seed=3, temperature=1.0)))
        leaving, stub = await cluster.add_router("router-1")
        await until(lambda: leaving.stats().workers.get("ready") == 2, "the second router knows the workers")
        reading = Reading()
        await reading.read(generate(stub, request_of("r", num=600, seed=3, temperature=1.0)), limit=3)
        await leaving.stop()
        await cluster.until_idle()
        await reading.read(resume(cluster.stub, "r", reading.num_tokens))
        assert reading.answer.token_ids == whole.answer.token_ids
        assert reading.answer.text == whole.answer.text

    run(shape_of(tiny_llama, decode=DecodeOptions(orphan_grace_s=0.0)), tmp_path, scenario)


def test_what_no_worker_could_end_goes_on_when_there_is_one(tiny_llama, tmp_path):
    async def scenario(cluster: MiniCluster) -> None:
        whole = Reading()
        await whole.read(generate(cluster.stub, request_of("whole", num=900, seed=3, temperature=1.0)))
        reading, lost = Reading(), asyncio.Event()

        async def read() -> None:
            call = generate(cluster.stub, request_of("r", num=900, seed=3, temperature=1.0))
            with contextlib.suppress(grpc.aio.AioRpcError):
                async for event in call:
                    reading.answer.take(event)
                    if reading.num_tokens > 5:
                        lost.set()
            assert await call.code() is grpc.StatusCode.UNAVAILABLE

        task = asyncio.create_task(read())
        await lost.wait()
        await cluster.workers.pop("decode-0").front.stop()
        await task
        await cluster.add_worker("decode-1", "decode")
        await until(lambda: cluster.router.stats().workers.get("ready") == 2, "the router knows the new worker")
        await reading.read(resume(cluster.stub, "r", reading.num_tokens))
        assert reading.answer.token_ids == whole.answer.token_ids
        assert reading.answer.text == whole.answer.text

    run(shape_of(tiny_llama), tmp_path, scenario)


def test_what_nobody_follows_ends(tiny_llama, tmp_path):
    async def scenario(cluster: MiniCluster) -> None:
        reading = Reading()
        await reading.read(generate(cluster.stub, request_of("r", num=1900)), limit=2)
        await until(lambda: cluster.router.stats().in_flight == 0, "the request ends")
        assert cluster.router.stats().outcomes == {"cancelled": 1}
        code, _ = await status_of(resume(cluster.stub, "r", 2))
        assert code is grpc.StatusCode.CANCELLED

    run(shape_of(tiny_llama, resume=ResumeConfig(grace_s=0.2)), tmp_path, scenario)


def test_the_same_request_again_attaches_and_replays(tiny_llama, tmp_path):
    async def scenario(cluster: MiniCluster) -> None:
        other, stub = await cluster.add_router("router-1")
        await until(lambda: other.stats().workers.get("ready") == 2, "the second router knows the workers")
        first, again, replayed, elsewhere = Reading(), Reading(), Reading(), Reading()
        await first.read(generate(cluster.stub, request_of("r")), limit=10)
        await again.read(generate(cluster.stub, request_of("r")))
        await replayed.read(generate(cluster.stub, request_of("r")))
        await elsewhere.read(generate(stub, request_of("r")))
        assert again.num_tokens == NUM_TOKENS
        for reading in (replayed, elsewhere):
            assert reading.answer.token_ids == again.answer.token_ids
            assert reading.answer.text == again.answer.text
        assert cluster.router.stats().outcomes == {"length": 1}
        for router in (cluster.stub, stub):
            code, message = await status_of(generate(router, request_of("r", num=5)))
            assert code is grpc.StatusCode.ALREADY_EXISTS
            assert "'r'" in message

    run(shape_of(tiny_llama), tmp_path, scenario)


@pytest.mark.parametrize("at_another", [False, True])
def test_calls_that_come_at_once_are_one_request(tiny_llama, tmp_path, at_another):
    async def scenario(cluster: MiniCluster) -> None:
        other, stub = await cluster.add_router("router-1")
        await until(lambda: other.stats().workers.get("ready") == 2, "the second router knows the workers")
        if at_another:
            await Reading().read(generate(cluster.stub, request_of("r", num=700)), limit=3)
            calls = [resume(stub, "r", 0) for _ in range(4)]
        else:
            calls = [generate(stub, request_of("r", num=700)) for _ in range(4)]

        async def read(call) -> int:
            reading = Reading()
            with contextlib.suppress(grpc.aio.AioRpcError):
                await reading.read(call)
            code = await call.code()
            assert code is (grpc.StatusCode.OK if reading.answer.finished is not None else grpc.StatusCode.ABORTED)
            return reading.num_tokens if reading.answer.finished is not None else 0

        assert sorted(await asyncio.gather(*map(read, calls))) == [0, 0, 0, 700]
        assert other.stats().outcomes == {"length": 1}

    run(shape_of(tiny_llama), tmp_path, scenario)


def test_errors_say_what_is_wrong(tiny_llama, tmp_path):
    async def scenario(cluster: MiniCluster) -> None:
        code, message = await status_of(resume(cluster.stub, "nobody", 0))
        assert code is grpc.StatusCode.NOT_FOUND
        assert "resumable" in message
        reading = Reading()
        await reading.read(generate(cluster.stub, request_of("r", num=6)))
        code, message = await status_of(resume(cluster.stub, "r", -1))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "next_offset" in message
        code, message = await status_of(resume(cluster.stub, "r", 7))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "has 6 tokens" in message
        await status_of(generate(cluster.stub, request_of("bad", top_p=7.0)))
        last = Reading()
        async for event in resume(cluster.stub, "r", 6):  # all that is left is the last word
            last.answer.take(event)
        assert last.answer.token_ids == []
        assert last.answer.finished.usage.completion_tokens == 6

    run(shape_of(tiny_llama), tmp_path, scenario)


def test_a_call_that_follows_cuts_the_one_before_off(tiny_llama, tmp_path):
    async def scenario(cluster: MiniCluster) -> None:
        reading = asyncio.create_task(status_of(generate(cluster.stub, request_of("r", num=800))))
        await until(lambda: generated(cluster) > 5, "it generates")
        second = Reading()
        await second.read(resume(cluster.stub, "r", 0))
        assert (await reading)[0] is grpc.StatusCode.ABORTED
        assert second.num_tokens == 800

    run(shape_of(tiny_llama), tmp_path, scenario)


def test_cancel_ends_a_resumable_request(tiny_llama, tmp_path):
    async def scenario(cluster: MiniCluster) -> None:
        reading = Reading()
        await reading.read(generate(cluster.stub, request_of("r", num=1900)), limit=2)
        assert (await cluster.stub.Cancel(pb.CancelRequest(request_id="r"))).found
        with contextlib.suppress(AssertionError):
            await reading.read(resume(cluster.stub, "r", reading.num_tokens))
        assert reading.answer.finished.reason == pb.FINISH_REASON_CANCELLED

    run(shape_of(tiny_llama), tmp_path, scenario)
