"""gRPC's thread for finished operations gives way to the event loop, where both share a core.

grpc.aio has one such thread in a process. It is woken for every message that is written, and Linux then lets it run in
place of the event loop, only to tell the loop of one more operation: two changes of thread for each message. As a
thread of the class for batch jobs it interrupts nobody when it wakes, and gets its turn when the loop has nothing to
do, which is when the loop needs it. Its share of a core stays what it is: with a lower priority it would wait for the
other programs of a busy machine too, and every stream with it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading


def give_way() -> int:
    """Let this process's thread interrupt nobody, once grpc.aio runs; gives how many were found (elsewhere than on
    Linux, or with another grpc.aio, none)."""
    if sys.platform != "linux":
        return 0
    pollers = [thread.native_id for thread in threading.enumerate() if thread.name.endswith("(_poll_wrapper)")]
    for native_id in pollers:
        if native_id is not None:
            with contextlib.suppress(OSError):  # it has just ended, or a sandbox forbids it
                os.sched_setscheduler(native_id, os.SCHED_BATCH, os.sched_param(0))
    return len(pollers)
