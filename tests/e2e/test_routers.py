"""Two routers of the real cluster: what one loses the other goes on with."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
from dataclasses import dataclass, field

import grpc
import pytest

from protos import inference_pb2 as pb
from protos import inference_pb2_grpc
from tests.e2e.test_cluster import Cluster, all_free, alone, take_down
from tests.e2e.test_mini_cluster import prompt_of, request_of
from tests.mini_cluster import Answer

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

__all__ = ["alone"]
RESUME_S = 3.0
GAP_S = 1.0
"""No stream waits for the registry; what it may wait for is the machine, which starts the registry again meanwhile."""
SLACK = 5
NUM_TOKENS = 1200
YAML = """
model: {{path: {model}}}
cache: {{block_size: 16, num_blocks: 1024}}
prefill: {{workers: 1, max_step_tokens: 64, max_running: 32}}
decode: {{workers: 2, max_step_tokens: 64, max_running: 32}}
router: {{port: 0, replicas: 2, no_worker_grace_s: 30, local_prefill: {{max_share: 0}}}}
drain_s: 10
"""


@pytest.fixture(scope="module")
def cluster(tiny_llama, tmp_path_factory):
    made = Cluster(tmp_path_factory.mktemp("routers"), tiny_llama, YAML)
    made.up()
    yield made
    take_down(made)


@dataclass
class Reading:
    """A stream that goes on at another router when its own is lost."""

    answer: Answer = field(default_factory=Answer)
    stalls_s: list[float] = field(default_factory=list)
    """From the loss of a stream to the next token."""

    async def read(self, request: pb.GenerateRequest, addresses: list[str]) -> Answer:
        async with contextlib.AsyncExitStack() as stack:
            stubs = []
            for address in addresses:
                channel = await stack.enter_async_context(grpc.aio.insecure_channel(address))
                stubs.append(inference_pb2_grpc.InferenceStub(channel))
            call, lost_at, place = stubs[0].Generate(request, timeout=120), 0.0, 0
            while self.answer.finished is None:
                try:
                    async for event in call:
                        if lost_at and event.WhichOneof("event") == "tokens":
                            self.stalls_s.append(time.monotonic() - lost_at)
                            lost_at = 0.0
                        self.answer.take(event)
                except grpc.aio.AioRpcError as error:
                    if error.code() is not grpc.StatusCode.UNAVAILABLE:
                        raise
                    lost_at, place = lost_at or time.monotonic(), place + 1
                    self.answer.accepted = None
                    await asyncio.sleep(0.05 if place > len(stubs) else 0.0)
                    resume = pb.ResumeRequest(request_id=request.request_id, next_offset=len(self.answer.token_ids))
                    call = stubs[place % len(stubs)].Resume(resume, timeout=120)
            return self.answer


def addresses(cluster: Cluster) -> list[str]:
    members = cluster.members()
    return [members[name]["address"] for name in ("router-0", "router-1")]


def resumable(name: str, index: int) -> tuple[pb.GenerateRequest, dict]:
    sampling = {"max_tokens": NUM_TOKENS} | ({"temperature": 1.0, "seed": index} if index % 2 else {})
    request = request_of(prompt_of(30, seed=index), f"{name}-{index}", **sampling)
    request.resumable = True
    return request, sampling


def generated(cluster: Cluster) -> int:
    return sum(
        member["numbers"]["generated_tokens_total"]
        for name, member in cluster.members().items()
        if name.startswith("decode")
    )


def killed_mid_stream(cluster: Cluster, alone, name: str, targets: list[str], log_name: str) -> list[Reading]:
    """Six streams; the process that writes this log is killed when all have begun."""
    readings = [Reading() for _ in range(6)]

    async def main() -> None:
        asked = [resumable(name, index) for index in range(6)]
        reading = [
            asyncio.create_task(one.read(request, targets)) for one, (request, _) in zip(readings, asked, strict=True)
        ]
        process = cluster.process(log_name)
        async with asyncio.timeout(60):
            while not all(len(one.answer.token_ids) > 3 for one in readings):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        for answer, (request, sampling) in zip(await asyncio.gather(*reading), asked, strict=True):
            assert answer.token_ids == alone(list(request.token_ids.ids), **sampling)
            assert answer.finished.usage.completion_tokens == NUM_TOKENS

    asyncio.run(main())
    return readings


def test_both_routers_serve(cluster, alone):
    async def main() -> None:
        for address in addresses(cluster):
            async with grpc.aio.insecure_channel(address) as channel:
                answer = Answer()
                async for event in inference_pb2_grpc.InferenceStub(channel).Generate(request_of(prompt_of(20))):
                    answer.take(event)
                assert answer.token_ids == alone(prompt_of(20))

    asyncio.run(main())


def test_a_killed_router_costs_no_stream_a_token_where_another_goes_on(cluster, alone):
    before = generated(cluster)
    readings = killed_mid_stream(cluster, alone, "router", addresses(cluster), "router-0-router.log")
    stalls = [stall for one in readings for stall in one.stalls_s]
    assert len(stalls) == 6, "every stream was lost once, and went on"
    assert max(stalls) < RESUME_S * SLACK
    print(f"\nfrom the loss to the next token at the other router: {max(stalls):.2f} s at most")
    cluster.until(all_free)
    cluster.until(lambda members: members["router-0"]["state"] == "ready")
    assert generated(cluster) - before == 6 * (NUM_TOKENS - 1), "something was generated twice"


def test_a_killed_router_goes_on_itself_when_it_is_back(cluster, alone):
    killed_mid_stream(cluster, alone, "alone", addresses(cluster)[:1], "router-0-router.log")
    cluster.until(all_free)


def test_a_registry_killed_under_load_is_noticed_by_no_stream(cluster, alone):
    async def main() -> None:
        async def one(index: int, begin_s: float) -> tuple[float, Answer, pb.GenerateRequest, dict]:
            await asyncio.sleep(begin_s)
            request, sampling = resumable(f"registry-{begin_s:g}", index)
            request.resumable = index % 3 == 0
            last, longest = 0.0, 0.0
            answer = Answer()
            async with grpc.aio.insecure_channel(addresses_now[index % 2]) as channel:
                async for event in inference_pb2_grpc.InferenceStub(channel).Generate(request, timeout=120):
                    answer.take(event)
                    now = time.monotonic()
                    longest = max(longest, now - last if last else 0.0)
                    last = now
            return longest, answer, request, sampling

        addresses_now = addresses(cluster)
        running = [asyncio.create_task(one(index, 0.0)) for index in range(6)]
        await asyncio.sleep(0.5)
        state = json.loads((cluster.run_dir / "state.json").read_text())
        os.kill(state["valkey"]["pid"], signal.SIGKILL)
        later = [asyncio.create_task(one(index, 0.1 + 0.1 * index)) for index in range(6)]
        outcomes = await asyncio.gather(*running, *later)
        for _, answer, request, sampling in outcomes:
            assert answer.token_ids == alone(list(request.token_ids.ids), **sampling)
        longest = max(outcome[0] for outcome in outcomes)
        print(f"\nlongest gap of a stream: {longest:.2f} s")
        assert longest < GAP_S * SLACK

    asyncio.run(main())
    cluster.until(lambda members: all(item["state"] == "ready" for item in members.values()))
    cluster.until(all_free)
