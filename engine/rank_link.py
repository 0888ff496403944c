"""One connection between rank 0 and another rank of its worker: protobuf over a Unix socket.

    OPEN --the other end is gone, silent for too long, or does not read--> ENDED
      '--close-------------------------------------------------------------^

Both ends say something every HEARTBEAT_S, so that one that was stopped is found out too. It is killed then: only a
process that is dead is started again, and no rank can go on before all have been. How a link ended is told once, to
`on_end`, unless this end closed it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import select
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable

from engine.errors import RankLostError
from protos import framing
from protos import ranks_pb2 as pb

log = logging.getLogger(__name__)

HEARTBEAT_S = 1.0
START_SILENCE_S = 60.0
"""Longest silence at the start, when loading a model or compiling a kernel may keep a process from saying anything."""
CLOSE_TIMEOUT_S = 5.0
"""Bound of a wait for this end's threads, which have nothing left to wait for."""
_CREDENTIALS = struct.Struct("3i")
"""What Linux says of a Unix socket's other end: pid, uid, gid."""


class RankLink:
    """Either end of a connection. A thread reads and calls `handle`; any thread may send."""

    def __init__(
        self,
        connection: socket.socket,
        peer: str,
        *,
        timeout_s: float,
        handle: Callable[[pb.RankMessage], None],
        on_end: Callable[[str], None],
    ) -> None:
        """`peer` names the other end in errors; it may be silent for `timeout_s` once it is `settled`."""
        self.peer = peer
        self._connection = connection
        self._timeout_s = timeout_s
        self._settled = False
        self._handle = handle
        self._on_end = on_end
        self._sending = threading.Lock()
        self._ending = threading.Lock()
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(target=target, name=f"rank-{name}", daemon=True)
            for name, target in (("reader", self._read), ("heartbeat", self._beat))
        ]
        self._heard_at = time.monotonic()
        """When the other end last said something; infinite while that is being handled."""
        connection.settimeout(max(timeout_s, START_SILENCE_S))

    def start(self) -> None:
        """Begin to read, and to say that this end lives."""
        for thread in self._threads:
            thread.start()

    def settle(self) -> None:
        """Models are loaded and kernels warm at both ends: from now on, silence is no longer work."""
        self._settled = True

    def send(self, message: pb.RankMessage) -> None:
        """Send a message; RankLostError if the other end is gone or does not read within the timeout."""
        self.send_packed(framing.pack(message))

    def send_packed(self, data: bytes) -> None:
        """Send a message that has been packed already."""
        if not self._ended.is_set():
            try:
                with self._sending:
                    self._connection.sendall(data)
            except TimeoutError:
                self._end_silent("has not read")
            except OSError as error:
                self._end(f"{self.peer} is gone: {error}")
            else:
                return
        raise RankLostError(f"the connection to {self.peer} has ended")

    def hang_up(self) -> None:
        """End it from this end; what was sent before still arrives."""
        with self._ending:
            self._ended.set()
        self._shut_down()

    def close(self) -> None:
        """Hang up, and wait for this end's threads."""
        self.hang_up()
        for thread in self._threads:
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join(CLOSE_TIMEOUT_S)
        self._connection.close()

    def _read(self) -> None:
        try:
            while (message := framing.read_message(self._connection, pb.RankMessage)) is not None:
                self._heard_at = math.inf
                if message.WhichOneof("message") != "heartbeat":
                    self._handle(message)
                self._heard_at = time.monotonic()
            self._end(f"{self.peer} has hung up")
        except TimeoutError:
            self._end_silent("has said nothing")
        except OSError as error:
            self._end(f"{self.peer} is gone: {error}")
        except Exception as error:
            log.exception("a message of another rank could not be taken in")
            self._end(f"a message of {self.peer} could not be taken in: {error}")

    def _beat(self) -> None:
        beat = framing.pack(pb.RankMessage(heartbeat=pb.RankHeartbeat()))
        with contextlib.suppress(RankLostError):
            while not self._ended.wait(min(HEARTBEAT_S, self._timeout_s / 4)):
                self.send_packed(beat)
                if time.monotonic() - self._heard_at > self._limit_s() and not self._has_mail():
                    self._end_silent("has said nothing")

    def _has_mail(self) -> bool:
        """Whether there is something to read: then it is this end that was held up."""
        poll = select.poll()
        poll.register(self._connection, select.POLLIN)
        return bool(poll.poll(0))

    def _limit_s(self) -> float:
        return self._timeout_s if self._settled else max(self._timeout_s, START_SILENCE_S)

    def _end_silent(self, how: str) -> None:
        if not self._ended.is_set():
            self._kill_peer()
        self._end(f"{self.peer} {how} for {self._limit_s():g} s")

    def _end(self, reason: str) -> None:
        with self._ending:
            if self._ended.is_set():
                return
            self._ended.set()
        self._shut_down()
        self._on_end(reason)

    def _kill_peer(self) -> None:
        """End the process at the other end. It is there: else the kernel would have closed the connection."""
        with contextlib.suppress(OSError):
            credentials = self._connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            pid, _, _ = _CREDENTIALS.unpack(credentials)
            if pid not in (0, os.getpid()):  # 0: it is in another pid namespace
                log.error("%s, process %d, is silent: killing it", self.peer, pid)
                os.kill(pid, signal.SIGKILL)

    def _shut_down(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
