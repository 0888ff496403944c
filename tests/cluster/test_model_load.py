"""How far a model has been loaded, from the engine to whoever listens."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.model_load import TELL_EVERY_S, LoadTeller, listen
from cluster.run_dir import RunDir

BOUND_S = 10.0


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def sockets(run_dir: RunDir) -> Iterator[Path]:
    folder = run_dir.make_socket_dir()
    yield folder
    folder.rmdir()  # fails if a socket was left


def heard_from(run_dir: RunDir, *steps: tuple[float, int, int]) -> list[tuple[str, int, int]]:
    """What is heard of a load whose progress comes at these seconds."""

    async def listen_and_load() -> list[tuple[str, int, int]]:
        heard: list[tuple[str, int, int]] = []
        over = asyncio.Event()

        def on_load(name: str, done: int, total: int) -> None:
            heard.append((name, done, total))
            if done == total:
                over.set()

        clock = Clock()
        with listen(run_dir.load_socket, on_load):
            teller = LoadTeller(run_dir, "prefill-0", clock)
            for seconds, done, total in steps:
                clock.now = seconds
                teller(done, total)
            await asyncio.wait_for(over.wait(), BOUND_S)
        return heard

    return asyncio.run(listen_and_load())


def test_the_beginning_and_the_end_are_always_heard_and_the_rest_now_and_then(run_dir: RunDir, sockets: Path) -> None:
    soon = TELL_EVERY_S / 4
    steps = [(5.0, 0, 9), (5.0 + soon, 1, 9), (5.0 + 6 * soon, 4, 9), (5.0 + 7 * soon, 5, 9), (5.0 + 8 * soon, 9, 9)]
    assert heard_from(run_dir, *steps) == [("prefill-0", 0, 9), ("prefill-0", 4, 9), ("prefill-0", 9, 9)]


def test_a_socket_left_behind_is_replaced(run_dir: RunDir, sockets: Path) -> None:
    run_dir.load_socket.touch()
    assert heard_from(run_dir, (1.0, 9, 9)) == [("prefill-0", 9, 9)]


def test_nobody_needs_to_listen_and_the_time_is_kept(run_dir: RunDir, caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    teller = LoadTeller(run_dir, "decode-0", clock)
    assert teller.stats() == {"load_seconds": 0.0, "load_bytes": 0}
    clock.now = 500.0
    teller(0, 3_000_000_000)
    clock.now = 501.5
    with caplog.at_level(logging.INFO):
        teller(3_000_000_000, 3_000_000_000)
    assert teller.stats() == {"load_seconds": 1.5, "load_bytes": 3_000_000_000}
    (record,) = caplog.records
    assert record.getMessage() == "model loaded"
    told = vars(record)
    assert (told["bytes"], told["seconds"], told["gb_per_s"]) == (3_000_000_000, 1.5, 2.0)
