"""Processes of a router's benchmark: each serves calls by name over a pipe, from an event loop, on cores of its own."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.transfer_rig import Remote
from cluster.loop_thread import new_event_loop

PAGE_BYTES = os.sysconf("SC_PAGESIZE")


class Rig:
    """The processes of one measurement; a context manager."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._remotes: list[Remote] = []

    def __enter__(self) -> Rig:
        return self

    def __exit__(self, *_: object) -> None:
        for remote in reversed(self._remotes):
            remote.end()

    def pipe(self) -> tuple[Connection, Connection]:
        """Two ends for two of the processes: (reads, writes)."""
        return self._context.Pipe(duplex=False)

    def begin(self, name: str, make: Callable[..., Any], *args: Any, cores: Iterable[int] = ()) -> tuple[Remote, int]:
        """A process that serves the methods of `make(*args)`, and its id."""
        ours, theirs = self._context.Pipe()
        given = (make, args, tuple(cores), theirs)
        process = self._context.Process(target=_serve, args=given, name=name, daemon=True)
        process.start()
        theirs.close()
        remote = Remote(name, process, ours)
        self._remotes.append(remote)
        assert process.pid is not None
        return remote, process.pid


def cores_for(num_routers: int) -> tuple[list[tuple[int, ...]], tuple[int, ...]]:
    """One core for each router, and the others for what loads them; none where this system cannot say.

    Where no core is left over the load runs on any.
    """
    if not hasattr(os, "sched_getaffinity"):
        return [()] * num_routers, ()
    cores = sorted(os.sched_getaffinity(0))
    routers = [(cores[index % len(cores)],) for index in range(num_routers)]
    return routers, tuple(cores[num_routers:]) or tuple(cores)


def cpu_s(pid: int) -> float:
    """CPU seconds of all threads of a process."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9


def rss_bytes(pid: int) -> int:
    """Resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES


def _serve(make: Callable[..., Any], args: tuple[Any, ...], cores: tuple[int, ...], calls: Connection) -> None:
    """What a process does, until its pipe says None or is closed."""
    if cores:
        os.sched_setaffinity(0, cores)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(_answer(make(*args), calls))


async def _answer(side: Any, calls: Connection) -> None:
    loop = asyncio.get_running_loop()
    waiting: asyncio.Queue[tuple[str, tuple[Any, ...]] | None] = asyncio.Queue()

    def hear() -> None:
        try:
            call = calls.recv()
        except (EOFError, OSError):
            call = None
        if call is None:
            loop.remove_reader(calls.fileno())
        waiting.put_nowait(call)

    loop.add_reader(calls.fileno(), hear)
    os.set_blocking(calls.fileno(), True)  # which uvloop ends: an answer may be larger than what the pipe holds
    while (call := await waiting.get()) is not None:
        method, args = call
        try:
            value = (False, await getattr(side, method)(*args))
        except Exception:
            value = (True, traceback.format_exc())
        calls.send(value)
    try:
        await side.stop()
    except Exception:
        traceback.print_exc(file=sys.stderr)
