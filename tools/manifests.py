"""Checks Kubernetes manifests strictly: `python -m tools.manifests [--crd PATH] FILES`.

Every document of every file must fit its kind's schema, and a key that the schema does not name is an error at any
depth, with its path and the nearest key. RayClusters are checked against KubeRay's own definition
(`--crd`, default $PDSERVE_KUBERAY_CRD), pods of other kinds against the pod template in it. A pdserve configuration
in a ConfigMap, or in a file from which a kustomization makes one, is read as `pdserve up` would read it.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError
from jsonschema.validators import extend

from cluster.config import ConfigError, load_config
from tools.manifest_schemas import Schema, core_kinds, from_crd, pod_template

CRD_VARIABLE = "PDSERVE_KUBERAY_CRD"
CONFIG_KEY = "pdserve.yaml"
RAYCLUSTER = ("ray.io/v1", "RayCluster")


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML readers keep the last in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


@dataclass(frozen=True)
class Document:
    """One document of a file."""

    file: Path
    number: int
    """From 1."""
    data: Any

    @property
    def kind(self) -> tuple[str, str]:
        """(apiVersion, kind); empty texts where there is none."""
        data = self.data if isinstance(self.data, Mapping) else {}
        return str(data.get("apiVersion", "")), str(data.get("kind", ""))

    def __str__(self) -> str:
        return f"{self.file}, document {self.number} ({self.kind[1] or 'no kind'})"


class Checker:
    """Knows the schema of every kind."""

    def __init__(self, crd: Mapping[str, Any]) -> None:
        raycluster = from_crd(crd, RAYCLUSTER[0].rpartition("/")[2])
        self._schemas: dict[tuple[str, str], Schema] = {**core_kinds(pod_template(raycluster)), RAYCLUSTER: raycluster}

    def problems(self, document: Document) -> list[str]:
        """What is wrong with a document, in words; [] if nothing is."""
        schema = self._schemas.get(document.kind)
        if schema is None:
            known = ", ".join(f"{kind} ({version})" for version, kind in sorted(self._schemas))
            return [f"{document}: no schema for {' '.join(document.kind) or 'it'}; known are {known}"]
        errors = sorted(_STRICT(schema).iter_errors(document.data), key=lambda error: [str(p) for p in error.path])
        found = [f"{document}: {text}" for error in errors for text in _in_words(error)]
        return found or [f"{document}: {text}" for text in _embedded(document)]


def documents(file: Path) -> list[Document]:
    """The documents of a file; yaml.YAMLError if it cannot be read."""
    loaded = yaml.load_all(file.read_text(), Loader=_Loader)
    return [Document(file, number, data) for number, data in enumerate(loaded, 1) if data is not None]


def read_crd(path: Path) -> dict[str, Any]:
    """A CustomResourceDefinition's file."""
    crd: dict[str, Any] = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return crd


def _unique_keys(_validator: Any, keys: list[str], items: Any, _schema: Any) -> Iterator[ValidationError]:
    """The entries of a list that Kubernetes merges by keys differ in them."""
    if not isinstance(items, list):
        return
    names = [tuple(item.get(key) for key in keys) for item in items if isinstance(item, Mapping)]
    for name in sorted({str(name) for name in names if names.count(name) > 1}):
        yield ValidationError(f"two entries have the same {', '.join(keys)}: {name}")


_STRICT: Any = extend(Draft202012Validator, {"x-kubernetes-list-map-keys": _unique_keys})


def _in_words(error: ValidationError) -> Iterator[str]:
    where = error.json_path.removeprefix("$").removeprefix(".") or "the document"
    if error.validator == "additionalProperties" and isinstance(error.schema, Mapping):
        known = error.schema.get("properties", {})
        for key in sorted(set(error.instance) - set(known), key=str):
            near = difflib.get_close_matches(str(key), known, n=1)
            yield f"{where}: unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else "")
        return
    yield f"{where}: {error.message:.300}"


def _embedded(document: Document) -> Iterator[str]:
    """What is wrong with the pdserve configuration that a document brings, if it brings one."""
    data = document.data
    if document.kind[1] == "ConfigMap" and CONFIG_KEY in data["data"]:
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory, CONFIG_KEY)
            file.write_text(data["data"][CONFIG_KEY])
            yield from _config_problems(file)
    for generated in data.get("configMapGenerator", []):
        for name in generated["files"]:
            file = document.file.parent / name.rpartition("=")[2]
            if not file.is_file():
                yield f"configMapGenerator: there is no file {file}"
            elif file.name == CONFIG_KEY:
                yield from _config_problems(file)
    for name in data.get("resources", []) if document.kind[1] == "Kustomization" else []:
        if not (document.file.parent / name).exists():
            yield f"resources: there is no file {document.file.parent / name}"


def _config_problems(file: Path) -> Iterator[str]:
    try:
        load_config(file)
    except ConfigError as error:
        yield f"{CONFIG_KEY}: {error}"


def check(files: list[Path], crd: Path) -> list[str]:
    """What is wrong with the files, in words."""
    checker = Checker(read_crd(crd))
    found: list[str] = []
    for file in files:
        try:
            loaded = documents(file)
        except (yaml.YAMLError, OSError) as error:
            found.append(f"{file}: {error}")
            continue
        if not loaded:
            found.append(f"{file}: no document")
        found += [problem for document in loaded for problem in checker.problems(document)]
    return found


def main() -> int:
    """Entry point; see the module."""
    parser = argparse.ArgumentParser(prog="tools.manifests")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--crd", type=Path, default=os.environ.get(CRD_VARIABLE), help=f"default: ${CRD_VARIABLE}")
    given = parser.parse_args()
    if given.crd is None:
        parser.error(f"name KubeRay's definition of a RayCluster: --crd, or {CRD_VARIABLE} in the environment")
    found = check(given.files, given.crd)
    for problem in found:
        print(problem, file=sys.stderr)
    if not found:
        print(f"{len(given.files)} file(s) fit their schemas")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
