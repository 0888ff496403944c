"""How a process of ours begins: what its node gives it, where it logs, and what must stay out of the log.

Ray may place it on another machine than the one of `up`, so nothing here needs that machine's files: its run
directory is made where it is missing, and the cluster secret comes from a mounted directory where that has none.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from cluster import logs
from cluster.config import NODE_HOST, ClusterConfig
from cluster.run_dir import ProcessRef, RunDir, write_private

_HOSTS = (
    ("prefill", "host"),
    ("decode", "host"),
    ("transfer", "host"),
    ("router", "host"),
    ("observability", "metrics_host"),
)


SpecT = TypeVar("SpecT")


@dataclass(frozen=True, kw_only=True)
class NodeProcess:
    """A process of ours on this node, as `cluster.leave_node` needs to know it."""

    role: str
    process: ProcessRef
    drain_s: float
    """Longest that it drains after SIGTERM."""
    gcs_address: str
    node_id: str
    """Ray's name of the node; empty outside of Ray."""

    @classmethod
    def read(cls, path: Path) -> NodeProcess | None:
        """What a process wrote; None if it cannot be read."""
        try:
            data = json.loads(path.read_text())
            return cls(**{**data, "process": ProcessRef(**data["process"])})
        except (OSError, ValueError, KeyError, TypeError):
            return None


def at_node(spec: SpecT) -> SpecT:
    """What a process is told, as its node sees it: with the node's run directory, and its address for `node`.

    `spec` is a dataclass with `run_dir` and `config`.
    """
    told: Any = spec
    seen: SpecT = dataclasses.replace(
        told,
        run_dir=str(RunDir.of_node(told.run_dir).path),
        config=with_hosts(told.config, _ray_address_of_node),
    )
    return seen


def with_hosts(config: dict[str, Any], address: Callable[[], str]) -> dict[str, Any]:
    """The configuration with what `address()` gives wherever a host is `node`."""
    changed: dict[str, dict[str, Any]] = {}
    for section, key in _HOSTS:
        if config[section][key] == NODE_HOST:
            changed[section] = {**changed.get(section, config[section]), key: address()}
    return {**config, **changed}


def _ray_address_of_node() -> str:
    util: Any = importlib.import_module("ray.util")
    return str(util.get_node_ip_address())


def begin(role: str, name: str, config: ClusterConfig, run_dir: str, redis_url: str) -> bytes:
    """Open the log of a process, `<name>-<role>.log`, and note that it runs; returns the cluster secret."""
    directory = RunDir.of_node(run_dir)
    directory.create()
    secret = directory.given_secret("cluster")
    log_dir = Path(config.observability.log_dir) if config.observability.log_dir else directory.logs
    log_name = f"{name}-{role}" if name else role
    logs.configure(
        role,
        worker_id=name,
        level=config.observability.log_level,
        target=log_dir / f"{log_name}.log",
        secrets=[secret, _password(redis_url)],
    )
    gcs_address, node_id = _ray_node()
    note = NodeProcess(
        role=role, process=ProcessRef.of(os.getpid()), drain_s=config.drain_s, gcs_address=gcs_address, node_id=node_id
    )
    write_private(directory.processes / f"{log_name}.json", json.dumps(asdict(note)))
    return secret.encode()


def _ray_node() -> tuple[str, str]:
    """Address of the GCS, id of this node; empty outside of Ray."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return "", ""
    context = ray.get_runtime_context()
    return str(context.gcs_address), str(context.get_node_id())


def _password(url: str) -> str:
    return url.partition("@")[0].rpartition(":")[2] if "@" in url else ""
