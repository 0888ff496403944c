"""The real cluster, split: prompts from a worker of one rank to one of two, each rank a process that Ray starts."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.test_cluster import Cluster, all_free, alone, ask, ask_as_alone, take_down, with_stub
from tests.e2e.test_mini_cluster import prompt_of, request_of

__all__ = ["alone"]
pytestmark = [pytest.mark.cluster, pytest.mark.slow]

YAML = """
mode: split
model: {{path: {model}}}
cache: {{block_size: 16, num_blocks: 256}}
prefill: {{workers: 1, device: cpu, max_step_tokens: 64, max_running: 8}}
decode: {{workers: 1, tensor_parallel: 2, device: cpu, max_step_tokens: 64, max_running: 8, rank_timeout_s: 10}}
router: {{port: 0, no_worker_grace_s: 40}}
drain_s: 10
"""


@pytest.fixture(scope="module")
def cluster(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("ranks"), tiny_llama, YAML)
    made.up()
    yield made
    take_down(made)


def test_two_ranks_answer_as_one_and_a_killed_one_costs_no_token(cluster: Cluster, alone) -> None:
    prompts = [prompt_of(length) for length in (1, 20, 200)]
    before = cluster.members()["decode-0"]["epoch"]

    async def scenario(stub) -> None:
        await ask_as_alone(stub, alone, prompts)
        long = asyncio.create_task(ask(stub, request_of(prompts[1], max_tokens=300)))
        await asyncio.sleep(0.3)
        cluster.process("decode-0-engine1.log").send_signal(signal.SIGKILL)
        assert (await long).token_ids == alone(prompts[1], max_tokens=300)

    with_stub(cluster, scenario)
    cluster.until(lambda members: members["decode-0"]["state"] == "ready" and members["decode-0"]["epoch"] > before)
    cluster.until(all_free)


def test_sigterm_at_any_rank_drains_the_worker_and_all_ranks_start_again(cluster: Cluster, alone) -> None:
    prompt = prompt_of(30)
    before = cluster.members()["decode-0"]["epoch"]

    async def scenario(stub) -> None:
        running = asyncio.create_task(ask(stub, request_of(prompt, max_tokens=100)))
        await asyncio.sleep(0.2)
        cluster.process("decode-0-engine1.log").send_signal(signal.SIGTERM)
        assert (await running).token_ids == alone(prompt, max_tokens=100)

    with_stub(cluster, scenario)
    cluster.until(lambda members: members["decode-0"]["state"] == "ready" and members["decode-0"]["epoch"] > before)
