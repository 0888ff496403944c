"""Who goes first on cores that processes and threads share: what carries tokens, before what computes them.

gRPC's thread: grpc.aio has one thread in a process for finished operations. It is woken for every message that is
written, and Linux then lets it run in place of the event loop, only to tell the loop of one more operation: two changes
of thread for each message. At a lower priority it waits until the loop has nothing to do, which is when the loop needs
it. On a core of its own it runs as before.

Engines on CPUs: a step computes for milliseconds, and the router and the fronts beside it need a core for some hundred
microseconds at a time, upon which every stream waits.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterable

POLLER_NICENESS = 8
"""Enough not to interrupt the loop; small enough to get its turn on a core that others keep busy."""
ENGINE_NICENESS = 5
"""A core that both want goes to the others for three quarters of the time."""


def poller_gives_way() -> int:
    """Lower the priority of gRPC's thread, once grpc.aio runs; gives how many were found (elsewhere than on Linux, or
    with another grpc.aio, none). It cannot be raised again.
    """
    if sys.platform != "linux":
        return 0
    pollers = [thread.native_id for thread in threading.enumerate() if thread.name.endswith("(_poll_wrapper)")]
    return _lower((native_id for native_id in pollers if native_id is not None), POLLER_NICENESS)


def engine_gives_way() -> int:
    """Lower the priority of all threads that this process has, and of those they start; gives how many there were
    (elsewhere than on Linux none). It cannot be raised again.
    """
    if sys.platform != "linux":
        return 0
    return _lower(map(int, os.listdir("/proc/self/task")), ENGINE_NICENESS)


def _lower(native_ids: Iterable[int], niceness: int) -> int:
    num = 0
    for native_id in native_ids:
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.setpriority(os.PRIO_PROCESS, native_id, niceness)
            num += 1
    return num
