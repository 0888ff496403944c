"""Child processes of the supervisor: started, adopted, watched and ended, without polling.

The supervisor is a subreaper: what a dead process leaves behind becomes its child, so nothing escapes.
Life of a child: RUNNING (`spawn`, `adopt`) -> EXITED (its future `exited` is set, by SIGCHLD or a pidfd).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO

from cluster.run_dir import ProcessRef

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def become_subreaper() -> None:
    """Let orphans among the descendants become children of this process."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(parent: int) -> None:
    """Get SIGTERM when the parent ends; exit at once if it has ended already."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        raise SystemExit("the process that started the supervisor is gone")


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl failed")


@dataclass(frozen=True)
class Child:
    """One process that is watched; `exited` gives its wait status (0 where it cannot be known)."""

    name: str
    ref: ProcessRef
    exited: asyncio.Future[int]
    stdout: IO[bytes] | None = None

    def kill(self, number: signal.Signals) -> None:
        """Send a signal, unless the process is gone."""
        send_signal(self.ref, number)

    async def read_stdout(self) -> asyncio.StreamReader:
        """The output of a child that was spawned with `pipe`; to be called once."""
        reader = asyncio.StreamReader()
        await self.exited.get_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), self.stdout)
        return reader


def send_signal(ref: ProcessRef, number: signal.Signals) -> None:
    """Send a signal to that very process, never to a later one of its pid."""
    try:
        descriptor = os.pidfd_open(ref.pid)
    except (ProcessLookupError, OSError):
        return
    try:
        if ref.is_alive():  # asked while the pidfd pins the process
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, number)
    finally:
        os.close(descriptor)


class Children:
    """All watched processes of one supervisor; lives in its event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._by_pid: dict[int, Child] = {}

    def start(self) -> None:
        """Begin to reap."""
        become_subreaper()
        self._loop.add_signal_handler(signal.SIGCHLD, self._reap)

    def close(self) -> None:
        """Stop reaping."""
        self._loop.remove_signal_handler(signal.SIGCHLD)

    def spawn(
        self, name: str, argv: Sequence[str], *, env: Mapping[str, str], log: IO[bytes], pipe: bool = False
    ) -> Child:
        """Start a process whose output goes to `log`; with `pipe`, its stdout to the caller instead."""
        process = subprocess.Popen(
            list(argv),
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if pipe else log,
            stderr=log,
        )
        process.returncode = 0  # reaped here, not by Popen
        child = Child(name, ProcessRef.of(process.pid), self._loop.create_future(), process.stdout)
        self._by_pid[process.pid] = child
        return child

    def adopt(self, name: str, pid: int) -> Child:
        """Watch a descendant that something else has started; ProcessLookupError if it is gone."""
        child = Child(name, ProcessRef.of(pid), self._loop.create_future())
        self._by_pid[pid] = child
        descriptor = os.pidfd_open(pid)

        def ended() -> None:
            self._loop.remove_reader(descriptor)
            os.close(descriptor)
            self._reap()
            self._settle(pid, 0)

        self._loop.add_reader(descriptor, ended)
        return child

    def try_adopt(self, ref: ProcessRef) -> Child | None:
        """Watch that very process; None if it is gone."""
        with contextlib.suppress(ProcessLookupError):
            child = self.adopt("orphan", ref.pid)
            if child.ref == ref:
                return child
        return None

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            self._settle(pid, status)

    def _settle(self, pid: int, status: int) -> None:
        child = self._by_pid.pop(pid, None)
        if child is not None and not child.exited.done():
            child.exited.set_result(status)


async def end(child: Child, *, grace_s: float, first: signal.Signals = signal.SIGTERM) -> None:
    """Ask a process to end, and kill it if it has not within `grace_s` seconds."""
    child.kill(first)
    done, _ = await asyncio.wait([child.exited], timeout=grace_s)
    if not done:
        child.kill(signal.SIGKILL)
        await asyncio.wait([child.exited], timeout=5.0)


def describe_exit(status: int) -> str:
    """A wait status in words."""
    code = os.waitstatus_to_exitcode(status)
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
