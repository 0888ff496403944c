"""Length-prefixed protobuf over a stream socket: a 4-byte big-endian length, then the message."""

from __future__ import annotations

import socket
import struct
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
HEADER_BYTES = 4

_LENGTH = struct.Struct(">I")
M = TypeVar("M", bound=Message)


class FramingError(ConnectionError):
    """The other end closed the stream inside a message, or sent something that is not one."""


def pack(message: Message) -> bytes:
    """The bytes of a message with its length in front."""
    body = message.SerializeToString()
    return _LENGTH.pack(len(body)) + body


def body_length(header: bytes, limit: int = MAX_MESSAGE_BYTES) -> int:
    """Length of the body that follows a header; FramingError if it is over the limit."""
    (length,) = _LENGTH.unpack(header)
    if length > limit:
        raise FramingError(f"a message of {length} bytes was announced, the limit is {limit}")
    return int(length)


def parse(kind: type[M], body: bytes) -> M:
    """Decode one message; FramingError if the bytes are not one."""
    try:
        return kind.FromString(body)
    except DecodeError as error:
        raise FramingError(f"{len(body)} bytes are not a {kind.__name__}") from error


def read_message(sock: socket.socket, kind: type[M], limit: int = MAX_MESSAGE_BYTES) -> M | None:
    """Read one message (blocking, within the socket's timeout); None at a clean end of the stream."""
    header = _read_exactly(sock, HEADER_BYTES, at_start=True)
    if header is None:
        return None
    body = _read_exactly(sock, body_length(header, limit), at_start=False)
    return parse(kind, body or b"")


def _read_exactly(sock: socket.socket, count: int, *, at_start: bool) -> bytes | None:
    buffer = bytearray(count)
    view = memoryview(buffer)
    received = 0
    while received < count:
        size = sock.recv_into(view[received:])
        if size == 0:
            if at_start and received == 0:
                return None
            raise FramingError(f"the stream ended after {received} of {count} bytes")
        received += size
    return bytes(buffer)
