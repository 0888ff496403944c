"""A short-lived Ray driver: `python -m cluster.deploy up|down FILE`; tells the supervisor by JSON lines.

A driver ends itself when the GCS is away for a minute, so nothing of ours stays in one: `up` makes the
controller and waits until all is ready, `down` drains and ends what `up` made.

Events: {"event": "ready", "id": ..., **what it says}, {"event": "failed", "message": ...}, {"event": "done"}.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import IO, Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from cluster import pool
from cluster.controller import CONTROLLER, Deployment, create_controller
from cluster.orders import DeployOrder
from cluster.ray_errors import explain

CALL_TIMEOUT_S = 60.0


class Driver:
    """Carries out one order."""

    def __init__(self, order: DeployOrder, events: IO[str]) -> None:
        self._order = order
        self._events = events

    def up(self) -> None:
        """Deploy, and tell of each worker and router once it is ready."""
        until = time.monotonic() + self._order.timeout_s
        deployment = Deployment(pool.Surroundings(**self._order.around), self._order.actors)
        controller = create_controller(deployment)
        members = ray.get(controller.deploy.remote(deployment.around.config), timeout=self._order.timeout_s)
        left = max(1.0, until - time.monotonic())
        waits = {controller.wait_ready.remote(member, left): member for member in members}
        pending = list(waits)
        while pending:
            done, pending = ray.wait(pending, num_returns=1, timeout=max(0.0, until - time.monotonic()) + 5.0)
            if not done:
                silent = ", ".join(sorted(waits[ref] for ref in pending))
                raise GetTimeoutError(f"not ready after {self._order.timeout_s:g} s: {silent}")
            member = waits[done[0]]
            self._tell("ready", **{**ray.get(done[0]), "id": member, "kind": members[member]})
        self._tell("done")

    def down(self) -> None:
        """Drain within the bound, then end everything."""
        try:
            controller = ray.get_actor(CONTROLLER, namespace=pool.NAMESPACE)
        except ValueError:
            self._tell("done")
            return
        if self._order.timeout_s > 0:
            drained: Any = ray.get(
                controller.drain.remote(self._order.timeout_s), timeout=self._order.timeout_s + CALL_TIMEOUT_S
            )
            self._tell("drained", members=drained)
        ray.get(controller.stop.remote(), timeout=CALL_TIMEOUT_S)
        pool.remove_actor(CONTROLLER)
        self._tell("done")

    def _tell(self, event: str, **more: Any) -> None:
        print(json.dumps({"event": event, **more}, default=str), file=self._events, flush=True)


def main() -> int:
    """Run one order; the exit code is 0 when it was carried out."""
    events = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    command, path = sys.argv[1:]
    driver = Driver(DeployOrder(**json.loads(Path(path).read_text())), events)
    try:
        ray.init(address=driver._order.address, namespace=pool.NAMESPACE, log_to_driver=False, configure_logging=False)
        {"up": driver.up, "down": driver.down}[command]()
    except (RayError, GetTimeoutError, pool.PlacementError, ConnectionError, RuntimeError, ValueError) as error:
        driver._tell("failed", message=explain(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
