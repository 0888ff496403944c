"""The check of the manifests: strict at every depth, for KubeRay's definition and for Kubernetes' own kinds."""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tools.manifest_schemas import METADATA, closed
from tools.manifests import CRD_VARIABLE, Checker, Document, check, documents, read_crd

ROOT = Path(__file__).parents[2]
KUBERAY = ROOT / "deploy" / "kuberay"
FILES = sorted(file for file in KUBERAY.glob("*.yaml") if file.name != "pdserve.yaml")
CRD = os.environ.get(CRD_VARIABLE, "")

needs_crd = pytest.mark.skipif(not CRD, reason=f"{CRD_VARIABLE} names no file with KubeRay's RayCluster definition")


@pytest.fixture(scope="module")
def checker() -> Checker:
    return Checker(read_crd(Path(CRD)))


@pytest.fixture(scope="module")
def manifests() -> list[Document]:
    return [document for file in FILES for document in documents(file)]


def paths_to_mappings(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(node, dict):
        yield path
        for key, value in node.items():
            yield from paths_to_mappings(value, (*path, key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from paths_to_mappings(value, (*path, index))


def at(node: Any, path: tuple[Any, ...]) -> Any:
    for step in path:
        node = node[step]
    return node


def changed(document: Document, change: Any) -> Document:
    data = copy.deepcopy(document.data)
    change(data)
    return Document(document.file, document.number, data)


def by_kind(manifests: list[Document], kind: str) -> Document:
    return next(document for document in manifests if document.kind[1] == kind)


@needs_crd
def test_every_manifest_fits() -> None:
    assert len(FILES) >= 8
    assert check(FILES, Path(CRD)) == []


FREE = (
    "labels",
    "matchLabels",
    "annotations",
    "nodeSelector",
    "data",
    "stringData",
    "rayStartParams",
    "requests",
    "limits",
)
"""Maps whose keys are names of the user's own, or of resources."""


def is_free(path: tuple[Any, ...], kind: str) -> bool:
    last = path[-1] if path else ""
    if last == "selector":
        return kind == "Service"
    if last == "resources":
        return path[-3:-2] == ("workerGroupSpecs",)
    return last in FREE


@needs_crd
def test_a_key_that_no_schema_knows_fails_wherever_it_stands(checker: Checker, manifests: list[Document]) -> None:
    tried = 0
    for document in manifests:
        for path in paths_to_mappings(document.data):
            if is_free(path, document.kind[1]):
                continue
            wrong = changed(document, lambda data, path=path: at(data, path).update({"noSuchKey": "x"}))
            assert any("noSuchKey" in problem for problem in checker.problems(wrong)), (document, path)
            tried += 1
    assert tried > 200


@needs_crd
def test_a_misspelt_key_fails_wherever_it_stands(checker: Checker, manifests: list[Document]) -> None:
    dice = random.Random(6)
    document = by_kind(manifests, "RayCluster")
    paths = [
        path for path in paths_to_mappings(document.data) if not is_free(path, "RayCluster") and at(document.data, path)
    ]

    def misspell(data: Any, path: tuple[Any, ...], key: str) -> None:
        mapping = at(data, path)
        mapping[key[:-1] if len(key) > 2 else key * 2] = mapping.pop(key)

    for path in paths:
        key = dice.choice(list(at(document.data, path)))
        wrong = changed(document, lambda data, path=path, key=key: misspell(data, path, key))
        assert checker.problems(wrong), (path, key)


@needs_crd
@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (("spec", "rayVersion"), 2.6, "is not of type 'string'"),
        (("spec", "enableInTreeAutoscaling"), "yes", "is not of type 'boolean'"),
        (("spec", "autoscalerOptions", "version"), "v3", "is not one of"),
        (("spec", "authOptions", "mode"), "tokens", "is not one of"),
        (("spec", "workerGroupSpecs", 0, "maxReplicas"), "4", "is not of type 'integer'"),
        (("spec", "workerGroupSpecs", 0, "resources", "CPU"), 2, "is not of type 'string'"),
        (("spec", "workerGroupSpecs", 0, "template", "spec", "containers"), {}, "is not of type 'array'"),
        (("spec", "headGroupSpec", "template", "spec", "containers", 0, "resources", "limits", "cpu"), 2.5, "cpu"),
        (("metadata", "labels"), {"a": 1}, "is not of type 'string'"),
    ],
)
def test_a_wrong_type_fails(checker: Checker, manifests: list[Document], path: Any, value: Any, expected: str) -> None:
    raycluster = by_kind(manifests, "RayCluster")
    wrong = changed(raycluster, lambda data: at(data, path[:-1]).__setitem__(path[-1], value))
    assert any(expected in problem for problem in checker.problems(wrong))


@needs_crd
def test_what_else_fails(checker: Checker, manifests: list[Document]) -> None:
    raycluster = by_kind(manifests, "RayCluster")
    near = changed(raycluster, lambda data: data["spec"].__setitem__("rayVersoin", "2.60.0"))
    assert "did you mean 'rayVersion'?" in checker.problems(near)[0]
    missing = changed(raycluster, lambda data: data["spec"]["workerGroupSpecs"][0].pop("groupName"))
    assert "'groupName' is a required property" in checker.problems(missing)[0]

    def twice(data: Any) -> None:
        ports = data["spec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["ports"]
        ports.append(dict(ports[0]))

    assert "two entries have the same" in checker.problems(changed(raycluster, twice))[0]
    strange = changed(raycluster, lambda data: data.__setitem__("apiVersion", "ray.io/v2"))
    assert "no schema for ray.io/v2 RayCluster" in checker.problems(strange)[0]


@needs_crd
def test_a_configuration_in_a_config_map_is_read_as_up_would(checker: Checker, tmp_path: Path) -> None:
    def problems(text: str) -> list[str]:
        data = {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": "x"},
            "data": {"pdserve.yaml": text},
        }
        return checker.problems(Document(tmp_path / "x.yaml", 1, data))

    good = (KUBERAY / "pdserve.yaml").read_text()
    assert problems(good) == []
    assert "did you mean" in problems(good.replace("replicas: 2", "replica: 2"))[0]


@needs_crd
def test_a_kustomization_names_files_that_are_there(checker: Checker, tmp_path: Path) -> None:
    [document] = documents(KUBERAY / "kustomization.yaml")
    (tmp_path / "pdserve.yaml").write_text("mode: neither\nmodel: {path: demo}\n")
    found = checker.problems(Document(tmp_path / "kustomization.yaml", 1, document.data))
    assert any("pdserve.yaml:" in problem for problem in found)
    assert any(f"there is no file {tmp_path / 'raycluster.yaml'}" in problem for problem in found)


def test_a_key_that_stands_twice_fails(tmp_path: Path) -> None:
    (tmp_path / "twice.yaml").write_text("a: 1\na: 2\n")
    with pytest.raises(yaml.YAMLError, match="'a' stands twice"):
        documents(tmp_path / "twice.yaml")


def test_what_a_structural_schema_says_becomes_closed() -> None:
    schema = closed(
        {
            "type": "object",
            "properties": {
                "size": {"anyOf": [{"type": "integer"}, {"type": "string"}], "x-kubernetes-int-or-string": True},
                "free": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
                "map": {"type": "object", "additionalProperties": {"type": "object", "properties": {}}},
                "list": {"type": "array", "items": {"type": "object", "properties": {"a": {"type": "string"}}}},
                "none": {"type": "string", "nullable": True},
            },
            "x-kubernetes-validations": [{"rule": "self == oldSelf"}],
        }
    )
    parts = schema["properties"]
    assert schema["additionalProperties"] is False
    assert "x-kubernetes-validations" not in schema
    assert parts["size"]["type"] == ["integer", "string"]
    assert "additionalProperties" not in parts["free"]
    assert parts["map"]["additionalProperties"]["additionalProperties"] is False
    assert parts["list"]["items"]["additionalProperties"] is False
    assert parts["none"]["type"] == ["string", "null"]
    assert METADATA["additionalProperties"] is False
