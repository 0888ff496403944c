"""Places and actors of workers on a real Ray, whose autoscaler brings two kinds of nodes: small actors stand in."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster import pool
from cluster.config import ClusterConfig, PoolConfig, to_plain
from cluster.placement import WorkerPlan, plan_worker
from cluster.run_dir import RunDir
from engine.config import ModelOptions
from tests.cluster import standins
from tests.fake_nodes import Driver, FakeNodes, NodeKind, fake_nodes, living_kinds, ray_driver, until

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

KINDS = {
    "prefill-node": NodeKind(resources={"accelerator_type:H200": 1}),
    "decode-node": NodeKind(labels={"example.com/memory": "fast"}),
}
CONFIG = ClusterConfig(
    model=ModelOptions(path="demo", name="standin"),
    prefill=PoolConfig(device="cpu", accelerator_type="H200"),
    decode=PoolConfig(device="cpu", tensor_parallel=2, num_cpus=0.5, labels={"example.com/memory": "in(fast, hbm)"}),
)
ANYWHERE = WorkerPlan("decode-9", "decode", "decode", ({"CPU": 0.1}, {"CPU": 0.5}), 1)
NOWHERE = WorkerPlan("prefill-9", "prefill", "prefill", ({"CPU": 0.1}, {"CPU": 1.0}), 1, {"kind": "none-such"})
CLASSES = pool.ActorClasses(
    standins.EngineActor, standins.FrontActor, standins.RouterActor, standins.WorkerSpec, standins.RouterSpec
)
NODE_S = 60.0
CALL_S = 20.0
AT_ONCE_S = 1.0


@pytest.fixture(scope="module")
def nodes() -> Iterator[FakeNodes]:
    with fake_nodes(KINDS) as running:
        yield running


@pytest.fixture(scope="module")
def driver(nodes: FakeNodes) -> Iterator[Driver]:
    with ray_driver(nodes, pool.NAMESPACE) as call:
        yield call


def create(plan: WorkerPlan, run_dir: str) -> list[dict[str, Any]]:
    """What each of a worker's actors says once it is ready, its front first; in the driver."""
    around = pool.Surroundings(config=to_plain(CONFIG), run_dir=run_dir, redis_url="")
    return ready(pool.create_worker(plan, CLASSES, around))


def find(plan: WorkerPlan) -> list[dict[str, Any]] | None:
    """The same of those that are there; None if one is missing."""
    names = [pool.engine_name(plan.worker_id, rank) for rank in range(len(plan.bundles) - 1)]
    try:
        front, *engines = [
            ray.get_actor(name, namespace=pool.NAMESPACE) for name in (pool.front_name(plan.worker_id), *names)
        ]
    except ValueError:
        return None
    return ready(pool.WorkerHandles(front, tuple(engines)))


def is_placed(plan: WorkerPlan) -> bool:
    return pool.node_of(plan.worker_id) is not None


def remove(plan: WorkerPlan) -> None:
    pool.remove_worker(plan.worker_id, len(plan.bundles) - 1)


def ready(handles: pool.WorkerHandles) -> list[dict[str, Any]]:
    return ray.get([actor.ready.remote() for actor in (handles.front, *handles.engines)], timeout=CALL_S)


def kind_of(plan: WorkerPlan) -> str | None:
    node_id = pool.node_of(plan.worker_id)
    return next((node["Labels"].get("kind", "head") for node in ray.nodes() if node["NodeID"] == node_id), None)


def remove_front(plan: WorkerPlan) -> None:
    pool.remove_actor(pool.front_name(plan.worker_id))


def places() -> list[str]:
    table = ray.util.placement_group_table()
    return sorted(place["name"] for place in table.values() if place["state"] != "REMOVED")


def test_each_pool_brings_up_its_kind_of_node_and_lets_it_go_alone(
    nodes: FakeNodes, driver: Driver, tmp_path: Path
) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.create()
    prefill = plan_worker(CONFIG, "prefill", "prefill-0", on_gpu=False)
    decode = plan_worker(CONFIG, "decode", "decode-0", on_gpu=False)
    assert driver(living_kinds) == []

    driver(pool.ask_place, prefill)
    until(lambda: driver(is_placed, prefill), "a place for prefill-0", NODE_S, nodes)
    assert driver(living_kinds) == ["prefill-node"]
    prefill_pids = [actor["pid"] for actor in driver(create, prefill, str(tmp_path))]

    driver(pool.ask_place, decode)
    until(lambda: driver(is_placed, decode), "a place for decode-0", NODE_S, nodes)
    assert driver(living_kinds) == ["decode-node", "prefill-node"]
    assert (driver(kind_of, prefill), driver(kind_of, decode)) == ("prefill-node", "decode-node")
    decode_pids = [actor["pid"] for actor in driver(create, decode, str(tmp_path))]
    assert len({*prefill_pids, *decode_pids}) == 2 + 3

    driver(remove, prefill)
    until(lambda: driver(living_kinds) == ["decode-node"], "the idle prefill node goes", NODE_S, nodes)
    assert [actor["pid"] for actor in driver(find, decode)] == decode_pids, "the other pool has noticed nothing"
    driver(remove, decode)
    until(lambda: driver(living_kinds) == [], "the idle decode node goes", NODE_S, nodes)


def test_nothing_waits_for_a_place_that_no_node_has(driver: Driver, tmp_path: Path) -> None:
    start = time.monotonic()
    driver(pool.ask_place, NOWHERE)
    assert driver(pool.node_of, NOWHERE.worker_id) is None
    assert not driver(is_placed, NOWHERE)
    with pytest.raises(pool.PlacementError, match=r"no node with room for worker prefill-9.*'kind': 'none-such'"):
        driver(create, NOWHERE, str(tmp_path))
    driver(remove, NOWHERE)
    assert driver(places) == []
    assert driver(living_kinds) == []
    assert time.monotonic() - start < 5 * AT_ONCE_S


def test_a_worker_is_made_found_completed_and_removed_any_number_of_times(
    nodes: FakeNodes, driver: Driver, tmp_path: Path
) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.create()
    assert driver(find, ANYWHERE) is None
    driver(remove, ANYWHERE)
    for _ in range(2):
        driver(pool.ask_place, ANYWHERE)
    until(lambda: driver(is_placed, ANYWHERE), "a place on the head", CALL_S, nodes)
    assert driver(places) == ["pdserve/decode-9"]
    assert driver(kind_of, ANYWHERE) == "head"

    made = driver(create, ANYWHERE, str(tmp_path))
    assert driver(create, ANYWHERE, str(tmp_path)) == driver(find, ANYWHERE) == made
    driver(remove_front, ANYWHERE)
    until(lambda: driver(find, ANYWHERE) is None, "a worker without its front is not found", CALL_S, nodes)
    completed = driver(create, ANYWHERE, str(tmp_path))
    assert completed[0]["pid"] != made[0]["pid"]
    assert completed[1] == made[1]

    for _ in range(2):
        driver(remove, ANYWHERE)
    assert driver(places) == []
    driver(pool.ask_place, ANYWHERE)
    until(lambda: driver(is_placed, ANYWHERE), "a place for its next life", CALL_S, nodes)
    again = driver(create, ANYWHERE, str(tmp_path))
    assert not {actor["pid"] for actor in again} & {actor["pid"] for actor in completed}
    driver(remove, ANYWHERE)
