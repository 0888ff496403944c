"""Structured logs: one JSON object a line, the same fields from every process.

Fields: `ts` (RFC 3339, UTC), `level`, `role`, `worker_id`, `logger`, `msg`, the record's own extras
(`logger.info("prefilled", extra={"request_id": ..., "num_tokens": 12})`), and `error` with a traceback.
Values of known secrets never reach a line: `configure` is told them, and each is replaced.
"""

from __future__ import annotations

import datetime
import json
import logging
import logging.handlers
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

MAX_FILE_BYTES = 64 * 1024 * 1024
NUM_OLD_FILES = 3

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_to_json = json.JSONEncoder(ensure_ascii=False, default=str).encode


class JsonFormatter(logging.Formatter):
    """Turns a record into one line of JSON."""

    def __init__(self, role: str, worker_id: str = "", secrets: Iterable[str] = ()) -> None:
        super().__init__()
        self._fixed = {"role": role, **({"worker_id": worker_id} if worker_id else {})}
        self._secrets = tuple(secret for secret in secrets if secret)

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        when = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line: dict[str, Any] = {
            "ts": when.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            **self._fixed,
            "logger": record.name,
            "msg": record.getMessage(),
        }
        for key, value in vars(record).items():
            if key not in _STANDARD and key not in line and not key.startswith("_ray_"):  # Ray adds one to all
                line[key] = value
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        text = _to_json(line)
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text


class LogFile(logging.handlers.RotatingFileHandler):
    """A file that a new one replaces once it is full.

    The standard one forms each line twice, to know its length beforehand; here the last line may go over the limit.
    """

    def shouldRollover(self, record: logging.LogRecord) -> bool:  # noqa: N802
        """Whether the file is full."""
        return self.stream is not None and os.fstat(self.stream.fileno()).st_size >= self.maxBytes


def configure(
    role: str,
    *,
    worker_id: str = "",
    level: str = "info",
    target: Path | IO[str] | None = None,
    secrets: Iterable[str] = (),
) -> logging.Handler:
    """Send this process's log to a file (rotated) or a stream (default: stderr); returns the handler.

    Calling it again replaces the handlers: a process has one log.
    """
    handler: logging.Handler
    if isinstance(target, Path):
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handler = LogFile(target, maxBytes=MAX_FILE_BYTES, backupCount=NUM_OLD_FILES, encoding="utf-8")
    else:
        handler = logging.StreamHandler(target or sys.stderr)
    handler.setFormatter(JsonFormatter(role, worker_id, secrets))
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    root.setLevel(level.upper())
    return handler
