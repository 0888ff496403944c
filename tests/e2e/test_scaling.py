"""Pools of the real cluster grow, shrink, exchange workers and are renewed under load: nobody's answer changes."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.steady_load import Known, SteadyLoad
from tests.e2e.test_cluster import Cluster, all_free, take_down
from tests.e2e.test_mini_cluster import prompt_of, request_of

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

YAML = """
mode: split
model: {{path: {model}}}
cache: {{block_size: 16, num_blocks: 256}}
prefill: {{workers: 2, max_step_tokens: 64, max_running: 32}}
decode: {{workers: 2, max_step_tokens: 64, max_running: 32}}
router: {{port: 0, replicas: 2, no_worker_grace_s: 30}}
scaling: {{max_workers: 5, place_timeout_s: 5}}
drain_s: 20
move_after_s: 1
"""
NUM_CLIENTS = 4
SETTLE_S = 240.0


@pytest.fixture(scope="module")
def cluster(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("scaling"), tiny_llama, YAML)
    made.up()
    yield made
    take_down(made)


@pytest.fixture(scope="module")
def known(tiny_llama: Path) -> list[Known]:
    """Requests of all sizes, and what one engine alone answers."""
    from engine.config import CacheOptions, EngineOptions, ModelOptions
    from engine.engine import Engine, tokens_of
    from tests.session_pair import make_request

    dice, found = random.Random(7), []
    with Engine(ModelOptions(path=str(tiny_llama)), CacheOptions(block_size=16), EngineOptions()) as engine:
        for number in range(24):
            prompt, max_tokens = prompt_of(dice.randint(20, 250), seed=number), dice.randint(20, 200)
            (outputs,) = [engine.generate([make_request("x", prompt, max_tokens=max_tokens)])[0]]
            found.append(Known(request_of(prompt, max_tokens=max_tokens), list(tokens_of(outputs))))
    return found


def load(cluster: Cluster, known: list[Known]) -> SteadyLoad:
    return SteadyLoad(routers(cluster), known, NUM_CLIENTS)


def routers(cluster: Cluster) -> list[str]:
    return [it["address"] for name, it in cluster.members().items() if name.startswith("router")]


def workers(cluster: Cluster) -> dict[str, dict]:
    return {name: it for name, it in cluster.members().items() if not name.startswith("router")}


def roles(cluster: Cluster) -> list[str]:
    return sorted(it["role"] for it in workers(cluster).values())


def until(condition: Callable[[], bool], what: str, timeout_s: float = SETTLE_S) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.2)


def do(cluster: Cluster, *command: str) -> str:
    """A command of the console that must succeed."""
    done = cluster.pdserve(*command, timeout_s=SETTLE_S)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def history(cluster: Cluster) -> list[dict]:
    return [json.loads(line) for line in do(cluster, "history", "--json").splitlines()]


def test_pools_exchange_workers_grow_and_shrink(cluster: Cluster, known: list[Known]) -> None:
    epochs = {name: it["epoch"] for name, it in workers(cluster).items()}
    with load(cluster, known) as steady:
        for sizes in (("prefill=1", "decode=3"), ("prefill=3", "decode=1"), ("prefill=2", "decode=2")):
            do(cluster, "scale", *sizes)
            steady.until_answered(NUM_CLIENTS)
            wanted = {pair.partition("=")[0]: int(pair.partition("=")[2]) for pair in sizes}
            assert roles(cluster) == ["decode"] * wanted["decode"] + ["prefill"] * wanted["prefill"]
        assert {name: it["epoch"] for name, it in workers(cluster).items()} == epochs, "none of them was started anew"
        do(cluster, "scale", "decode=3")
        steady.until_answered(NUM_CLIENTS)
        do(cluster, "scale", "decode=1")
        steady.until_answered(NUM_CLIENTS)
        assert roles(cluster) == ["decode", "prefill", "prefill"]
        do(cluster, "scale", "decode=2")
    cluster.until(all_free)
    assert any(" is decode now" in entry["what"] for entry in history(cluster))


def test_every_process_is_renewed_one_after_the_other(cluster: Cluster, known: list[Known]) -> None:
    before = {name: (it["epoch"], it["address"], it["metrics_address"]) for name, it in cluster.members().items()}
    with load(cluster, known) as steady:
        do(cluster, "restart", "all")
        steady.until_answered(2 * NUM_CLIENTS)
    after = {name: (it["epoch"], it["address"], it["metrics_address"]) for name, it in cluster.members().items()}
    assert not set(before.values()) & set(after.values())
    assert len(after) == len(before)
    cluster.until(all_free)


def test_a_controller_killed_in_the_midst_of_a_change_ends_it_when_it_is_back(
    cluster: Cluster, known: list[Known]
) -> None:
    with load(cluster, known) as steady:
        do(cluster, "scale", "prefill=1", "decode=4", "--no-wait")
        time.sleep(0.5)
        killed = cluster.process("controller.log")
        killed.kill()
        steady.until_answered(NUM_CLIENTS)
        do(cluster, "scale", "prefill=2", "decode=3")
        assert cluster.process("controller.log").pid != killed.pid
        assert roles(cluster) == ["decode"] * 3 + ["prefill"] * 2
        steady.until_answered(NUM_CLIENTS)
        do(cluster, "scale", "decode=2")
    cluster.until(all_free)


def test_what_has_no_room_leaves_the_fleet_serving_and_the_budget_kept(cluster: Cluster, known: list[Known]) -> None:
    refused = cluster.pdserve("scale", "prefill=2", "decode=5")
    assert refused.returncode == 1
    assert "max_workers (5)" in refused.stderr
    text = cluster.yaml.read_text()
    before = {name: it["epoch"] for name, it in workers(cluster).items()}
    try:
        with load(cluster, known) as steady:
            cluster.yaml.write_text(text.replace("decode: {workers: 2,", "decode: {workers: 2, resources: {none: 1},"))
            do(cluster, "apply", "-f", str(cluster.yaml), "--no-wait")
            until(lambda: "no node with room" in cluster.pdserve("status").stdout, "what is missing is named")
            steady.until_answered(NUM_CLIENTS)
            assert {name: it["epoch"] for name, it in workers(cluster).items() if it["epoch"]} == before
            cluster.yaml.write_text(text)
            do(cluster, "apply", "-f", str(cluster.yaml))
            steady.until_answered(NUM_CLIENTS)
        assert {name: it["epoch"] for name, it in workers(cluster).items()} == before
    finally:
        cluster.yaml.write_text(text)
    cluster.until(all_free)


def test_changed_settings_are_applied_and_bad_ones_refused(cluster: Cluster, known: list[Known]) -> None:
    text = cluster.yaml.read_text()
    try:
        with load(cluster, known) as steady:
            cluster.yaml.write_text(text.replace("max_running: 32}", "max_runing: 16}"))
            refused = cluster.pdserve("apply", "-f", str(cluster.yaml))
            assert refused.returncode != 0
            assert "max_running" in refused.stderr
            assert ":5" in refused.stderr
            steady.until_answered(NUM_CLIENTS)
            cluster.yaml.write_text(
                text.replace("drain_s: 20", "drain_s: 21").replace("64, max_running: 32", "48, max_running: 16")
            )
            assert "drain" in cluster.pdserve("plan-diff", "-f", str(cluster.yaml)).stdout
            do(cluster, "apply", "-f", str(cluster.yaml))
            steady.until_answered(NUM_CLIENTS)
        cluster.until(all_free)
        assert "nothing" in cluster.pdserve("plan-diff", "-f", str(cluster.yaml)).stdout.lower()
    finally:
        cluster.yaml.write_text(text)
