"""One connection between rank 0 and another rank of its worker: protobuf over a Unix socket.

    OPEN --the other end is gone, silent for timeout_s, or does not read--> ENDED
      '--close--------------------------------------------------------------^

Both ends say something every HEARTBEAT_S, so that one that was stopped is found out too. How it ended is told once,
to `on_end`, unless this end closed it.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Callable

from engine.errors import RankLostError
from protos import framing
from protos import ranks_pb2 as pb

log = logging.getLogger(__name__)

HEARTBEAT_S = 1.0
CLOSE_TIMEOUT_S = 5.0
"""Bound of a wait for this end's threads, which have nothing left to wait for."""


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
        """`peer` names the other end in errors."""
        self.peer = peer
        self._connection = connection
        self._timeout_s = timeout_s
        self._handle = handle
        self._on_end = on_end
        self._sending = threading.Lock()
        self._ending = threading.Lock()
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(target=target, name=f"rank-{name}", daemon=True)
            for name, target in (("reader", self._read), ("heartbeat", self._beat))
        ]
        connection.settimeout(timeout_s)

    def start(self) -> None:
        """Begin to read, and to say that this end lives."""
        for thread in self._threads:
            thread.start()

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
                self._end(f"{self.peer} has not read for {self._timeout_s:g} s")
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
                if message.WhichOneof("message") != "heartbeat":
                    self._handle(message)
            self._end(f"{self.peer} has hung up")
        except TimeoutError:
            self._end(f"{self.peer} has said nothing for {self._timeout_s:g} s")
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

    def _end(self, reason: str) -> None:
        with self._ending:
            if self._ended.is_set():
                return
            self._ended.set()
        self._shut_down()
        self._on_end(reason)

    def _shut_down(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
