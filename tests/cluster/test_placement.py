"""Placement: what each worker reserves, and when it fits."""

from __future__ import annotations

import pytest

from cluster.config import ClusterConfig, PoolConfig
from cluster.placement import (
    FRONT_CPUS,
    LEAST_CPUS,
    auto_on_gpu,
    gpus_of,
    logical_cpus,
    plan_worker,
    rank_bundle,
    shortage,
    total,
    wanted_workers,
)
from cluster.scaling_config import PoolLimits, ScalingConfig
from engine.config import ModelOptions

MODEL = ModelOptions(path="demo")


def config(prefill: int, decode: int, mode: str = "split", **pool: object) -> ClusterConfig:
    kinds = {name: PoolConfig(workers=count, **pool) for name, count in (("prefill", prefill), ("decode", decode))}
    return ClusterConfig(model=MODEL, mode=mode, **kinds)


@pytest.mark.parametrize(("prefill", "decode"), [(1, 1), (2, 1), (1, 3)])
def test_split_has_a_worker_per_place_with_its_role(prefill: int, decode: int) -> None:
    plans = wanted_workers(config(prefill, decode), gpus=0)
    expected = [(f"prefill-{i}", "prefill") for i in range(prefill)] + [
        (f"decode-{i}", "decode") for i in range(decode)
    ]
    assert [(plan.worker_id, plan.role) for plan in plans] == expected
    assert all(plan.bundles == ({"CPU": FRONT_CPUS}, {"CPU": 1.0}) for plan in plans)
    assert not shortage(total(plans, 2), {"CPU": float(logical_cpus(config(prefill, decode)))})


def test_colocated_starts_the_decode_pool_alone_and_each_worker_does_both() -> None:
    plans = wanted_workers(config(4, 2, mode="colocated"), gpus=0)
    assert [(plan.worker_id, plan.pool, plan.role) for plan in plans] == [
        ("decode-0", "decode", "both"),
        ("decode-1", "decode", "both"),
    ]


def test_a_worker_of_several_ranks_has_a_bundle_for_each() -> None:
    plans = wanted_workers(config(0, 2, mode="colocated", tensor_parallel=4), gpus=8)
    assert [plan.bundles for plan in plans] == [({"CPU": FRONT_CPUS}, *[{"CPU": 1.0, "GPU": 1.0}] * 4)] * 2
    assert "GPU" not in total(wanted_workers(config(0, 2, mode="colocated", tensor_parallel=4), gpus=7), 1)


def test_each_rank_on_a_gpu_reserves_one_and_its_threads() -> None:
    plans = wanted_workers(config(1, 1, threads=3, device="cuda"), gpus=2)
    assert [plan.bundles[1:] for plan in plans] == [({"CPU": 3.0, "GPU": 1.0},)] * 2
    assert total(plans, 1)["GPU"] == 2


def test_device_auto_takes_gpus_only_where_there_is_one_for_every_rank() -> None:
    assert total(wanted_workers(config(1, 1), gpus=2), 1).get("GPU") == 2
    assert "GPU" not in total(wanted_workers(config(1, 1), gpus=1), 1)


def test_what_the_yaml_names_comes_first() -> None:
    pool = PoolConfig(threads=4, num_cpus=0.5, num_gpus=0.25, device="cpu", resources={"nic": 1, "none": 0})
    assert rank_bundle(pool, enough_gpus=False) == {"CPU": 0.5, "GPU": 0.25, "nic": 1}


def test_shortage_names_what_is_needed_and_there() -> None:
    assert shortage({"CPU": 2.5, "GPU": 1.0}, {"CPU": 4.0}) == ["GPU: 1 needed, 0 there"]


def test_one_more_worker_is_planned_as_those_of_its_pool_are() -> None:
    wish = config(1, 1, tensor_parallel=2)
    assert plan_worker(wish, "decode", "decode-0", on_gpu=True) == wanted_workers(wish, gpus=4)[1]
    later = plan_worker(wish, "prefill", "prefill-7", on_gpu=True)
    assert (later.worker_id, later.pool, later.role, gpus_of(later)) == ("prefill-7", "prefill", "prefill", 2.0)
    assert gpus_of(plan_worker(wish, "prefill", "prefill-7", on_gpu=False)) == 0.0
    assert plan_worker(config(1, 1, mode="colocated"), "decode", "decode-3", on_gpu=False).role == "both"


def test_device_auto_is_settled_by_what_the_yaml_wants() -> None:
    wish = config(2, 1, tensor_parallel=2)
    assert (auto_on_gpu(wish, 6), auto_on_gpu(wish, 5)) == (True, False)
    assert auto_on_gpu(config(2, 1, mode="colocated"), 1)


def test_an_accelerator_type_is_reserved_as_ray_itself_does_and_means_a_gpu() -> None:
    pool = PoolConfig(accelerator_type="H200")
    assert rank_bundle(pool, enough_gpus=False) == {"CPU": 1.0, "GPU": 1.0, "accelerator_type:H200": 0.001}
    rehearsal = PoolConfig(accelerator_type="H200", device="cpu")
    assert rank_bundle(rehearsal, enough_gpus=True) == {"CPU": 1.0, "accelerator_type:H200": 0.001}


def test_each_pool_has_labels_of_its_own() -> None:
    prefill, decode = PoolConfig(labels={"market": "!spot"}), PoolConfig()
    wish = ClusterConfig(model=MODEL, prefill=prefill, decode=decode)
    assert [plan.labels for plan in wanted_workers(wish, gpus=0)] == [{"market": "!spot"}, {}]


def scaled(prefill_max: int, decode_max: int, **kinds: PoolConfig) -> ClusterConfig:
    limits = ScalingConfig(prefill=PoolLimits(max=prefill_max), decode=PoolLimits(max=decode_max))
    return ClusterConfig(model=MODEL, scaling=limits, **kinds)


def test_our_own_ray_has_room_for_the_largest_pools_and_for_replacing_in_both() -> None:
    """Also if all of them were started by the pool whose workers take more, and have changed their role."""
    kinds = {"prefill": PoolConfig(threads=16), "decode": PoolConfig(num_cpus=0.5, workers=30)}
    wish = scaled(40, 20, **kinds)
    worker = plan_worker(wish, "prefill", "prefill-0", on_gpu=False)
    assert not shortage(total([worker] * (41 + 31), 2), {"CPU": float(logical_cpus(wish))})


def test_our_own_ray_has_room_for_settings_that_grow_while_it_runs() -> None:
    assert logical_cpus(scaled(1, 1)) == LEAST_CPUS
