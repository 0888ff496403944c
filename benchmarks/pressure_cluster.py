"""The paced cluster that is put under pressure, and what may be left behind in it: nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.footprint import name
from benchmarks.serve_cluster import Cluster
from benchmarks.split_vs_colocated import EXAMPLE
from cluster.health import Member, gather
from cluster.run_dir import ProcessRef, RunDir, session_members

MODEL = EXAMPLE.with_name("rehearsal-model")
PROMPT_TOKEN_US = 20.0
"""As an H200 with Llama-8B (deploy/examples/rehearsal.yaml)."""
PREFILL_STEP_MS = 1.0
NUM_BLOCKS, BLOCK_SIZE = 16384, 16
DRAIN_S = 2.0
LOOK_EVERY_S = 0.25
EMPTY = ("num_running", "num_waiting", "num_reserved", "open_tickets", "open_sends")
"""What a worker counts of requests; 0 where none is left."""


def paced_yaml(*, step_ms: float, at_once: int, decode_workers: int, router: dict[str, Any]) -> dict[str, Any]:
    """One prefill worker, and decode workers whose steps take `step_ms` however many of `at_once` streams are in them:
    what others suffer is then not what a larger batch costs."""
    pool = {"device": "cpu", "num_cpus": 0.25, "max_step_tokens": 2048}
    prefill = {"fixed_ms": PREFILL_STEP_MS, "prompt_token_us": PROMPT_TOKEN_US}
    return {
        "mode": "split",
        "model": {"path": str(MODEL), "load_format": "dummy"},
        "cache": {"block_size": BLOCK_SIZE, "num_blocks": NUM_BLOCKS},
        "prefill": {**pool, "workers": 1, "pace": prefill},
        "decode": {**pool, "workers": decode_workers, "max_running": at_once, "pace": {"fixed_ms": step_ms}},
        "router": {"port": 0, **router},
        "drain_s": DRAIN_S,
    }


@dataclass(frozen=True, slots=True)
class Target:
    """What is put under pressure, as the sections see it."""

    address: str
    left_behind: Callable[[float], list[str]]
    """What is still held after at most so many seconds; empty if nothing."""
    router_rss_mib: Callable[[], float]


def target_of(cluster: Cluster) -> Target:
    """A cluster that runs."""
    return Target(cluster.address, partial(left_behind, cluster.run_dir), partial(router_rss_mib, cluster))


def left_behind(run_dir: RunDir, timeout_s: float) -> list[str]:
    """What a cluster without requests still holds after at most `timeout_s`; empty if nothing."""
    until, pause = time.monotonic() + timeout_s, threading.Event()
    while True:
        found = [line for member in gather(run_dir).members for line in held_by(member)]
        if not found or time.monotonic() > until:
            return found
        pause.wait(LOOK_EVERY_S)


def held_by(member: Member) -> list[str]:
    """What a worker or a router holds of requests, a line each."""
    numbers = member.numbers
    if member.state != "ready":
        return [f"{member.member_id} is {member.state}"]
    names = EMPTY if member.kind == "worker" else ("in_flight", "queued")
    found = [f"{member.member_id}: {field} {numbers[field]:.0f}" for field in names if numbers[field]]
    if member.kind == "worker" and numbers["free_blocks"] != numbers["num_blocks"]:
        found.append(f"{member.member_id}: {numbers['free_blocks']:.0f} of {numbers['num_blocks']:.0f} blocks free")
    return found


def router_rss_mib(cluster: Cluster) -> float:
    """Memory of the router's process."""
    (pid,) = [
        member.pid
        for member in session_members(ProcessRef.of(cluster.process.pid))
        if name(member.pid).startswith("ray::RouterActo")
    ]
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024
