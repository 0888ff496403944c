"""What computes, and gRPC's thread, give way; nothing else in the process does."""

import subprocess
import sys

import pytest

# In processes of their own, for a priority that was lowered stays so.
POLLER = """
import asyncio, os, threading
import grpc
from cluster.niceness import POLLER_NICENESS, poller_gives_way

async def main():
    assert poller_gives_way() == 0, "gRPC does not run yet"
    server = grpc.aio.server()
    await server.start()
    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    assert poller_gives_way() == 1
    found = {os.getpriority(os.PRIO_PROCESS, each.native_id): each.name for each in threading.enumerate()}
    assert set(found) == {before, POLLER_NICENESS}, found
    assert found[before] == "MainThread", found
    await server.stop(None)

asyncio.run(main())
"""
ENGINE = """
import os, threading
from cluster.niceness import ENGINE_NICENESS, engine_gives_way

never, found = threading.Event(), []
before = threading.Thread(target=never.wait, daemon=True)
before.start()
assert engine_gives_way() == 2
after = threading.Thread(target=lambda: found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id())))
after.start()
after.join()
found += [os.getpriority(os.PRIO_PROCESS, each.native_id) for each in threading.enumerate()]
assert found == [ENGINE_NICENESS] * 3, found
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities of their own on Linux")
@pytest.mark.parametrize("scenario", [POLLER, ENGINE], ids=["poller", "engine"])
def test_gives_way(scenario: str) -> None:
    done = subprocess.run([sys.executable, "-c", scenario], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
