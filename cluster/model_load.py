"""How far the engines have loaded their model: engines tell, the supervisor hears, `up` shows it.

A datagram of JSON at a time through a unix socket of the run directory. One that finds no listener is no error:
nobody listens once all is ready, nor to an engine on another machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from cluster.run_dir import RunDir

log = logging.getLogger(__name__)

TELL_EVERY_S = 0.2
MAX_DATAGRAM_BYTES = 4096

OnLoad = Callable[[str, int, int], None]
"""Hears the engine's name, the bytes that are there, the bytes in all."""


class LoadTeller:
    """An engine's side: called with (done, total) bytes while the weights come, it tells them on and keeps the time."""

    def __init__(self, run_dir: RunDir, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._address = str(run_dir.load_socket)
        self._name = name
        self._clock = clock
        self._began: float | None = None
        self._tell_at = 0.0
        self._seconds = 0.0
        self._bytes = 0

    def __call__(self, done: int, total: int) -> None:
        """The first call starts the time, the one with all bytes stops it."""
        now = self._clock()
        if self._began is None:
            self._began = self._tell_at = now
        self._seconds, self._bytes = now - self._began, done
        if done < total and now < self._tell_at:
            return
        self._tell_at = now + TELL_EVERY_S
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.setblocking(False)
            sender.sendto(json.dumps([self._name, done, total]).encode(), self._address)
        if done == total:
            rate = round(done / 1e9 / self._seconds, 2) if self._seconds else None
            log.info("model loaded", extra={"bytes": done, "seconds": round(self._seconds, 3), "gb_per_s": rate})

    def stats(self) -> dict[str, float]:
        """Seconds and bytes of the load, for the metrics."""
        return {"load_seconds": self._seconds, "load_bytes": self._bytes}


@contextlib.contextmanager
def listen(path: Path, on_load: OnLoad) -> Iterator[None]:
    """Within the block the running event loop calls `on_load` for each datagram that comes to `path`."""
    path.unlink(missing_ok=True)
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.setblocking(False)
        receiver.bind(str(path))
        loop.add_reader(receiver, _receive, receiver, on_load)
        try:
            yield
        finally:
            loop.remove_reader(receiver)
            path.unlink(missing_ok=True)


def _receive(receiver: socket.socket, on_load: OnLoad) -> None:
    name, done, total = json.loads(receiver.recv(MAX_DATAGRAM_BYTES))
    on_load(name, done, total)
