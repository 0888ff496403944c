"""How a command reaches the Redis of a cluster: by the run directory, or by the `redis.url` of a YAML."""

from __future__ import annotations

import json
from typing import Any

from cluster.cluster_store import ClusterStore, ClusterStoreError, Wish
from cluster.config import ClusterConfig
from cluster.run_dir import RunDir, RunState

TIMEOUT_S = 2.0


class NotRunningError(RuntimeError):
    """There is no cluster to speak to; the message says where it was looked for."""


def running_config(run_dir: RunDir) -> dict[str, Any]:
    """The configuration that `up` started with, as plain data."""
    return dict(json.loads(run_dir.config_file.read_text()))


def current_config(run_dir: RunDir) -> dict[str, Any]:
    """The configuration that is wanted now; that of `up` where Redis does not say."""
    try:
        store = open_store(run_dir)
    except NotRunningError:
        return running_config(run_dir)
    try:
        wish = store.wish()
    except ClusterStoreError:
        wish = None
    finally:
        store.close()
    return running_config(run_dir) if wish is None else wish.config


def redis_url(run_dir: RunDir, state: RunState, config: dict[str, Any]) -> str:
    """The cluster's Redis with its password; empty while an embedded one has not started yet."""
    given: str | None = config["redis"]["url"]
    if given or not state.redis_url:
        return given or ""
    return f"redis://:{run_dir.secret('valkey')}@{state.redis_url.removeprefix('redis://')}"


def open_store(run_dir: RunDir, config: ClusterConfig | None = None) -> ClusterStore:
    """The store of the cluster that runs from here; where none does, of the one at the `redis.url` of `config`.

    NotRunningError if neither is known. Asks Redis nothing yet.
    """
    state = run_dir.read_state()
    if state is not None:
        url = redis_url(run_dir, state, running_config(run_dir))
        if not url:
            raise NotRunningError(f"the cluster of {run_dir.path} is only starting: try again when it is up")
    else:
        url = (config.redis.url if config is not None else None) or ""
        if not url:
            raise NotRunningError(f"no cluster is running (run directory {run_dir.path})")
    return ClusterStore(url, timeout_s=TIMEOUT_S)


def read_wish(store: ClusterStore) -> Wish:
    """What is wanted; NotRunningError if nobody has wanted anything yet."""
    wish = store.wish()
    if wish is None:
        raise NotRunningError("nothing is wanted in this cluster's Redis yet: it is starting, or has been stopped")
    return wish
