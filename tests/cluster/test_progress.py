"""The supervisor's side of the pipe."""

from __future__ import annotations

import json
import os

from cluster.progress import Progress


def test_loads_are_told_unless_the_reader_is_behind() -> None:
    read_end, write_end = os.pipe()
    progress = Progress(write_end)
    progress.load("prefill-0", 1, 4)
    assert json.loads(os.read(read_end, 4096)) == {
        "event": "load",
        "engine": "prefill-0",
        "done_bytes": 1,
        "total_bytes": 4,
    }
    os.set_blocking(write_end, False)
    stuffed = os.write(write_end, bytes(1 << 20))
    os.set_blocking(write_end, True)
    progress.load("prefill-0", 2, 4)
    with os.fdopen(read_end, "rb") as reader:
        assert reader.read(stuffed) == bytes(stuffed)
        progress.load("prefill-0", 3, 4)
        progress.ready([])
        events = [json.loads(line) for line in reader]
    assert [event.get("done_bytes") for event in events] == [3, None]


def test_nobody_needs_to_read() -> None:
    Progress(None).load("prefill-0", 1, 4)
    read_end, write_end = os.pipe()
    os.close(read_end)
    progress = Progress(write_end)
    progress.load("prefill-0", 1, 4)
    progress.ready([])
