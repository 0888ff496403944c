"""Processes of the real cluster are killed under a steady load: no stream loses a token, repeats one or hangs.

Every prompt is its own, so prefill workers always have work; half of the answers are sampled with a seed.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import re
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import psutil
import pytest

from protos import inference_pb2 as pb
from protos import inference_pb2_grpc
from tests.e2e.test_cluster import Cluster, all_free, ask, take_down, with_stub
from tests.e2e.test_mini_cluster import prompt_of, request_of
from tests.mini_cluster import Answer
from tests.router.harness import Refusal

pytestmark = pytest.mark.cluster

NUM_STREAMS = 16
NUM_REQUESTS = 32
SEED = 16000
"""No draw of these answers lies within 7e-6 of the next token's share, and no two largest logits within 1e-4: closer
than 1e-7, rounding decides, and it depends on who else is in the batch."""
LOAD_S = 120.0
MAX_STALL_S = 5 * 3.0
REFUSED_WITHIN_S = 5 * 1.0
YAML = """
mode: split
model: {{path: {model}}}
cache: {{block_size: 16, num_blocks: 256}}
prefill: {{workers: 2, max_step_tokens: 64, max_running: 32}}
decode: {{workers: 2, max_step_tokens: 64, max_running: 32}}
router: {{port: 0, local_prefill: {{max_share: 0}}}}
drain_s: 10
"""


@pytest.fixture(scope="module")
def cluster(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("killed"), tiny_llama, YAML)
    made.up()
    yield made
    take_down(made)


def requests() -> list[pb.GenerateRequest]:
    """More than all prefix caches hold, so that a prompt that comes again is computed again."""
    dice = random.Random(SEED)
    sampled = {"temperature": 1.0, "top_k": 50}
    return [
        request_of(
            prompt_of(dice.randint(250, 350), seed=SEED + index),
            max_tokens=dice.randint(100, 160),
            **({**sampled, "seed": SEED + index} if index % 2 else {}),
        )
        for index in range(NUM_REQUESTS)
    ]


@dataclass
class Heard:
    """One stream, and the longest that nothing was heard of it."""

    index: int
    asked_at: float
    answer: Answer = field(default_factory=Answer)
    stall_s: float = 0.0


async def listen(
    stub: inference_pb2_grpc.InferenceStub, index: int, request: pb.GenerateRequest, on_begun: Callable[[], None]
) -> Heard:
    heard = Heard(index, last := time.monotonic())
    async for event in stub.Generate(request, timeout=120):
        begun = bool(heard.answer.token_ids)
        heard.answer.take(event)
        if heard.answer.token_ids and not begun:
            on_begun()
        now = time.monotonic()
        heard.stall_s, last = max(heard.stall_s, now - last), now
    assert heard.answer.finished is not None
    return heard


class Load:
    """NUM_STREAMS clients, each of which asks the next request when its last was answered."""

    def __init__(self, stub: inference_pb2_grpc.InferenceStub, kill_when: int) -> None:
        self._stub = stub
        self._next = itertools.cycle(enumerate(requests()))
        self._kill_when = kill_when
        self._num_begun = 0
        self._time_to_kill = asyncio.Event()
        self._killed_at: float | None = None

    async def around(self, victims: list[Victim]) -> tuple[list[Heard], Victim]:
        """Everything heard of a load in whose midst the first victim is killed that has work."""
        async with asyncio.timeout(LOAD_S), asyncio.TaskGroup() as group:
            clients = [group.create_task(self._client()) for _ in range(NUM_STREAMS)]
            await self._time_to_kill.wait()
            busy = itertools.cycle(victims)
            while not await asyncio.to_thread((victim := next(busy)).works):
                pass
            victim.process.send_signal(signal.SIGKILL)
            self._killed_at = time.monotonic()
        return [heard for client in clients for heard in client.result()], victim

    async def _client(self) -> list[Heard]:
        """Ask until one answer was begun after the kill."""
        heard: list[Heard] = []
        while self._killed_at is None or heard[-1].asked_at < self._killed_at:
            index, request = next(self._next)
            heard.append(await listen(self._stub, index, request, self._begun))
        return heard

    def _begun(self) -> None:
        self._num_begun += 1
        if self._num_begun >= self._kill_when:
            self._time_to_kill.set()


@dataclass
class Victim:
    """A process that may be killed, and where its worker says what it does."""

    worker: str
    process: psutil.Process
    metrics_address: str

    @classmethod
    def of(cls, cluster: Cluster, members: dict[str, dict], worker: str, part: str) -> Victim:
        return cls(worker, cluster.process(f"{worker}-{part}.log"), members[worker]["metrics_address"])

    def works(self) -> bool:
        page = urllib.request.urlopen(f"http://{self.metrics_address}/metrics", timeout=10).read().decode()
        return any(
            float(number) > 0 for number in re.findall(r"^pdserve_worker_num_running (\S+)$", page, re.MULTILINE)
        )


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster) -> list[list[int]]:
    """What the cluster answers to each request while nothing happens to it."""
    answers: list[list[int]] = []

    async def scenario(stub: inference_pb2_grpc.InferenceStub) -> None:
        asked = requests()
        while asked:
            some, asked = asked[:NUM_STREAMS], asked[NUM_STREAMS:]
            answers.extend(each.token_ids for each in await asyncio.gather(*(ask(stub, request) for request in some)))

    with_stub(cluster, scenario)
    return answers


def failed_attempts(members: dict[str, dict]) -> float:
    return members["router-0"]["numbers"]["failed_attempts_total"]


def ready(members: dict[str, dict]) -> bool:
    return all(member["state"] == "ready" for member in members.values())


def back(members: dict[str, dict], before: dict[str, dict], worker: str) -> bool:
    """Whether all are ready, and this one lives another life than before."""
    return ready(members) and members[worker]["epoch"] > before[worker]["epoch"]


@pytest.mark.parametrize(
    ("pool", "part", "kill_when"),
    [("decode", "engine0", NUM_STREAMS), ("prefill", "engine0", 2), ("decode", "front", NUM_STREAMS)],
)
def test_no_stream_of_a_steady_load_is_harmed(
    cluster: Cluster, undisturbed: list[list[int]], pool: str, part: str, kill_when: int
) -> None:
    """A prefill worker is killed when prompts wait, a decode worker when every client has had a token."""
    before = cluster.until(ready)
    victims = [Victim.of(cluster, before, f"{pool}-{index}", part) for index in range(2)]

    async def scenario(stub: inference_pb2_grpc.InferenceStub) -> tuple[list[Heard], Victim]:
        return await Load(stub, kill_when).around(victims)

    everything, victim = with_stub(cluster, scenario)
    assert len(everything) >= 2 * NUM_STREAMS
    for heard in everything:
        assert heard.answer.token_ids == undisturbed[heard.index]
        assert heard.answer.finished.reason == pb.FINISH_REASON_LENGTH
    assert max(heard.stall_s for heard in everything) <= MAX_STALL_S
    after = cluster.until(lambda members: back(members, before, victim.worker) and all_free(members))
    assert failed_attempts(after) > failed_attempts(before), "nobody felt the loss"


def test_a_role_without_workers_is_unavailable_until_one_is_back(
    cluster: Cluster, undisturbed: list[list[int]]
) -> None:
    before = cluster.until(ready)
    workers = ("decode-0", "decode-1")

    async def scenario(stub: inference_pb2_grpc.InferenceStub) -> None:
        async def refused(request: pb.GenerateRequest) -> float:
            began = time.monotonic()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await ask(stub, request)
            refusal = Refusal.of(caught.value)
            assert refusal.code is grpc.StatusCode.UNAVAILABLE
            assert "no decode worker is ready" in refusal.message
            assert refusal.retry_after_s is not None
            return time.monotonic() - began

        for process in [cluster.process(f"{worker}-engine0.log") for worker in workers]:
            process.send_signal(signal.SIGKILL)
        waits = await asyncio.gather(*(refused(request) for request in requests()[:NUM_STREAMS]))
        assert max(waits) <= REFUSED_WITHIN_S

    with_stub(cluster, scenario)
    cluster.until(lambda members: all(back(members, before, worker) for worker in workers) and all_free(members))

    async def again(stub: inference_pb2_grpc.InferenceStub) -> None:
        for index, request in enumerate(requests()[:2]):
            assert (await ask(stub, request)).token_ids == undisturbed[index]

    with_stub(cluster, again)
