"""Ray's own autoscaler brings and lets go the nodes of each pool, as the load asks for it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster import pool
from cluster.client import Client, Endpoint
from cluster.load import Length, LoadProfile, LoadResult, run_load
from tests.e2e.test_cluster import Cluster
from tests.fake_nodes import FakeNodes, NodeKind, fake_nodes, living_kinds, ray_driver, until

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

MODEL = Path(__file__).parents[2] / "deploy" / "examples" / "rehearsal-model"
KINDS = {
    "prefill-node": NodeKind(resources={"prefill_slot": 1}, max_nodes=2),
    "decode-node": NodeKind(labels={"example.com/memory": "fast"}, resources={"decode_slot": 1}, max_nodes=2),
}
YAML = """
mode: split
model: {{path: {model}, load_format: dummy}}
cache: {{block_size: 16, num_blocks: 2048}}
prefill:
  device: cpu
  num_cpus: 0.5
  resources: {{prefill_slot: 1}}
  max_step_tokens: 512
  pace: {{fixed_ms: 2, prompt_token_us: 1000}}
decode:
  device: cpu
  num_cpus: 0.5
  resources: {{decode_slot: 1}}
  labels: {{example.com/memory: fast}}
  max_running: 4
  pace: {{fixed_ms: 40}}
router: {{port: 0, local_prefill: {{max_share: 0}}}}
scaling:
  mode: "on"
  interval_s: 1
  prefill: {{max: 2}}
  decode: {{max: 2}}
  grow_pause_s: 2
  shrink_pause_s: 6
  start_s: 5
  place_timeout_s: 60
ray: {{address: ADDRESS}}
drain_s: 5
move_after_s: 1
"""
GROW_S = 90.0
SHRINK_S = 90.0
BASE = ["decode-node", "prefill-node"]


@pytest.fixture(scope="module")
def nodes() -> Iterator[FakeNodes]:
    with fake_nodes(KINDS) as running:
        yield running


@contextmanager
def loaded(cluster: Cluster, profile: LoadProfile) -> Iterator[list[LoadResult]]:
    """The load runs beside what is done in here; its result is there afterwards."""
    results: list[LoadResult] = []

    async def run() -> LoadResult:
        async with Client(Endpoint(address=cluster.address)) as client:
            return await run_load(client, profile)

    thread = threading.Thread(target=lambda: results.append(asyncio.run(run())), name="load")
    thread.start()
    try:
        yield results
    finally:
        thread.join(120.0)
    assert not thread.is_alive()


def profile(prompt: int, answer: int, concurrency: int) -> LoadProfile:
    return LoadProfile(
        concurrency=concurrency, duration_s=30.0, input_len=Length(mean=prompt), output_len=Length(mean=answer)
    )


@pytest.mark.timeout(600)
def test_each_pool_grows_and_shrinks_with_its_own_load_and_its_nodes_with_it(nodes: FakeNodes, tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, MODEL, YAML.replace("ADDRESS", nodes.address))
    cluster.env |= nodes.environment
    with ray_driver(nodes, pool.NAMESPACE) as driver:
        assert driver(living_kinds) == []
        cluster.up()
        try:
            assert driver(living_kinds) == BASE
            for load, grown in (
                (profile(20, 60, concurrency=12), ["decode-node", *BASE]),
                (profile(1000, 4, concurrency=6), [*BASE, "prefill-node"]),
            ):
                with loaded(cluster, load) as results:
                    until(lambda grown=grown: driver(living_kinds) == grown, f"nodes {grown}", GROW_S, nodes)
                assert not [record.failure_message for record in results[0].records if record.failure]
                until(lambda: driver(living_kinds) == BASE, "the nodes that nobody needs are let go", SHRINK_S, nodes)
        finally:
            down = cluster.pdserve("down", timeout_s=120)
        assert down.returncode == 0, down.stderr
        until(lambda: driver(living_kinds) == [], "all nodes are let go", SHRINK_S, nodes)
