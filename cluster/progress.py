"""How a starting supervisor tells whoever waits for it: JSON lines through an inherited pipe.

{"event": "begin", "what": ...}, {"event": "done", "what": ..., "seconds": ...}, while models are loaded
{"event": "load", "engine": ..., "done_bytes": ..., "total_bytes": ...}, and last either {"event": "ready",
"routers": [...]} or {"event": "failed", "message": ...}. A reader that is gone is no error.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import time
from collections.abc import Iterator
from typing import Any


class Progress:
    """The writing end; tells nobody when there is no descriptor."""

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor

    @contextlib.contextmanager
    def step(self, what: str) -> Iterator[None]:
        """A step that begins now and is done when the block ends without an error."""
        began = time.monotonic()
        self._tell("begin", what=what)
        yield
        self.done(what, time.monotonic() - began)

    def done(self, what: str, seconds: float) -> None:
        """Something is there now."""
        self._tell("done", what=what, seconds=round(seconds, 2))

    def load(self, engine: str, done_bytes: int, total_bytes: int) -> None:
        """So much of an engine's weights is there; not told while the reader is behind."""
        if self._descriptor is not None and select.select([], [self._descriptor], [], 0.0)[1]:
            self._tell("load", engine=engine, done_bytes=done_bytes, total_bytes=total_bytes)

    def ready(self, routers: list[str]) -> None:
        """All is there; the last event."""
        self._tell("ready", routers=routers)
        self._close()

    def failed(self, message: str) -> None:
        """It did not start; the last event."""
        self._tell("failed", message=message)
        self._close()

    def _tell(self, event: str, **more: Any) -> None:
        if self._descriptor is not None:
            with contextlib.suppress(BrokenPipeError):
                os.write(self._descriptor, (json.dumps({"event": event, **more}) + "\n").encode())

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
