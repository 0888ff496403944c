"""What the manifests in deploy/kuberay promise, with processes in place of pods: a Ray that we did not start, its nodes
joining late, leaving as a pod does, and its head starting again."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from router.store import RouterRecord, WorkerRecord
from tests.e2e.pods import GRACE_S, MEMBERS, RECOVERY_S, Load, Pods, new_pods, until

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Iterator[Pods]:
    """Head, two nodes of each group, in mixed order, and pdserve on it."""
    with new_pods(tmp_path_factory.mktemp("pods"), tiny_llama) as pods:
        pods.head()
        for _ in range(2):
            for group in ("decode", "router", "prefill"):
                pods.worker(group)
        pods.wait_joined()
        pods.run_sidecar()
        pods.wait_ready()
        yield pods


def test_a_ray_that_we_did_not_start_and_its_nodes_addresses(running: Pods) -> None:
    registered = running.registered()
    assert sorted(registered) == MEMBERS
    for name, record in registered.items():
        pod = running.pod_at(record.address)
        assert pod.name.startswith(name.partition("-")[0])
        assert pod.address == record.metrics_address.rpartition(":")[0]
        role = "router" if pod.name.startswith("router") else "front"
        assert (pod.node_dir / "processes" / f"{name}-{role}.json").exists()
    routers = [record for record in registered.values() if isinstance(record, RouterRecord)]
    assert {router.address.rpartition(":")[2] for router in routers} == {str(running.port)}
    assert not list((running.directory / "run" / "logs").glob("*-front.log"))


@pytest.mark.parametrize("group", ["decode", "prefill", "router"])
def test_a_pod_that_is_deleted_under_load_drains_and_fails_no_request(running: Pods, group: str) -> None:
    name = f"{group}-0"
    old = running.registered()[name].address
    pod = running.pod_at(old)
    with Load(running) as load:
        took_s = pod.delete()
        assert took_s < GRACE_S
        assert not pod.members()
        running.worker(group)  # what KubeRay makes in its place

        def is_back() -> bool:
            record = running.registered().get(name)
            return record is not None and record.address != old

        until(is_back, RECOVERY_S, lambda: f"{name} is not back: {running.registered()}")
        load.wait_for(12)


def test_the_head_goes_and_comes_again_with_its_state_in_redis(running: Pods) -> None:
    head = running.pods[0]
    before = running.registered()
    assert sorted(before) == MEMBERS
    with Load(running, num_clients=2) as load:
        running.kill_sidecar()
        head.kill()
        for path in (running.short / "head", running.directory / "run", head.node_dir):
            shutil.rmtree(path, ignore_errors=True)  # the new pod has nothing of the old one
        load.wait_for(8)  # those under way, and new ones
        head.start()
        running.wait_joined()
        running.run_sidecar()
        running.wait_ready()
        load.wait_for(6)
    after = running.registered()
    assert {name: getattr(record, "epoch", 0) for name, record in after.items()} == {
        name: getattr(record, "epoch", 0) for name, record in before.items()
    }, "every worker lives on"

    decode = running.pod_at(before["decode-1"].address)
    note = json.loads((decode.node_dir / "processes" / "decode-1-front.json").read_text())
    os.kill(note["process"]["pid"], signal.SIGKILL)

    def is_new() -> bool:
        record = running.registered().get("decode-1")
        return isinstance(record, WorkerRecord) and record.epoch > before["decode-1"].epoch

    until(is_new, RECOVERY_S, lambda: "the new GCS did not start the front again")


def test_sigterm_ends_the_sidecar_alone(running: Pods) -> None:
    running.end_sidecar()
    with Load(running) as load:
        load.wait_for(6)
    running.run_sidecar()
    running.wait_ready()


def test_up_waits_for_groups_that_join_late_and_in_any_order(tmp_path: Path, tiny_llama: Path) -> None:
    with new_pods(tmp_path, tiny_llama) as pods:
        pods.run_sidecar()
        pods.head()
        for groups in (["decode"], ["prefill", "router", "decode"], ["router", "prefill"]):
            assert "Ready." not in pods.sidecar_says()
            for group in groups:
                pods.worker(group)
            pods.wait_joined()
        pods.wait_ready()
        assert sorted(pods.registered()) == MEMBERS
        with Load(pods) as load:
            load.wait_for(6)
