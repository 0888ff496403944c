"""The wire between a worker's front process and its engine process: protobuf over a Unix socket.

One front at a time. A connection is a session: the engine's side makes a handler when a front
connects (a newcomer replaces an old one) and closes it when the connection ends, whoever ended it.

    LISTENING --front connects--> SERVING --either side closes or dies--> LISTENING
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import logging
import os
import queue
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from engine.errors import EngineError
from protos import framing
from protos import worker_pb2 as pb

log = logging.getLogger(__name__)

MAX_SOCKET_PATH = 100
BACKLOG = 8
SEND_TIMEOUT_S = 10.0
"""How long a front may take to read an engine's last words."""
STOP_TIMEOUT_S = 30.0


class EngineGoneError(EngineError):
    """The other process closed the connection, died, or did not answer in time."""


class Session(Protocol):
    """One front's stay with the engine."""

    def handle(self, command: pb.EngineCommand) -> None:
        """Take one command (on the connection's thread); answers go through the `send` it was made with."""

    def close(self) -> None:
        """The front is gone: end everything that was done for it."""


Send = Callable[[pb.EngineEvent], None]


def socket_path(run_dir: str, worker_id: str) -> str:
    """Where the engine of a worker listens; short enough for a Unix socket whatever the run dir."""
    path = Path(run_dir, "ipc", f"{worker_id}.sock")
    if len(str(path)) > MAX_SOCKET_PATH:
        digest = hashlib.sha256(str(path).encode()).hexdigest()[:16]
        path = Path(tempfile.gettempdir(), f"pdserve-{os.getuid()}", f"{digest}.sock")
    return str(path)


def listen_privately(listener: socket.socket, path: str) -> None:
    """Bind a Unix socket to a path and listen, for this user alone; what lay there before is replaced."""
    directory = Path(path).parent
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if directory.stat().st_uid != os.getuid():
        raise EngineError(f"{directory} belongs to another user: remove it or set another run directory")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    listener.bind(path)
    os.chmod(path, 0o600)
    listener.listen(BACKLOG)


def rank_socket_path(run_dir: str, worker_id: str) -> str:
    """Where rank 0 of a worker listens for its other ranks."""
    return socket_path(run_dir, f"{worker_id}.ranks")


class EngineServer:
    """The engine's side: accepts a front, hands its commands to a session."""

    def __init__(self, path: str, open_session: Callable[[Send], Session]) -> None:
        self._path = path
        self._open_session = open_session
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._current: socket.socket | None = None
        self._threads: list[threading.Thread] = []
        """Accepts; and the session's, once there is one."""
        self._lock = threading.Lock()
        self._stopping = False

    def start(self) -> None:
        """Bind and listen; the socket is open to this user alone."""
        listen_privately(self._listener, self._path)
        self._threads = [threading.Thread(target=self._accept, name="ipc-accept", daemon=True)]
        self._threads[0].start()

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """Listen no more, close the session, and write out what it has said; EngineError if that takes too long."""
        with self._lock:
            self._stopping = True
            current = self._current
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        if current is not None:
            _hang_up(current, socket.SHUT_RD)
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:  # the first may still add the second
            thread.join(max(0.0, deadline - time.monotonic()))
        if any(thread.is_alive() for thread in self._threads):
            raise EngineError(f"the front's session did not end within {timeout_s} s")

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                if self._stopping:
                    connection.close()
                    return
                old, self._current = self._current, connection
            if old is not None:
                _hang_up(old)
            for previous in self._threads[1:]:
                previous.join()
            session = threading.Thread(target=self._serve, args=(connection,), name="ipc-session", daemon=True)
            self._threads[1:] = [session]
            session.start()

    def _serve(self, connection: socket.socket) -> None:
        outbox = _Outbox(connection)
        session = self._open_session(lambda event: outbox.send(framing.pack(event)))
        try:
            while (command := framing.read_message(connection, pb.EngineCommand)) is not None:
                session.handle(command)
        except OSError as error:
            log.warning("the front process is gone: %s", error)
        finally:
            try:
                session.close()
            finally:
                outbox.close(SEND_TIMEOUT_S)
                connection.close()


def _hang_up(connection: socket.socket, how: int = socket.SHUT_RDWR) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(how)


class _Outbox:
    """What the engine says to its front, in order; what the socket takes at once is written by who says it.

    So a reply waits for no other thread to get its turn. The rest is left to a thread: nobody waits for the front.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._left: queue.SimpleQueue[memoryview | None] = queue.SimpleQueue()
        self._num_left = 0
        self._writer = threading.Thread(target=self._write_left, name="ipc-writer", daemon=True)
        self._writer.start()

    def send(self, data: bytes) -> None:
        """Any thread may call it; a front that is gone hears nothing more."""
        with self._lock:
            rest = memoryview(data)
            if not self._num_left:
                rest = rest[self._take(rest) :]
            if rest:
                self._num_left += 1
                self._left.put(rest)

    def close(self, timeout_s: float) -> None:
        """Give what is left so much time, then hang up."""
        self._left.put(None)
        self._writer.join(timeout_s)
        _hang_up(self._connection)
        self._writer.join()

    def _take(self, data: memoryview) -> int:
        """Bytes that the socket took at once."""
        try:
            return self._connection.send(data, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0
        except OSError:
            _hang_up(self._connection)
            return len(data)

    def _write_left(self) -> None:
        """After a failure it only drains."""
        open_ = True
        while (data := self._left.get()) is not None:
            if open_:
                try:
                    self._connection.sendall(data)
                except OSError:
                    open_ = False
                    _hang_up(self._connection)
            with self._lock:
                self._num_left -= 1


class EngineClient:
    """The front's side, for asyncio: calls with answers, and a callback for step events."""

    def __init__(self, on_step: Callable[[pb.StepEvent], None]) -> None:
        self._on_step = on_step
        self._calls: dict[int, asyncio.Future[pb.EngineReply]] = {}
        self._ids = itertools.count(1)
        self._writer: asyncio.StreamWriter | None = None
        self._reader_task: asyncio.Task[None] | None = None
        self.closed = asyncio.Event()
        """Set when the engine is gone."""

    async def connect(self, path: str) -> None:
        """Connect to the engine's socket; OSError if nobody listens."""
        reader, self._writer = await asyncio.open_unix_connection(path)
        self._reader_task = asyncio.create_task(self._read(reader), name="ipc-reader")

    async def call(self, command: pb.EngineCommand, timeout_s: float) -> pb.EngineReply:
        """Send a command and wait for its answer; EngineGoneError if none comes in time."""
        command.call_id = next(self._ids)
        future: asyncio.Future[pb.EngineReply] = asyncio.get_running_loop().create_future()
        self._calls[command.call_id] = future
        try:
            self.send(command)
            async with asyncio.timeout(timeout_s):  # not wait_for, which may swallow a cancellation
                return await future
        except TimeoutError as error:
            name = command.WhichOneof("command")
            raise EngineGoneError(f"the engine process did not answer `{name}` within {timeout_s} s") from error
        finally:
            self._calls.pop(command.call_id, None)

    def send(self, command: pb.EngineCommand) -> None:
        """Send a command that wants no answer; EngineGoneError if the engine is gone."""
        if self._writer is None or self.closed.is_set():
            raise EngineGoneError("the engine process is gone")
        self._writer.write(framing.pack(command))

    async def close(self) -> None:
        """Hang up."""
        if self._reader_task is not None:
            self._reader_task.cancel()
            await asyncio.gather(self._reader_task, return_exceptions=True)

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                header = await reader.readexactly(framing.HEADER_BYTES)
                body = await reader.readexactly(framing.body_length(header))
                self._take(framing.parse(pb.EngineEvent, body))
        except (OSError, asyncio.IncompleteReadError) as error:
            log.warning("the engine process is gone: %s", error)
        except Exception:
            log.exception("an event of the engine could not be taken in; hanging up")
        finally:
            self.closed.set()
            for future in self._calls.values():
                if not future.done():
                    future.set_exception(EngineGoneError("the engine process is gone"))
            if self._writer is not None:
                self._writer.close()

    def _take(self, event: pb.EngineEvent) -> None:
        if event.WhichOneof("event") == "step":
            self._on_step(event.step)
            return
        future = self._calls.get(event.reply.call_id)
        if future is not None and not future.done():
            future.set_result(event.reply)
