"""What the manifests say fits together: with each other, with pdserve.yaml, and with what the processes do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.config import ClusterConfig, load_config
from cluster.leave_node import MARGIN_S
from tools.manifests import documents

KUBERAY = Path(__file__).parents[2] / "deploy" / "kuberay"
RAY_DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"


@pytest.fixture(scope="module")
def config() -> ClusterConfig:
    return load_config(KUBERAY / "pdserve.yaml")


@pytest.fixture(scope="module")
def raycluster() -> dict[str, Any]:
    [document] = documents(KUBERAY / "raycluster.yaml")
    return dict(document.data)


@pytest.fixture(scope="module")
def groups(raycluster: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {group["groupName"]: group for group in raycluster["spec"]["workerGroupSpecs"]}


def container(group: dict[str, Any]) -> dict[str, Any]:
    return dict(group["template"]["spec"]["containers"][0])


def everything() -> list[dict[str, Any]]:
    return [doc.data for file in KUBERAY.glob("*.yaml") if file.name != "pdserve.yaml" for doc in documents(file)]


def test_each_pool_lands_in_its_own_group(config: ClusterConfig, groups: dict[str, dict[str, Any]]) -> None:
    wanted = {"router": config.router.resources, "prefill": config.prefill.resources, "decode": config.decode.resources}
    assert set(groups) == set(wanted)
    for name, resources in wanted.items():
        assert resources
        for resource, amount in resources.items():
            offering = [group for group, spec in groups.items() if resource in spec["resources"]]
            assert offering == [name]
            assert float(groups[name]["resources"][resource]) >= amount
    products = [groups[name]["template"]["spec"]["nodeSelector"] for name in ("prefill", "decode")]
    assert products[0] != products[1]
    for name in ("prefill", "decode"):
        assert container(groups[name])["resources"]["limits"]["nvidia.com/gpu"] == groups[name]["resources"]["GPU"]


def test_groups_are_as_large_as_the_pools_may_grow(config: ClusterConfig, groups: dict[str, dict[str, Any]]) -> None:
    for name, limits in (("prefill", config.scaling.prefill), ("decode", config.scaling.decode)):
        assert groups[name]["minReplicas"] <= limits.min
        assert groups[name]["maxReplicas"] >= limits.max
    assert groups["router"]["minReplicas"] >= config.router.replicas


def test_a_pod_has_time_to_drain(config: ClusterConfig, groups: dict[str, dict[str, Any]]) -> None:
    for group in groups.values():
        variables = {entry["name"]: entry.get("value") for entry in container(group)["env"]}
        ray_s = float(variables[RAY_DRAIN])
        grace_s = group["template"]["spec"]["terminationGracePeriodSeconds"]
        assert grace_s > config.drain_s + MARGIN_S + ray_s
        assert container(group)["lifecycle"]["preStop"]["exec"]["command"] == ["python", "-m", "cluster.leave_node"]


def test_what_listens_can_be_reached(config: ClusterConfig, groups: dict[str, dict[str, Any]]) -> None:
    hosts = [config.prefill.host, config.decode.host, config.transfer.host, config.router.host]
    assert {*hosts, config.observability.metrics_host} == {"node"}
    assert config.router.same_port
    router = container(groups["router"])
    assert router["readinessProbe"]["grpc"]["port"] == config.router.port
    assert {port["containerPort"] for port in router["ports"]} == {
        config.router.port,
        config.observability.metrics_port,
    }
    services = {data["metadata"]["name"]: data["spec"] for data in everything() if data["kind"] == "Service"}
    assert services["pdserve"]["ports"][0]["targetPort"] == config.router.port
    assert services["pdserve-metrics"]["ports"][0]["targetPort"] == config.observability.metrics_port
    assert config.redis.url is not None
    assert config.redis.url.startswith("redis://pdserve-valkey:6379/")
    assert not config.redis.url.endswith("/0"), "database 0 is Ray's"
    assert config.ray.address == "pdserve-head-svc:6379"


def test_the_head_runs_no_worker_and_starts_pdserve(raycluster: dict[str, Any]) -> None:
    spec = raycluster["spec"]
    head = spec["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert spec["autoscalerOptions"]["version"] == "v2"
    sidecars = {one["name"]: one for one in head["template"]["spec"]["initContainers"]}
    assert all(one["restartPolicy"] == "Always" for one in sidecars.values())
    assert sidecars["pdserve"]["args"][0] == "up"
    assert {"--foreground", "--keep"} < set(sidecars["pdserve"]["args"])
    assert "--watch" in sidecars["pdserve-apply"]["args"]


def test_secrets_are_named_and_never_written(raycluster: dict[str, Any]) -> None:
    kustomization = next(data for data in everything() if data["kind"] == "Kustomization")
    assert "secrets.example.yaml" not in kustomization["resources"]
    for data in everything():
        if data["kind"] == "Secret":
            assert all(text.startswith("PLACEHOLDER") for text in data["stringData"].values())
    spec = raycluster["spec"]
    example = {data["metadata"]["name"]: data["stringData"] for data in everything() if data["kind"] == "Secret"}
    password = spec["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]["secretKeyRef"]
    assert password["key"] in example[password["name"]]
    assert "auth_token" in example[spec["authOptions"]["secretName"]]
    assert "cluster" in example["pdserve-secrets"]


def test_no_process_of_ours_runs_as_root(raycluster: dict[str, Any]) -> None:
    spec = raycluster["spec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        for one in (*pod["containers"], *pod.get("initContainers", [])):
            assert one["securityContext"]["allowPrivilegeEscalation"] is False
