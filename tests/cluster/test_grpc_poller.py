"""gRPC's thread gives way; nothing else in the process does."""

import subprocess
import sys

import pytest

# In a process of its own, for a priority that was lowered stays so.
SCENARIO = """
import asyncio, os, threading
import grpc
from cluster.grpc_poller import NICENESS, give_way

async def main():
    assert give_way() == 0, "gRPC does not run yet"
    server = grpc.aio.server()
    await server.start()
    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    assert give_way() == 1
    found = {os.getpriority(os.PRIO_PROCESS, each.native_id): each.name for each in threading.enumerate()}
    assert set(found) == {before, NICENESS}, found
    assert found[before] == "MainThread", found
    await server.stop(None)

asyncio.run(main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities of their own on Linux")
def test_gives_way() -> None:
    subprocess.run([sys.executable, "-c", SCENARIO], check=True, timeout=60)
