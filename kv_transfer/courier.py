"""Says of finished jobs that all was announced, while the pair's data thread may be waiting for the engine.

A prompt's last piece is followed by its first token. The data thread has by then taken up the next prompt, and waits on
the GPU for KV that is being computed; so the word goes out on a thread of its own.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from kv_transfer.jobs import SendJob


class Courier:
    """One pair's thread for it."""

    def __init__(self, name: str, deliver: Callable[[SendJob], None]) -> None:
        """`deliver` is called with each job; it must not raise."""
        self._deliver = deliver
        self._jobs: queue.SimpleQueue[SendJob | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin; what was posted before goes out now."""
        self._thread.start()

    def post(self, job: SendJob) -> None:
        """Deliver a job; returns at once."""
        self._jobs.put(job)

    def stop(self) -> None:
        """End the thread once the delivery under way, which is bounded, is over."""
        self._jobs.put(None)
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._deliver(job)
