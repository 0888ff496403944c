"""Ends our processes on one node before the node goes: `python -m cluster.leave_node [--timeout S]`.

For whoever takes nodes away, such as the preStop hook of a pod: `ray start --block` passes SIGTERM to none of Ray's
actors, and a raylet that ends kills them at once. Steps:

1. Ray is told that the node leaves, so that it starts nothing here again; what ends here comes back elsewhere.
2. Every front, engine and router of ours here gets SIGTERM, and drains.
3. Wait until they have ended. What still runs at the bound is left to the node's end.

Exit code: 0 if nothing of ours is left, else 1. A second run finds nothing to do, and is no error.
"""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
import time
from pathlib import Path
from typing import Any

from cluster.children import send_signal
from cluster.launch import wait_gone
from cluster.process import NodeProcess
from cluster.run_dir import RunDir

MARGIN_S = 20.0
"""What a process may take to end beyond its drain."""
GCS_TIMEOUT_S = 5.0
DRAINING_ROLES = ("front", "router", "engine")


def processes_here(run_dir: RunDir) -> list[NodeProcess]:
    """The living processes of ours on this node that drain at SIGTERM."""
    found = [NodeProcess.read(path) for path in sorted(run_dir.processes.glob("*.json"))]
    return [one for one in found if one and one.role.startswith(DRAINING_ROLES) and one.process.is_alive()]


def announce(gcs_address: str, node_id: str, bound_s: float) -> str:
    """Tell Ray that this node leaves within `bound_s`; "" if it has heard, else why it has not."""
    ray: Any = importlib.import_module("ray")
    autoscaler_pb2: Any = importlib.import_module("ray.core.generated.autoscaler_pb2")
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    until_ms = int((time.time() + bound_s) * 1000)
    try:
        gcs = ray._raylet.GcsClient(address=gcs_address)
        accepted, why = gcs.drain_node(node_id, reason, "pdserve leaves this node", until_ms, timeout=GCS_TIMEOUT_S)
    except (ray.exceptions.RayError, RuntimeError, OSError) as error:
        return str(error)
    return "" if accepted else str(why)


def leave(run_dir: RunDir, timeout_s: float | None = None) -> list[NodeProcess]:
    """Carry out the steps; what still runs at the end. `timeout_s`: default is the longest drain and a margin."""
    here = processes_here(run_dir)
    if not here:
        return []
    bound_s = max(one.drain_s for one in here) + MARGIN_S if timeout_s is None else timeout_s
    until = time.monotonic() + bound_s
    for gcs_address, node_id in {(one.gcs_address, one.node_id) for one in here if one.node_id}:
        if problem := announce(gcs_address, node_id, bound_s):
            print(f"Ray was not told that node {node_id} leaves: {problem}", file=sys.stderr)
    for one in here:
        send_signal(one.process, signal.SIGTERM)
    return [one for one in here if not wait_gone(one.process, max(0.0, until - time.monotonic()))]


def main() -> int:
    """Entry point; see the module."""
    parser = argparse.ArgumentParser(prog="cluster.leave_node", description="End pdserve's processes on this node.")
    parser.add_argument("--timeout", type=float, metavar="S", help="default: the YAML's drain_s and 20 s")
    parser.add_argument("--run-dir", type=Path, help="of this node; default: $PDSERVE_NODE_DIR, else $PDSERVE_RUN_DIR")
    given = parser.parse_args()
    run_dir = RunDir(given.run_dir) if given.run_dir else RunDir.of_node(str(RunDir.default().path))
    left = leave(run_dir, given.timeout)
    for one in left:
        print(f"still running: {one.role}, pid {one.process.pid}", file=sys.stderr)
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
