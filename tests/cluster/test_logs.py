"""Structured logs: one JSON object a line, with request ids, without secrets."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import logs


@pytest.fixture(autouse=True)
def root_logger() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    root.handlers.clear()
    yield
    for handler in root.handlers:
        handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)


def test_fields_of_a_line() -> None:
    stream = io.StringIO()
    logs.configure("front", worker_id="decode-0", target=stream)
    logging.getLogger("x.y").info("took %d tokens", 3, extra={"request_id": "r-1", "num_tokens": 3})
    line = json.loads(stream.getvalue())
    assert line.pop("ts").endswith("Z")
    assert line == {
        "level": "info",
        "role": "front",
        "worker_id": "decode-0",
        "logger": "x.y",
        "msg": "took 3 tokens",
        "request_id": "r-1",
        "num_tokens": 3,
    }


def test_what_ray_adds_to_every_record_stays_out() -> None:
    record = logging.makeLogRecord({"msg": "x", "levelname": "INFO", "_ray_timestamp_ns": 5, "num_tokens": 3})
    line = json.loads(logs.JsonFormatter("front").format(record))
    assert set(line) == {"ts", "level", "role", "logger", "msg", "num_tokens"}


def test_an_error_stays_on_one_line_with_its_traceback() -> None:
    stream = io.StringIO()
    logs.configure("router", target=stream)
    try:
        raise ValueError("two\nlines")
    except ValueError:
        logging.getLogger().exception("failed")
    assert stream.getvalue().count("\n") == 1
    assert "ValueError: two\nlines" in json.loads(stream.getvalue())["error"]


def test_secrets_are_replaced_wherever_they_stand() -> None:
    stream = io.StringIO()
    logs.configure("router", target=stream, secrets=["hunter2", ""])
    try:
        raise ValueError("redis://:hunter2@h")
    except ValueError:
        logging.getLogger().exception("at %s", "hunter2", extra={"url": "redis://:hunter2@h"})
    assert "hunter2" not in stream.getvalue()
    assert stream.getvalue().count("***") == 4


def test_level_and_a_second_configuration(tmp_path: Path) -> None:
    stream = io.StringIO()
    logs.configure("a", level="warning", target=stream)
    logging.getLogger().info("quiet")
    assert stream.getvalue() == ""
    logs.configure("b", target=tmp_path / "new" / "b.log")
    logging.getLogger().info("loud")
    assert stream.getvalue() == ""
    assert json.loads((tmp_path / "new" / "b.log").read_text())["role"] == "b"


def test_a_full_file_is_replaced(tmp_path: Path) -> None:
    handler = logs.configure("b", target=tmp_path / "b.log")
    assert isinstance(handler, logs.LogFile)
    handler.maxBytes = 300
    for number in range(8):
        logging.getLogger().info("x" * 100, extra={"number": number})
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    assert len(sizes) == 1 + logs.NUM_OLD_FILES
    assert max(sizes) < 300 + 200
    assert json.loads((tmp_path / "b.log").read_text().splitlines()[-1])["number"] == 7
