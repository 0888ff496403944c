"""Closed schemas for the manifests in deploy/: made from a CustomResourceDefinition, or our own for Kubernetes' kinds.

Ours know the keys that the manifests use, and no others: a key that is new here is added here, once, with its type.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string", "minLength": 1}
_NUMBER: Schema = {"type": "integer", "minimum": 0}
_FLAG: Schema = {"type": "boolean"}
_TEXTS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
_PORT: Schema = {"anyOf": [{"type": "integer", "minimum": 1, "maximum": 65535}, _TEXT]}


def _object(required: tuple[str, ...] = (), **properties: Schema) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def _list(items: Schema, key: str = "") -> Schema:
    keyed = {"x-kubernetes-list-map-keys": [key]} if key else {}
    return {"type": "array", "items": items, **keyed}


def _one_of(*values: str) -> Schema:
    return {"enum": list(values)}


METADATA = _object(("name",), name=_TEXT, namespace=_TEXT, labels=_TEXTS, annotations=_TEXTS)
_SELECTOR = _object(matchLabels=_TEXTS)


def from_crd(crd: Mapping[str, Any], version: str) -> Schema:
    """The schema of one version of a custom resource, closed at every depth; KeyError if there is none."""
    for served in crd["spec"]["versions"]:
        if served["name"] == version and served["served"]:
            schema = closed(served["schema"]["openAPIV3Schema"])
            schema["properties"]["metadata"] = METADATA
            schema["required"] = sorted({*schema.get("required", []), "apiVersion", "kind", "metadata", "spec"})
            return schema
    raise KeyError(f"the definition of {crd['spec']['names']['kind']} serves no version {version}")


def closed(node: Mapping[str, Any]) -> Schema:
    """A structural schema of Kubernetes as JSON Schema in which a key that it does not name is an error.

    Honoured: x-kubernetes-int-or-string, x-kubernetes-preserve-unknown-fields (the one way to an open object),
    x-kubernetes-list-map-keys (kept; see `tools.manifests`), nullable. Rules in CEL are not looked at.
    """
    schema = {name: value for name, value in node.items() if not name.startswith("x-") or name.endswith("map-keys")}
    for name in ("anyOf", "allOf", "oneOf"):
        if name in schema:  # they narrow what stands beside them, and name no keys of their own
            schema[name] = [dict(part) for part in schema[name]]
    if "properties" in schema:
        schema["properties"] = {name: closed(part) for name, part in schema["properties"].items()}
    if isinstance(schema.get("items"), Mapping):
        schema["items"] = closed(schema["items"])
    if isinstance(schema.get("additionalProperties"), Mapping):
        schema["additionalProperties"] = closed(schema["additionalProperties"])
    elif schema.get("type") == "object" and not node.get("x-kubernetes-preserve-unknown-fields"):
        schema.setdefault("additionalProperties", False)
    if node.get("x-kubernetes-int-or-string"):
        schema["type"] = ["integer", "string"]
    if schema.pop("nullable", False) and "type" in schema:
        kinds = schema["type"]
        schema["type"] = [*(kinds if isinstance(kinds, list) else [kinds]), "null"]
    return schema


def pod_template(raycluster: Schema) -> Schema:
    """The schema of a pod's template, which the definition of a RayCluster has in it."""
    groups = raycluster["properties"]["spec"]["properties"]["workerGroupSpecs"]
    template: Schema = groups["items"]["properties"]["template"]
    return template


def core_kinds(template: Schema) -> dict[tuple[str, str], Schema]:
    """(apiVersion, kind) to the schema of each of Kubernetes' own kinds that the manifests use."""
    kinds = {
        ("v1", "Service"): {"spec": _service()},
        ("v1", "ConfigMap"): {"data": _TEXTS},
        ("v1", "Secret"): {"type": _one_of("Opaque"), "stringData": _TEXTS},
        ("v1", "PersistentVolumeClaim"): {"spec": _claim()},
        ("apps/v1", "Deployment"): {"spec": _deployment(template)},
        ("networking.k8s.io/v1", "NetworkPolicy"): {"spec": _network_policy()},
        ("policy/v1", "PodDisruptionBudget"): {"spec": _disruption_budget()},
    }
    schemas = {
        (version, kind): _object(
            ("apiVersion", "kind", "metadata", *parts), apiVersion=_TEXT, kind=_TEXT, metadata=METADATA, **parts
        )
        for (version, kind), parts in kinds.items()
    }
    return {**schemas, ("kustomize.config.k8s.io/v1beta1", "Kustomization"): _kustomization()}


def _service() -> Schema:
    port = _object(
        ("name", "port"),
        name=_TEXT,
        port=_PORT,
        targetPort=_PORT,
        protocol=_one_of("TCP", "UDP", "SCTP"),
        appProtocol=_TEXT,
    )
    return _object(
        ("ports",),
        type=_one_of("ClusterIP", "NodePort", "LoadBalancer"),
        clusterIP=_one_of("None"),
        publishNotReadyAddresses=_FLAG,
        selector=_TEXTS,
        ports=_list(port, "name"),
    )


def _claim() -> Schema:
    modes = _one_of("ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod")
    return _object(
        ("accessModes", "resources"),
        accessModes=_list(modes),
        storageClassName=_TEXT,
        resources=_object(("requests",), requests=_object(("storage",), storage=_TEXT)),
    )


def _deployment(template: Schema) -> Schema:
    return _object(
        ("selector", "template"),
        replicas=_NUMBER,
        strategy=_object(("type",), type=_one_of("Recreate", "RollingUpdate")),
        selector=_SELECTOR,
        template=template,
    )


def _network_policy() -> Schema:
    peer = _object(podSelector=_SELECTOR, namespaceSelector=_SELECTOR)
    port = _object(("port",), port=_PORT, protocol=_one_of("TCP", "UDP", "SCTP"))
    return _object(
        ("podSelector", "policyTypes"),
        podSelector=_SELECTOR,
        policyTypes=_list(_one_of("Ingress", "Egress")),
        ingress=_list(_object(**{"from": _list(peer), "ports": _list(port)})),
    )


def _disruption_budget() -> Schema:
    return _object(("selector",), maxUnavailable=_NUMBER, minAvailable=_NUMBER, selector=_SELECTOR)


def _kustomization() -> Schema:
    generated = _object(("name", "files"), name=_TEXT, files=_list(_TEXT))
    image = _object(("name",), name=_TEXT, newName=_TEXT, newTag=_TEXT)
    return _object(
        ("apiVersion", "kind", "resources"),
        apiVersion=_TEXT,
        kind=_TEXT,
        namespace=_TEXT,
        resources=_list(_TEXT),
        configMapGenerator=_list(generated),
        generatorOptions=_object(disableNameSuffixHash=_FLAG),
        images=_list(image, "name"),
    )
