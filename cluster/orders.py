"""What the supervisor asks of the short-lived Ray driver, and how it hears back; neither needs Ray itself."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from cluster.children import Children, end
from cluster.run_dir import RunDir, write_private

EXIT_GRACE_S = 5.0


class OrderError(RuntimeError):
    """The driver could not carry out its order; the message is the cause."""


@dataclass(frozen=True, kw_only=True)
class DeployOrder:
    """What the driver needs to know."""

    address: str
    """host:port of the GCS."""
    around: dict[str, Any]
    """A `cluster.pool.Surroundings`, as plain data."""
    actors: str
    """Module that has the actor classes."""
    timeout_s: float
    """Of the whole wait for READY, or of the drain."""


async def carry_out(
    command: Literal["up", "down"],
    order: DeployOrder,
    *,
    run_dir: RunDir,
    children: Children,
    argv: tuple[str, ...],
    env: Mapping[str, str],
) -> AsyncIterator[dict[str, Any]]:
    """Run the driver and yield its events; OrderError if it fails. Closing the iterator ends the driver."""
    order_file = run_dir.path / "secrets" / f"order_{command}.json"
    write_private(order_file, json.dumps(asdict(order)))
    log_path = run_dir.logs / "deploy.log"
    with log_path.open("wb") as log:
        driver = children.spawn("deploy", [*argv, command, str(order_file)], env=env, log=log, pipe=True)
    reader = await driver.read_stdout()
    done = False
    try:
        while line := await reader.readline():
            event = json.loads(line)
            if event["event"] == "failed":
                raise OrderError(event["message"])
            done = event["event"] == "done"
            yield event
        await asyncio.wait([driver.exited], timeout=EXIT_GRACE_S)
        if not done:
            tail = "\n".join(log_path.read_text(errors="replace").splitlines()[-5:])
            raise OrderError(f"the deployment ended unasked; the end of {log_path}:\n{tail}")
    finally:
        await end(driver, grace_s=EXIT_GRACE_S)
        order_file.unlink(missing_ok=True)
