"""How a process of ours begins: where it logs, and what must stay out of the log."""

from __future__ import annotations

from pathlib import Path

from cluster import logs
from cluster.config import ClusterConfig
from cluster.run_dir import RunDir


def begin(role: str, name: str, config: ClusterConfig, run_dir: str, redis_url: str) -> bytes:
    """Open the log of a process, `<name>-<role>.log`; returns the cluster secret."""
    directory = RunDir(Path(run_dir))
    secret = directory.secret("cluster")
    log_dir = Path(config.observability.log_dir) if config.observability.log_dir else directory.logs
    logs.configure(
        role,
        worker_id=name,
        level=config.observability.log_level,
        target=log_dir / (f"{name}-{role}.log" if name else f"{role}.log"),
        secrets=[secret, _password(redis_url)],
    )
    return secret.encode()


def _password(url: str) -> str:
    return url.partition("@")[0].rpartition(":")[2] if "@" in url else ""
