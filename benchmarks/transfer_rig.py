"""Two processes with one GPU each, and the run that tells them what to do.

The run calls methods of either process by name ("node.open") over a pipe and waits, always with a bound, for what they
return. The processes have a pipe of their own between them for what would be the router's errands, such as tickets.
Each sees one GPU alone: its CUDA_VISIBLE_DEVICES is set before it begins, and so before torch is imported there.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any

from benchmarks.transfer_plan import Plan

SENDER, RECEIVER = "sender", "receiver"
CALL_TIMEOUT_S = 60.0
AFTER_FAILURE_S = 10.0
END_TIMEOUT_S = 15.0


class RigError(Exception):
    """A process failed, died or did not answer."""


class Remote:
    """One of the two processes, seen from the run. Once it has not answered in time it is not asked again."""

    def __init__(self, name: str, process: Any, connection: Connection) -> None:
        self.name = name
        self.connection = connection
        self._process = process
        self._asked = ""
        self._lost = False

    def call(self, method: str, *args: Any, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        """Have it call a method; what that returns, or RigError."""
        self.begin(method, *args)
        return self.wait(timeout_s)

    def wait(self, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        """What the method begun last returned, once it has; RigError where that takes longer."""
        if not self.connection.poll(timeout_s):
            raise self.lose(timeout_s)
        return self.result()

    def begin(self, method: str, *args: Any) -> None:
        """Have it call a method; `result` must follow."""
        if self._lost:
            raise RigError(f"the {self.name} is not asked for {method}: it gave no answer for {self._asked}")
        self._asked = method
        try:
            self.connection.send((method, args))
        except OSError as error:
            raise RigError(f"the {self.name} is gone: {error!r}") from error

    def result(self) -> Any:
        """What the method begun last returned; the connection has something to read."""
        try:
            failure, value = self.connection.recv()
        except (EOFError, OSError) as error:
            self._lost = True
            raise RigError(f"the {self.name} died while it was asked for {self._asked}") from error
        if failure:
            raise RigError(f"{self._asked} failed in the {self.name}:\n{value}")
        return value

    def lose(self, timeout_s: float) -> RigError:
        """Ask it for nothing any more; the error that says why."""
        self._lost = True
        return RigError(f"the {self.name} did not answer {self._asked} within {timeout_s:g} s")

    def end(self) -> None:
        """Ask it to end, wait, and end it if it does not."""
        try:
            self.connection.send(None)
        except OSError:
            pass
        self._process.join(0.0 if self._lost else END_TIMEOUT_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join(END_TIMEOUT_S)
        self.connection.close()
        self._process.close()


class Rig:
    """Both processes."""

    def __init__(self, sender: Remote, receiver: Remote) -> None:
        self.sender = sender
        self.receiver = receiver

    def both(self, method: str, *args: Any, timeout_s: float = CALL_TIMEOUT_S) -> list[Any]:
        """Have both call a method at the same time; what the sender's and the receiver's returned.

        Where one fails, the other, which may wait for it, is not waited for much longer.
        """
        remotes = (self.sender, self.receiver)
        for remote in remotes:
            remote.begin(method, *args)
        results: dict[str, Any] = {}
        errors: list[RigError] = []
        pending = {remote.connection: remote for remote in remotes}
        while pending:
            ready = wait(list(pending), timeout_s)
            if not ready:
                errors += [remote.lose(timeout_s) for remote in pending.values()]
                break
            for remote in [pending.pop(connection) for connection in list(pending) if connection in ready]:
                try:
                    results[remote.name] = remote.result()
                except RigError as error:
                    errors.append(error)
                    timeout_s = AFTER_FAILURE_S
        if errors:
            raise errors[0]
        return [results[remote.name] for remote in remotes]


@contextmanager
def running(plan: Plan, gpus: tuple[str, ...]) -> Iterator[Rig]:
    """Both processes, for as long as the context lasts; `gpus` are what CUDA_VISIBLE_DEVICES calls theirs."""
    context = multiprocessing.get_context("spawn")
    links = context.Pipe()
    remotes: list[Remote] = []
    try:
        for index, name in enumerate((SENDER, RECEIVER)):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(name, plan, theirs, links[index]), name=name, daemon=True)
            with _environment({"CUDA_VISIBLE_DEVICES": gpus[index]} if gpus else {}):
                process.start()
            theirs.close()
            links[index].close()
            remotes.append(Remote(name, process, ours))
        yield Rig(*remotes)
    finally:
        for remote in remotes:
            remote.end()


def _serve(name: str, plan: Plan, requests: Connection, link: Connection) -> None:
    """What a process does."""
    from benchmarks.transfer_side import serve

    serve(name, plan, requests, link)


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Variables that a process started within has."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
