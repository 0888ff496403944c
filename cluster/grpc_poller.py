"""gRPC's thread for finished operations gives way to the event loop, where both share a core.

grpc.aio has one such thread in a process. It is woken for every message that is written, and Linux then lets it run in
place of the event loop, only to tell the loop of one more operation: two changes of thread for each message. At a lower
priority it waits until the loop has nothing to do, which is when the loop needs it. On a core of its own it runs as
before.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading

NICENESS = 8
"""Enough not to interrupt the loop; small enough to get its turn on a core that others keep busy."""


def give_way() -> int:
    """Lower the priority of this process's thread, once grpc.aio runs; gives how many were found (elsewhere than on
    Linux, or with another grpc.aio, none). It cannot be raised again.
    """
    if sys.platform != "linux":
        return 0
    pollers = [thread.native_id for thread in threading.enumerate() if thread.name.endswith("(_poll_wrapper)")]
    for native_id in pollers:
        if native_id is not None:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.setpriority(os.PRIO_PROCESS, native_id, NICENESS)
    return len(pollers)
