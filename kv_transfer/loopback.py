"""A plain socket as a data channel: the small double of the real transports.

The receiver listens on its interface and tells its address and a random token through the
rendezvous; the sender dials and shows the token.
"""

from __future__ import annotations

import hmac
import secrets
import socket
import time

import torch

from kv_transfer.errors import TransportError
from kv_transfer.transport import ChannelOptions, Side, Transfer
from protos.rendezvous import Rendezvous

_TOKEN_BYTES = 16


class _Sent:
    """A send that is done."""

    def wait(self) -> None:
        """Return at once."""


class _Receive:
    """A receive that reads when it is waited for; waits must come in the order of the receives."""

    def __init__(self, sock: socket.socket, into: torch.Tensor) -> None:
        self._sock = sock
        self._into = into

    def wait(self) -> None:
        """Read the whole tensor."""
        _read_into(self._sock, self._into.numpy().data)


class LoopbackTransport:
    """One end of a pair's data socket."""

    def __init__(self, options: ChannelOptions, store: Rendezvous) -> None:
        try:
            self._sock = _accept(options, store) if options.side is Side.RECEIVER else _dial(options, store)
        except OSError as error:
            raise TransportError(f"the data socket could not connect: {error}") from error
        self._sock.settimeout(options.transfer_timeout_s)

    def send(self, data: torch.Tensor) -> Transfer:
        """Send; returns when the kernel has the bytes."""
        try:
            self._sock.sendall(data.numpy().data)
        except OSError as error:
            raise TransportError(f"the data socket failed while sending {data.numel()} bytes: {error}") from error
        return _Sent()

    def recv(self, into: torch.Tensor) -> Transfer:
        """Receive in order of the calls."""
        return _Receive(self._sock, into)

    def abort(self) -> None:
        """Wake whoever waits on the socket."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()


def _accept(options: ChannelOptions, store: Rendezvous) -> socket.socket:
    deadline = time.monotonic() + options.connect_timeout_s
    token = secrets.token_bytes(_TOKEN_BYTES)
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    with socket.create_server((options.host, 0), family=family) as listener:
        address = f"{options.host} {listener.getsockname()[1]}"
        store.set("loopback", token + address.encode())
        while True:
            listener.settimeout(max(0.001, deadline - time.monotonic()))
            sock, _ = listener.accept()
            try:
                sock.settimeout(max(0.001, deadline - time.monotonic()))
                shown = bytearray(_TOKEN_BYTES)
                _read_into(sock, memoryview(shown))
            except TransportError:
                sock.close()
                continue
            if hmac.compare_digest(shown, token):
                return sock
            sock.close()


def _dial(options: ChannelOptions, store: Rendezvous) -> socket.socket:
    value = store.get("loopback")
    token, (host, port) = value[:_TOKEN_BYTES], value[_TOKEN_BYTES:].decode().split(" ")
    sock = socket.create_connection((host, int(port)), timeout=options.connect_timeout_s)
    try:
        sock.sendall(token)
    except OSError:
        sock.close()
        raise
    return sock


def _read_into(sock: socket.socket, view: memoryview) -> None:
    received = 0
    while received < len(view):
        try:
            count = sock.recv_into(view[received:])
        except OSError as error:
            raise TransportError(f"the data socket failed after {received} of {len(view)} bytes: {error}") from error
        if count == 0:
            raise TransportError(f"the data socket ended after {received} of {len(view)} bytes")
        received += count
