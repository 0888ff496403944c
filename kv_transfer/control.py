"""The control connection of a pair: framed messages, heartbeats, and the judgement that a peer is gone.

The dialling end pings, the other answers; either end that hears nothing for peer_timeout_s
raises PeerLostError. Any thread may send; one thread reads.
"""

from __future__ import annotations

import select
import socket
import threading
import time
from collections.abc import Callable

from kv_transfer.errors import PeerLostError, ProtocolError
from protos import framing
from protos.transfer_pb2 import ControlMessage, Ping, Pong

MAX_STRANGER_BYTES = 64 * 1024
"""Largest message taken from a peer that has not proved itself."""
MAX_PEER_BYTES = 8 * 1024 * 1024
_READ_BYTES = 64 * 1024


class ControlConnection:
    """Messages over one connected socket, which it owns."""

    def __init__(self, sock: socket.socket, *, peer: str, send_timeout_s: float) -> None:
        self.peer = peer
        """The other end, for messages."""
        self.max_bytes = MAX_STRANGER_BYTES
        self._sock = sock
        self._sock.settimeout(send_timeout_s)
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._buffer = bytearray()
        self._send_lock = threading.Lock()

    def send(self, message: ControlMessage) -> bytes:
        """Send one message within the send timeout, and return its body; PeerLostError if it cannot be sent."""
        data = framing.pack(message)
        try:
            with self._send_lock:
                self._sock.sendall(data)
        except OSError as error:
            raise PeerLostError(f"{self.peer} does not take messages: {error or type(error).__name__}") from error
        return data[framing.HEADER_BYTES :]

    def read(self, timeout_s: float) -> bytes | None:
        """The body of the next message; None if it is not complete within timeout_s."""
        deadline = time.monotonic() + timeout_s
        while (body := self._take()) is None:
            left = deadline - time.monotonic()
            if not self._poll.poll(max(0.0, left) * 1000):
                return None
            try:
                data = self._sock.recv(_READ_BYTES)
            except OSError as error:
                raise PeerLostError(f"the connection to {self.peer} broke: {error}") from error
            if not data:
                raise PeerLostError(f"{self.peer} closed the connection")
            self._buffer += data
        return body

    def parse(self, body: bytes) -> ControlMessage:
        """Decode a body; ProtocolError if it is none."""
        try:
            return framing.parse(ControlMessage, body)
        except framing.FramingError as error:
            raise ProtocolError(f"{self.peer}: {error}") from error

    def watch(
        self,
        handle: Callable[[ControlMessage], None],
        *,
        check: Callable[[], None],
        pings: bool,
        heartbeat_s: float,
        timeout_s: float,
    ) -> None:
        """Give every message to `handle` until the peer is lost; always ends with a PairError.

        `check` is called at least once a heartbeat while the peer lives, and may raise.
        """
        heard = time.monotonic()
        next_ping = heard
        count = 0
        while True:
            check()
            now = time.monotonic()
            if pings and now >= next_ping:
                count += 1
                self.send(ControlMessage(ping=Ping(count=count)))
                next_ping = now + heartbeat_s
            wake = min(next_ping, heard + timeout_s) if pings else heard + timeout_s
            body = self.read(max(0.0, wake - now))
            if body is not None:
                heard = time.monotonic()
                self._dispatch(self.parse(body), handle)
            elif time.monotonic() - heard >= timeout_s:
                raise PeerLostError(f"{self.peer} was silent for {timeout_s:g} s")

    def shutdown(self) -> None:
        """End the conversation: both ends' reads and sends fail from now on; from any thread."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass

    def close(self) -> None:
        """Give the socket back; only once no thread reads or sends."""
        self._sock.close()

    def _dispatch(self, message: ControlMessage, handle: Callable[[ControlMessage], None]) -> None:
        kind = message.WhichOneof("message")
        if kind == "ping":
            self.send(ControlMessage(pong=Pong(count=message.ping.count)))
        elif kind != "pong":
            handle(message)

    def _take(self) -> bytes | None:
        """The first whole message in the buffer."""
        if len(self._buffer) < framing.HEADER_BYTES:
            return None
        try:
            length = framing.body_length(bytes(self._buffer[: framing.HEADER_BYTES]), self.max_bytes)
        except framing.FramingError as error:
            raise ProtocolError(f"{self.peer}: {error}") from error
        end = framing.HEADER_BYTES + length
        if len(self._buffer) < end:
            return None
        body = bytes(self._buffer[framing.HEADER_BYTES : end])
        del self._buffer[:end]
        return body


def dial(address: str, *, timeout_s: float) -> socket.socket:
    """Connect to host:port; PeerLostError if nobody answers."""
    host, _, port = address.rpartition(":")
    try:
        return socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s)
    except (OSError, ValueError) as error:
        raise PeerLostError(f"nobody answers at {address}: {error}") from error
