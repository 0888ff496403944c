"""The real cluster, started by the command line: Ray, Valkey, router, two workers of each role."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import grpc
import psutil
import pytest

from engine.config import CacheOptions, EngineOptions, ModelOptions
from engine.engine import Engine, tokens_of
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc
from tests.e2e.test_mini_cluster import prompt_of, request_of
from tests.mini_cluster import Answer
from tests.session_pair import make_request

pytestmark = pytest.mark.cluster

UP_S = 240
RECOVERY_S = 60.0
YAML = """
model: {{path: {model}}}
cache: {{block_size: 16, num_blocks: 256}}
prefill: {{workers: 2, max_step_tokens: 64, max_running: 32}}
decode: {{workers: 2, max_step_tokens: 64, max_running: 32}}
router: {{port: 0, no_worker_grace_s: 30}}
drain_s: 10
move_after_s: 0.2
"""


class Cluster:
    """A cluster of its own run directory, driven as a user drives it."""

    def __init__(self, directory: Path, model: Path, yaml: str = YAML) -> None:
        self.run_dir = directory / "run"
        self.yaml = directory / "cluster.yaml"
        self.yaml.write_text(yaml.format(model=model))
        self.env = {**os.environ, "PDSERVE_RUN_DIR": str(self.run_dir)}

    def pdserve(self, *arguments: str, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
        command = [str(Path(sys.executable).with_name("pdserve")), *arguments]
        return subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=timeout_s)

    def up(self) -> None:
        started = self.pdserve("up", "-f", str(self.yaml), timeout_s=UP_S)
        assert started.returncode == 0, started.stdout + started.stderr
        self.address = self.status()["members"][-1]["address"]

    def status(self) -> dict:
        return json.loads(self.pdserve("status", "--json").stdout)

    def members(self) -> dict[str, dict]:
        return {member["member_id"]: member for member in self.status()["members"]}

    def process(self, log_name: str) -> psutil.Process:
        """The process that writes this log of ours."""
        path = str(self.run_dir / "logs" / log_name)
        for process in psutil.process_iter():
            try:
                if any(item.path == path for item in process.open_files()):
                    return process
            except psutil.Error:
                continue
        raise AssertionError(f"no process writes {path}")

    def until(self, condition: Callable[[dict[str, dict]], bool], timeout_s: float = RECOVERY_S) -> dict[str, dict]:
        end = time.monotonic() + timeout_s
        while not condition(members := self.members()):
            assert time.monotonic() < end, f"it did not happen in {timeout_s} s: {members}"
            time.sleep(0.2)
        return members


@pytest.fixture(scope="module")
def cluster(tiny_llama, tmp_path_factory):
    made = Cluster(tmp_path_factory.mktemp("cluster"), tiny_llama)
    made.up()
    yield made
    take_down(made)


def take_down(cluster: Cluster) -> None:
    down = cluster.pdserve("down", timeout_s=120)
    assert down.returncode == 0, down.stderr
    left = [process for process in psutil.process_iter() if belongs(process, cluster.run_dir)]
    assert not left, f"processes left behind: {left}"


def belongs(process: psutil.Process, run_dir: Path) -> bool:
    try:
        return str(run_dir) in process.environ().get("RAY_AUTH_TOKEN_PATH", "") or any(
            str(run_dir) in word for word in process.cmdline()
        )
    except psutil.Error:
        return False


@pytest.fixture(scope="module")
def alone(tiny_llama):
    cache = CacheOptions(block_size=16, num_blocks=256)
    with Engine(ModelOptions(path=str(tiny_llama)), cache, EngineOptions(max_step_tokens=64)) as engine:
        yield lambda prompt, **params: list(tokens_of(engine.generate([make_request("x", prompt, **params)])[0]))


async def ask(
    stub: inference_pb2_grpc.InferenceStub, request: pb.GenerateRequest, begun: asyncio.Event | None = None
) -> Answer:
    """The whole answer; `begun` is set with its first token."""
    answer = Answer()
    async for event in stub.Generate(request, timeout=120):
        answer.take(event)
        if begun is not None and answer.token_ids:
            begun.set()
    return answer


async def until_it_is_chosen(stub: inference_pb2_grpc.InferenceStub, decode_worker: str) -> None:
    """Ask until this worker has generated an answer: one that has just come back gets its share from now on."""
    async with asyncio.timeout(RECOVERY_S):
        for seed in itertools.count(1_000_000, 2):
            prompts = [prompt_of(25, seed=seed), prompt_of(25, seed=seed + 1)]
            answers = await asyncio.gather(*(ask(stub, request_of(prompt)) for prompt in prompts))
            if any(answer.finished.decode_worker.startswith(f"{decode_worker}/") for answer in answers):
                return


async def ask_as_alone(stub: inference_pb2_grpc.InferenceStub, alone, prompts: list[list[int]]) -> None:
    """All prompts at once, and one of them sampled: the tokens are those of one engine."""
    answers = await asyncio.gather(*(ask(stub, request_of(prompt)) for prompt in prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.token_ids == alone(prompt)
    sampled = await ask(stub, request_of(prompts[1], temperature=1.0, top_k=50, seed=3))
    assert sampled.token_ids == alone(prompts[1], temperature=1.0, top_k=50, seed=3)


def with_stub(cluster: Cluster, scenario):
    async def main():
        async with grpc.aio.insecure_channel(cluster.address) as channel:
            return await scenario(inference_pb2_grpc.InferenceStub(channel))

    return asyncio.run(main())


def all_free(members: dict[str, dict]) -> bool:
    workers = [item["numbers"] for name, item in members.items() if not name.startswith("router")]
    return all(
        numbers and numbers["free_blocks"] == numbers["num_blocks"] and not numbers["open_tickets"]
        for numbers in workers
    )


def test_pairs_are_made_before_the_first_request(cluster):
    def paired(members: dict[str, dict]) -> bool:
        pairs = members["prefill-0"].get("pairs", [])
        return any(
            pair["receiver"].startswith("decode-0/") and pair["state"] == "ready" and pair["bytes_per_s"] > 0
            for pair in pairs
        )

    members = cluster.until(paired)
    assert members["prefill-0"]["numbers"]["steps_total"] == 0
    assert not members["decode-0"]["pairs"], "nobody sends from there"
    assert "decode-0/" in cluster.pdserve("status").stdout


def test_answers_are_those_of_one_engine(cluster, alone):
    prompts = [prompt_of(length) for length in (1, 20, 200)]

    async def scenario(stub) -> None:
        await ask_as_alone(stub, alone, prompts)

    with_stub(cluster, scenario)


def test_200_mixed_requests_a_third_of_them_cancelled(cluster):
    dice = random.Random(11)

    async def one(stub, index: int) -> str:
        request = request_of(prompt_of(dice.randint(1, 150), seed=index % 7), max_tokens=dice.randint(1, 30))
        cancel_after = dice.randint(0, 15) if index % 3 == 0 else None
        answer, call = Answer(), stub.Generate(request, timeout=120)
        try:
            async for event in call:
                answer.take(event)
                if cancel_after is not None and len(answer.token_ids) >= cancel_after:
                    call.cancel()
        except asyncio.CancelledError:
            return "cancelled"
        assert answer.finished is not None
        return "finished"

    async def scenario(stub) -> None:
        endings = await asyncio.gather(*(one(stub, index) for index in range(200)))
        assert endings.count("finished") >= 133
        assert endings.count("cancelled") > 20

    with_stub(cluster, scenario)
    cluster.until(all_free)


def test_a_killed_decode_engine_costs_no_stream_a_token(cluster, alone):
    prompts = [prompt_of(30, seed=index) for index in range(6)]
    before = cluster.members()["decode-0"]["epoch"]

    async def scenario(stub) -> None:
        asked = [asyncio.create_task(ask(stub, request_of(prompt, max_tokens=300))) for prompt in prompts]
        await asyncio.sleep(0.3)
        cluster.process("decode-0-engine0.log").send_signal(signal.SIGKILL)
        for prompt, answer in zip(prompts, await asyncio.gather(*asked), strict=True):
            assert answer.token_ids == alone(prompt, max_tokens=300)

    with_stub(cluster, scenario)
    cluster.until(lambda members: members["decode-0"]["state"] == "ready" and members["decode-0"]["epoch"] > before)
    cluster.until(all_free)


@pytest.mark.parametrize("log_name", ["prefill-0-engine0.log", "prefill-1-front.log"])
def test_a_killed_prefill_process_fails_nobody_and_comes_back(cluster, alone, log_name):
    worker = log_name.partition("-engine")[0].partition("-front")[0]
    before = cluster.members()[worker]["epoch"]
    prompts = [prompt_of(180, seed=index) for index in range(12)]

    async def scenario(stub) -> None:
        asked = [asyncio.create_task(ask(stub, request_of(prompt, max_tokens=5))) for prompt in prompts]
        cluster.process(log_name).send_signal(signal.SIGKILL)
        for prompt, answer in zip(prompts, await asyncio.gather(*asked), strict=True):
            assert answer.token_ids == alone(prompt, max_tokens=5)

    with_stub(cluster, scenario)
    cluster.until(lambda members: members[worker]["state"] == "ready" and members[worker]["epoch"] > before)


@pytest.mark.parametrize(
    ("log_names", "first_seed"), [(["front"], 40), (["engine0"], 50), (["front", "engine0"], 60)], ids=str
)
def test_sigterm_drains_a_worker_and_what_it_generates_goes_on_elsewhere(cluster, alone, log_names, first_seed):
    """As a pod that is stopped gets it, all its processes at once; nobody has failed, not even for the router.

    Each time with prompts that no worker has seen, so that both decode workers get some.
    """
    prompts = [prompt_of(25, seed=seed) for seed in range(first_seed, first_seed + 6)]
    before = cluster.until(lambda members: all(item["state"] == "ready" for item in members.values()))
    processes = [cluster.process(f"decode-1-{name}.log") for name in log_names]

    async def scenario(stub) -> None:
        await until_it_is_chosen(stub, "decode-1")
        begun = [asyncio.Event() for _ in prompts]
        requests = [request_of(prompt, max_tokens=650) for prompt in prompts]
        asked = [asyncio.create_task(ask(stub, *each)) for each in zip(requests, begun, strict=True)]
        async with asyncio.timeout(RECOVERY_S):
            await asyncio.gather(*(event.wait() for event in begun))
        for process in processes:
            process.send_signal(signal.SIGTERM)
        for prompt, answer in zip(prompts, await asyncio.gather(*asked), strict=True):
            assert answer.token_ids == alone(prompt, max_tokens=650)

    with_stub(cluster, scenario)
    after = cluster.until(
        lambda members: (
            members["decode-1"]["epoch"] > before["decode-1"]["epoch"] and members["decode-1"]["state"] == "ready"
        )
    )
    numbers = [members["router-0"]["numbers"] for members in (before, after)]
    assert numbers[0]["failed_attempts_total"] == numbers[1]["failed_attempts_total"]
    assert numbers[0]["moved_total"] < numbers[1]["moved_total"]


def test_a_killed_registry_is_started_again_and_no_stream_notices(cluster, alone):
    prompt = prompt_of(25, seed=6)

    async def scenario(stub) -> None:
        asked = asyncio.create_task(ask(stub, request_of(prompt, max_tokens=300)))
        await asyncio.sleep(0.2)
        state = json.loads((cluster.run_dir / "state.json").read_text())
        os.kill(state["valkey"]["pid"], signal.SIGKILL)
        assert (await asked).token_ids == alone(prompt, max_tokens=300)
        assert (await ask(stub, request_of(prompt))).token_ids == alone(prompt)

    with_stub(cluster, scenario)
    cluster.until(lambda members: all(item["state"] == "ready" for item in members.values()))


def test_a_second_up_is_refused_and_harms_nothing(cluster):
    second = cluster.pdserve("up", "-f", str(cluster.yaml))
    assert second.returncode == 1
    assert "pdserve down" in second.stderr
    assert cluster.status()["health"] == "ready"


def test_metrics_and_logs_carry_what_they_should_and_no_secret(cluster):
    logs = cluster.run_dir / "logs"
    pages = {member["member_id"]: member["metrics_address"] for member in cluster.status()["members"]}
    pages["supervisor"] = json.loads((cluster.run_dir / "state.json").read_text())["metrics_address"]
    for name in ("controller", "prefill-0-engine0"):
        lines = [json.loads(line) for line in (logs / f"{name}.log").read_text().splitlines()]
        pages[name] = next(line["metrics"] for line in reversed(lines) if "metrics" in line)
    for address in pages.values():
        assert "pdserve_" in urllib.request.urlopen(f"http://{address}/metrics", timeout=10).read().decode()
    router = urllib.request.urlopen(f"http://{pages['router-0']}/metrics", timeout=10).read().decode()
    assert 'pdserve_router_outcomes_total{outcome="length"}' in router
    for name in ("router-0-router", "prefill-0-front", "prefill-0-engine0", "decode-0-front", "decode-0-engine0"):
        assert any(json.loads(line).get("request_id") for line in (logs / f"{name}.log").read_text().splitlines())
    secrets = [path.read_text().strip() for path in (cluster.run_dir / "secrets").iterdir() if path.is_file()]
    assert len(secrets) >= 3
    for log in (cluster.run_dir / "logs").iterdir():
        text = log.read_text(errors="replace")
        assert not any(secret in text for secret in secrets), f"{log} shows a secret"
