"""What a user may set about a router."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from router.local_prefill import LocalPrefillConfig
from router.reckoning import KvAwareConfig
from router.tenant_config import TenantConfig, problem_of

PolicyName = Literal["round_robin", "least_loaded", "kv_aware"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ResumeConfig:
    """How long a router keeps what belongs to resumable requests."""

    grace_s: float = 15.0
    """Seconds a resumable request goes on without anybody who follows it."""
    replay_s: float = 60.0
    """Seconds after its end for which its answer can be told again."""
    max_kept: int = 1000
    """Most ended requests that are kept for that."""

    def __post_init__(self) -> None:
        for name in ("grace_s", "replay_s"):
            if not 0 < getattr(self, name) <= 86400:
                raise ValueError(f"{name} must be more than 0 and at most 86400 seconds, got {getattr(self, name)}")
        if self.max_kept < 0:
            raise ValueError(f"max_kept must be at least 0, got {self.max_kept}")


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterConfig:
    """The front door: where it listens, whom it lets in, and how long it waits for whom."""

    host: str = "127.0.0.1"
    """Interface to listen on; `node`: the address by which Ray knows its machine."""
    port: int = 50051
    """TCP port for clients; 0: any free one. Of several routers each has the next one."""
    same_port: bool = False
    """Whether all routers listen on `port` (and serve metrics on metrics_port), each on a machine of its own: with
    ray.address, and resources of which each of those machines has enough for one router."""
    resources: dict[str, float] = field(default_factory=dict)
    """Ray resources that each router reserves, such as one of your own that only some nodes have:
    {"router_node": 1}."""
    replicas: int = 1
    """Routers, each a process of its own; any of them serves any client, and goes on with another one's resumable
    requests."""
    policy: PolicyName = "kv_aware"
    """How a worker is picked among those that can serve. round_robin: in turn; least_loaded: by what waits or runs
    there; kv_aware: by the time to the first token that is to be expected, with what each holds of the prompt."""
    kv_aware: KvAwareConfig = field(default_factory=KvAwareConfig)
    """How the policy kv_aware weighs."""
    local_prefill: LocalPrefillConfig = field(default_factory=LocalPrefillConfig)
    """When a decode worker computes a prompt itself instead of letting it wait for a prefill worker."""
    resume: ResumeConfig = field(default_factory=ResumeConfig)
    """Requests that outlive their stream."""
    serve_alone: bool = False
    """Whether, while no worker of one role is ready, those of the other do both jobs (mode split); else requests are
    refused until one comes back."""
    default_max_tokens: int = 256
    """Tokens to generate when the client names no number."""
    default_deadline_s: float = 600.0
    """Seconds a request may take when the client names no deadline."""
    max_queued: int = 1024
    """Requests that may wait here for a place on a worker; more are refused."""
    tenants: dict[str, TenantConfig] = field(default_factory=dict)
    """Tenants that have another weight than 1, or a limit of their own, by name. A call's tenant is told by its key
    (see api_keys_file) or, where no keys are asked for, by the metadata `pdserve-tenant`."""
    ttft_slo_s: float | None = None
    """Seconds from arrival within which the first token is to come: a request that would wait longer is refused at
    once, with the time after which to try again; default: only one that would miss its deadline is."""
    max_request_bytes: int = 4 * 1024 * 1024
    """Size limit of one client message, in bytes."""
    max_stream_buffer: int = 4096
    """Tokens a client may lag behind its own stream before it is cut off."""
    max_attempts: int = 4
    """How often a request is tried, on different workers, before it fails."""
    tls_cert: str | None = None
    """PEM file with the certificate chain; set it together with tls_key."""
    tls_key: str | None = None
    """PEM file with the private key."""
    api_keys_file: str | None = None
    """File with one API key a line, or a key, a space and the name of its tenant (default: `default`); when set,
    clients must send `authorization: Bearer <key>`."""
    retry_after_s: float = 1.0
    """Least seconds a refused client is told to wait; more where the queue takes longer to drain."""
    no_worker_grace_s: float = 1.0
    """Seconds a request waits for a worker to come (back) when none can serve."""
    reserve_timeout_s: float = 5.0
    """Seconds a worker may take to promise blocks."""
    abort_timeout_s: float = 2.0
    """Seconds a worker may take to confirm an abort."""
    connect_timeout_s: float = 5.0
    """Seconds a worker may take to describe itself on a new connection."""
    heartbeat_s: float = 1.0
    """Seconds between two heartbeats to a worker; each renews the leases there."""
    worker_silence_s: float = 2.0
    """Seconds without a word from a worker after which it is lost."""
    reconnect_max_s: float = 2.0
    """Longest pause between two attempts to connect to a worker, in seconds."""
    store_timeout_s: float = 2.0
    """Seconds a call to the store may take."""
    lease_ttl_s: float = 10.0
    """Seconds after which a router that stopped renewing its entry in the store is forgotten."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port must be between 0 and 65535, got {self.port}")
        if not 1 <= self.replicas <= 64:
            raise ValueError(f"replicas must be between 1 and 64, got {self.replicas}")
        if self.port + self.replicas - 1 > 65535:
            raise ValueError(f"port must leave room for {self.replicas} routers below 65536, got {self.port}")
        for name, amount in self.resources.items():
            if not (math.isfinite(amount) and amount >= 0):
                raise ValueError(f"resources.{name} must be at least 0, got {amount}")
        if self.policy not in get_args(PolicyName):
            raise ValueError(f"policy must be one of {', '.join(get_args(PolicyName))}, got {self.policy!r}")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key must be set together, only one of them is")
        for name in ("default_max_tokens", "max_request_bytes", "max_stream_buffer", "max_attempts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("max_queued", "no_worker_grace_s"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if name.endswith("_s") and name != "no_worker_grace_s" and value is not None and not value > 0:
                raise ValueError(f"{name} must be more than 0 seconds, got {value}")
        for tenant in self.tenants:
            if problem := problem_of(tenant):
                raise ValueError(f"tenants: the name {tenant!r} {problem}")
        if self.reserve_timeout_s > 30:
            raise ValueError(f"reserve_timeout_s must be at most 30 seconds, got {self.reserve_timeout_s}")
        if self.heartbeat_s >= self.worker_silence_s:
            raise ValueError(
                f"heartbeat_s ({self.heartbeat_s}) must be less than worker_silence_s ({self.worker_silence_s}): "
                "a worker that hears nothing cannot be told from one that is gone"
            )
