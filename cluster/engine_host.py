"""Joins engine, KV transfer and the two crafts inside an engine process.

The model is loaded once and outlives its fronts. Each front that connects gets a `HostSession`.
"""

from __future__ import annotations

import logging
import threading
import time

from cluster.engine_messages import engine_stats, kv_layout
from cluster.host_session import HostSession
from decode_pool.config import DecodeOptions
from engine.engine import Engine
from engine.ipc import EngineServer, Send
from kv_transfer.config import TransferConfig
from kv_transfer.layout import KVLayout
from protos import worker_pb2 as pb

log = logging.getLogger(__name__)

NOTICE_S = 0.3
"""A drain takes at least so long: what routers have sent meanwhile is refused by word, and not by a lost connection."""


class EngineHost:
    """One rank's engine, ready for a front."""

    def __init__(
        self,
        engine: Engine,
        *,
        role: str,
        model_name: str,
        max_running: int,
        decode: DecodeOptions,
        transfer: TransferConfig,
        secret: bytes,
        socket_path: str,
    ) -> None:
        self.engine = engine
        self.role = role
        self.model_name = model_name
        self.max_running = max_running
        self.decode = decode
        self.transfer = transfer
        self.secret = secret
        self.draining = False
        """Whether new work is refused."""
        self._session: HostSession | None = None
        self._drained = threading.Event()
        self._server = EngineServer(socket_path, self.open_session)

    def start(self) -> None:
        """Warm the kernels, start the loop, listen for a front."""
        self.engine.runner.warm_up()
        self.engine.loop.on_idle = self._on_idle
        self.engine.start()
        self._server.start()

    def stop(self) -> None:
        """Hang up on the front, end everything, stop the loop."""
        self._server.stop()
        if self._session is not None:
            self._session.close()
        self.engine.stop()

    def drain(self, timeout_s: float) -> bool:
        """Refuse new work and wait for what runs; False if time was up first.

        The front hears of it at once; it tells the routers, and may have handed back what still generates.
        """
        begun = time.monotonic()
        self.draining = True
        session = self._session
        # also so that the loop comes by even if it is idle already
        self.engine.loop.post(lambda: session.tell_draining() if session is not None else None)
        if not self._drained.wait(timeout_s):
            return False
        time.sleep(max(0.0, min(begun + NOTICE_S, begun + timeout_s) - time.monotonic()))
        return True

    def set_role(self, order: pb.SetRole) -> None:
        """Whose work is done from now on; the engine loop's thread calls it."""
        self.role = order.role
        if order.HasField("prompt_share"):
            self.engine.scheduler.set_prompt_share(order.prompt_share)
        log.info("role", extra={"role": order.role, "prompt_share": order.prompt_share})

    def stats(self) -> pb.WorkerStats:
        """Counters and gauges of the engine and of the present epoch's transfers."""
        return self._session.stats() if self._session is not None else engine_stats(self.engine)

    def layout(self) -> KVLayout:
        """What a peer must agree with before any KV travels."""
        return kv_layout(self.engine.runner, self.engine.model_hash)

    def _on_idle(self) -> None:
        if self.draining and (self._session is None or self._session.num_open() == 0):
            self._drained.set()

    def open_session(self, send: Send) -> HostSession:
        """A front has connected; the session before must be closed."""
        self._session = HostSession(self, send)
        return self._session
