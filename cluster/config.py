"""The one YAML of a cluster: composes what each floor lets a user set. Free of torch and of Ray.

`load_config` reads a file, strictly; `to_plain` and `from_plain` carry a configuration through a process
boundary; `json_schema` is what an editor completes from.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal
from urllib.parse import quote

from pydantic import ConfigDict, TypeAdapter

from cluster.scaling_config import PoolLimits, ScalingConfig
from cluster.yaml_config import ConfigError, load
from decode_pool.config import DecodeOptions
from engine.config import CacheOptions, EngineOptions, ModelOptions
from kv_transfer.config import TransferConfig
from router.config import RouterConfig

__all__ = [
    "NODE_HOST",
    "ClusterConfig",
    "ConfigError",
    "ObservabilityConfig",
    "PoolConfig",
    "PoolLimits",
    "RayConfig",
    "RedisConfig",
    "ScalingConfig",
    "can_change_role",
    "from_plain",
    "json_schema",
    "load_config",
    "public_url",
    "to_plain",
]

Mode = Literal["split", "colocated"]
LogLevel = Literal["debug", "info", "warning", "error"]

_STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)
_MIN_OBJECT_STORE_MIB = 76
TENSOR_PARALLEL = (1, 2, 4, 8)
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
_LABEL_PREFIX = rf"(?=.{{1,253}}$){_LABEL}(?:\.{_LABEL})*"
_LABEL_CONDITION = rf"!?{_LABEL}|!?in\({_LABEL}(?:, ?{_LABEL})*\)"
NODE_HOST = "node"
"""As a host: the address by which Ray knows the machine that a process is on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolConfig(EngineOptions):
    """One pool of workers: how many, how each computes, and what it takes of its machine."""

    workers: int = 1
    """Workers of this pool; 0 starts none."""
    host: str = "127.0.0.1"
    """Interface on which the workers listen for routers; `node`: the address by which Ray knows their machine."""
    num_cpus: float | None = None
    """Ray CPUs that each rank reserves; default: threads."""
    num_gpus: float | None = None
    """GPUs that each rank reserves; default: 1 where it computes on a GPU, else 0."""
    resources: dict[str, float] = field(default_factory=dict)
    """Other Ray resources that each rank reserves, such as one of your own: {"fast_nic": 1}."""
    accelerator_type: str | None = None
    """Kind of GPU that the pool is for, as Ray names it: H200, L40S, A100-80G (see accelerator_type:... in
    `ray status`). Unless device is cpu, its workers are on GPUs. Default: any kind."""
    labels: dict[str, str] = field(default_factory=dict)
    """Ray labels that a worker's node must have, such as {"market": "on-demand"}; a value may also be a condition:
    "!spot", "in(a, b)" or "!in(a, b)"."""

    def __post_init__(self) -> None:
        EngineOptions.__post_init__(self)
        _check_hardware(self.accelerator_type, self.labels)
        if self.tensor_parallel not in TENSOR_PARALLEL:
            raise ValueError(f"tensor_parallel must be 1, 2, 4 or 8, got {self.tensor_parallel}")
        if not 0 <= self.workers <= 1000:
            raise ValueError(f"workers must be between 0 and 1000, got {self.workers}")
        for name, amount in (("num_cpus", self.num_cpus), ("num_gpus", self.num_gpus), *self.resources.items()):
            if amount is not None and not (math.isfinite(amount) and amount >= 0):
                raise ValueError(f"{name} must be at least 0, got {amount}")
        if self.num_gpus is not None and self.num_gpus > 1 and self.num_gpus != int(self.num_gpus):
            raise ValueError(f"num_gpus must be a fraction of one GPU or a whole number, got {self.num_gpus}")


def _check_hardware(accelerator_type: str | None, labels: dict[str, str]) -> None:
    """ValueError for what Ray would refuse only when a worker is placed."""
    if accelerator_type is not None and not re.fullmatch(_LABEL, accelerator_type):
        raise ValueError(f"accelerator_type must be a name that Ray knows, such as H200, got {accelerator_type!r}")
    for key, value in labels.items():
        prefix, slash, name = key.rpartition("/")
        if not re.fullmatch(_LABEL, name) or (slash and not re.fullmatch(_LABEL_PREFIX, prefix)):
            raise ValueError(f"labels must have keys such as market or example.com/market, got {key!r}")
        if not re.fullmatch(_LABEL_CONDITION, value):
            raise ValueError(
                f"labels.{key} must be at most 63 letters, digits, '-', '_' and '.', or such as '!spot', 'in(a, b)' "
                f"or '!in(a, b)', got {value!r}"
            )


def public_url(url: str) -> str:
    """A URL without its user and password."""
    return re.sub(r"//.*@", "//***@", url)


@dataclass(frozen=True, kw_only=True, slots=True)
class RedisConfig:
    """The registry: which workers live, who serves which request. Also holds Ray's state."""

    url: str | None = None
    """A Redis or Valkey to use, redis://[user:password@]host:port[/db]; default: an embedded Valkey is started.
    Each cluster needs a database (db) of its own; Ray's state is always in database 0."""
    port: int = 0
    """TCP port of the embedded Valkey, on loopback; 0: any free one."""
    password_file: str | None = None
    """File with the password for a url that has none, such as a mounted secret; read where a command runs."""

    def __post_init__(self) -> None:
        if self.url is not None and not re.match(r"rediss?://[^/]", self.url):
            raise ValueError(f"url must look like redis://host:port, got {public_url(self.url)!r}")
        if self.password_file is not None and self.url is None:
            raise ValueError("password_file is for a Redis of your own: set url too, or leave password_file out")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port must be between 0 and 65535, got {self.port}")


@dataclass(frozen=True, kw_only=True, slots=True)
class RayConfig:
    """Where the processes run."""

    address: str | None = None
    """host:port of a Ray cluster to join; default: a Ray of our own is started on loopback."""
    port: int = 0
    """TCP port of our own Ray; 0: any free one."""
    num_gpus: int | None = None
    """GPUs that our own Ray may use; default: those that it finds."""
    object_store_mib: int = 80
    """Shared memory of our own Ray's object store, in MiB; tokens and KV never pass through it."""

    def __post_init__(self) -> None:
        if self.address is not None and not re.fullmatch(r"\S+:\d{1,5}", self.address):
            raise ValueError(f"address must be host:port of a Ray head, got {self.address!r}")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port must be between 0 and 65535, got {self.port}")
        if self.num_gpus is not None and self.num_gpus < 0:
            raise ValueError(f"num_gpus must be at least 0, got {self.num_gpus}")
        if self.object_store_mib < _MIN_OBJECT_STORE_MIB:
            raise ValueError(f"object_store_mib must be at least {_MIN_OBJECT_STORE_MIB}, got {self.object_store_mib}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ObservabilityConfig:
    """What the processes tell, and where."""

    log_level: LogLevel = "info"
    """Least level that is logged."""
    log_dir: str | None = None
    """Directory of the log files; default: `logs` in the run directory."""
    metrics_host: str = "127.0.0.1"
    """Interface on which every process serves /metrics; `node`: the address by which Ray knows its machine."""
    metrics_port: int = 0
    """TCP port of the router's /metrics; 0: any free one. Workers always take a free one (see `pdserve status`)."""

    def __post_init__(self) -> None:
        if not 0 <= self.metrics_port <= 65535:
            raise ValueError(f"metrics_port must be between 0 and 65535, got {self.metrics_port}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    """A whole cluster."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    mode: Mode = "split"
    """split: prefill and decode in pools of their own. colocated: only the decode pool is started, and each of its
    workers does both jobs."""
    model: ModelOptions
    """The model that is served."""
    cache: CacheOptions = field(default_factory=CacheOptions)
    """The KV cache of each worker."""
    prefill: PoolConfig = field(default_factory=PoolConfig)
    """Workers that compute prompts; not started when mode is colocated."""
    decode: PoolConfig = field(default_factory=PoolConfig)
    """Workers that generate tokens."""
    admission: DecodeOptions = field(default_factory=DecodeOptions)
    """How freely decode workers promise their blocks."""
    transfer: TransferConfig = field(default_factory=TransferConfig)
    """How KV travels between workers."""
    router: RouterConfig = field(default_factory=RouterConfig)
    """The front door."""
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    """How pools grow and shrink."""
    redis: RedisConfig = field(default_factory=RedisConfig)
    """The registry."""
    ray: RayConfig = field(default_factory=RayConfig)
    """Whose Ray starts, places and restarts the processes."""
    observability: ObservabilityConfig = field(default_factory=ObservabilityConfig)
    """Logs and metrics."""
    drain_s: float = 30.0
    """Longest that a stopping process waits for its running requests, in seconds."""
    move_after_s: float = 10.0
    """Seconds after which the requests that still generate at a draining worker, or at one that has left the decode
    pool, go on at other workers."""
    start_timeout_s: float = 300.0
    """Longest that `pdserve up` waits for every worker to be ready, in seconds."""

    def __post_init__(self) -> None:
        if self.decode.workers < 1:
            raise ValueError(f"decode.workers must be at least 1, got {self.decode.workers}")
        if self.mode == "split" and self.prefill.workers < 1:
            raise ValueError("prefill.workers must be at least 1 when mode is split; for none, set `mode: colocated`")
        if not 0 <= self.drain_s <= 86400:
            raise ValueError(f"drain_s must be between 0 and 86400 seconds, got {self.drain_s}")
        if not 0 <= self.move_after_s <= 86400:
            raise ValueError(f"move_after_s must be between 0 and 86400 seconds, got {self.move_after_s}")
        if not 0 < self.start_timeout_s <= 86400:
            raise ValueError(f"start_timeout_s must be more than 0 and at most 86400, got {self.start_timeout_s}")
        if self.router.same_port and self.router.replicas > 1 and self.ray.address is None:
            raise ValueError("router.same_port needs a machine for each router: set ray.address, or router.replicas: 1")

    def move_within(self, drain_s: float) -> float:
        """When what generates is moved in a drain that lasts so long: early enough for it to go on elsewhere."""
        return min(self.move_after_s, drain_s / 2)


def load_config(path: str | Path) -> ClusterConfig:
    """The configuration in a YAML file, with the password of redis.password_file where that can be read.

    ConfigError lists every problem with its line.
    """
    config = load(Path(path), ClusterConfig)
    return dataclasses.replace(config, redis=_with_password(config.redis))


def _with_password(given: RedisConfig) -> RedisConfig:
    url = given.url
    if url is None or given.password_file is None or "@" in url:
        return given
    try:
        password = Path(given.password_file).read_text().strip()
    except OSError:
        return given  # a file is also checked where the cluster's secrets are not; who connects says what is missing
    scheme, _, rest = url.partition("://")
    return dataclasses.replace(given, url=f"{scheme}://:{quote(password, safe='')}@{rest}")


def can_change_role(config: ClusterConfig) -> bool:
    """Whether a worker of one pool can do the other's work as one that was started there."""
    if config.mode != "split" or not config.scaling.role_change:
        return False
    names = ("device", "tensor_parallel", "num_gpus", "resources", "accelerator_type", "labels", "pace")
    return all(getattr(config.prefill, name) == getattr(config.decode, name) for name in names)


def to_plain(config: ClusterConfig) -> dict[str, Any]:
    """The configuration as dicts, lists and scalars."""
    return dataclasses.asdict(config)


def from_plain(data: dict[str, Any]) -> ClusterConfig:
    """The inverse of `to_plain`."""
    return TypeAdapter(ClusterConfig).validate_python(data)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Engine:
    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    engine: EngineOptions


def json_schema() -> dict[str, Any]:
    """The JSON Schema of the YAML, with what each key means as its description."""
    schema = TypeAdapter(ClusterConfig).json_schema()
    inherited = TypeAdapter(_Engine).json_schema()["$defs"]["EngineOptions"]["properties"]
    for name, properties in schema["$defs"]["PoolConfig"]["properties"].items():
        if "description" in inherited.get(name, {}):
            properties.setdefault("description", inherited[name]["description"])
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
