"""Small actors in place of the real ones: the cluster around them is real, the model is not."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.model_load import LoadTeller
from cluster.run_dir import RunDir


@dataclass(frozen=True, kw_only=True)
class WorkerSpec:
    worker_id: str
    pool: str
    role: str
    config: dict[str, Any]
    run_dir: str
    redis_url: str


@dataclass(frozen=True, kw_only=True)
class RouterSpec:
    router_id: str
    config: dict[str, Any]
    run_dir: str
    redis_url: str


class EngineActor:
    def __init__(self, spec: WorkerSpec, rank: int = 0) -> None:
        if spec.config["model"]["name"] == "broken":
            raise ValueError("the model file is broken")
        LoadTeller(RunDir(Path(spec.run_dir)), spec.worker_id)(3_000_000_000, 8_000_000_000)
        self._names = {"worker_id": spec.worker_id, "rank": rank, "threads": os.environ["OMP_NUM_THREADS"]}

    def ready(self) -> dict[str, Any]:
        return {**self._names, "pid": os.getpid()}


class FrontActor:
    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self._role = spec.role

    def ready(self) -> dict[str, Any]:
        return {"worker_id": self._spec.worker_id, "epoch": 1, "address": "127.0.0.1:1", "pid": os.getpid()}

    def drain(self, timeout_s: float, move_after_s: float) -> dict[str, Any]:
        return {"finished": True}

    def set_role(self, role: str, timeout_s: float) -> dict[str, Any]:
        self._role = role
        return self.status()

    def status(self) -> dict[str, Any]:
        return {"state": "ready", "role": self._role, "stats": {}, "pid": os.getpid()}


class RouterActor:
    def __init__(self, spec: RouterSpec) -> None:
        self._listener = socket.create_server(("127.0.0.1", spec.config["router"]["port"]))
        self._host, self._port = self._listener.getsockname()

    def ready(self) -> dict[str, Any]:
        return {"address": f"{self._host}:{self._port}", "metrics_address": "", "pid": os.getpid()}

    def drain(self, timeout_s: float) -> dict[str, Any]:
        return {}

    def status(self) -> dict[str, Any]:
        return {"state": "ready", "pid": os.getpid()}

    def load(self) -> dict[str, Any]:
        return {}
