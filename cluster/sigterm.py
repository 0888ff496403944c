"""SIGTERM as a call on a thread, also in a process whose main thread is busy in native code.

Python runs its own signal handlers only when the main thread next runs bytecode, which in a Ray
worker may be never; the wake-up descriptor is written by the C handler at once.
"""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable


def on_sigterm(function: Callable[[], None]) -> None:
    """Have a thread call `function` at the first SIGTERM; main thread only (ValueError elsewhere)."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.signal(signal.SIGTERM, lambda _number, _frame: None)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)

    def wait() -> None:
        with reader, writer:
            while (number := reader.recv(1)) and number[0] != signal.SIGTERM:
                pass
            function()

    threading.Thread(target=wait, name="sigterm", daemon=True).start()
