"""Two processes with one GPU each, and the run that tells them what to do.

The run calls methods of either process by name ("node.open") over a pipe and waits, always with a bound, for what they
return. The processes have a pipe of their own between them for what would be the router's errands, such as tickets.
Each sees one GPU alone: its CUDA_VISIBLE_DEVICES is set before it begins, and so before torch is imported there.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.transfer_plan import Plan

SENDER, RECEIVER = "sender", "receiver"
CALL_TIMEOUT_S = 60.0
END_TIMEOUT_S = 15.0


class RigError(Exception):
    """A process failed, died or did not answer."""


class Remote:
    """One of the two processes, seen from the run."""

    def __init__(self, name: str, process: Any, connection: Connection) -> None:
        self.name = name
        self._process = process
        self._connection = connection
        self._numbers = itertools.count(1)
        self._asked = (0, "")

    def call(self, method: str, *args: Any, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        """Have it call a method; what that returns, or RigError."""
        self.begin(method, *args)
        return self.result(timeout_s)

    def begin(self, method: str, *args: Any) -> None:
        """Have it call a method; `result` must follow."""
        self._asked = (next(self._numbers), method)
        try:
            self._connection.send((*self._asked, args))
        except OSError as error:
            raise RigError(f"the {self.name} is gone: {error!r}") from error

    def result(self, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        """What the method begun last returned."""
        number, method = self._asked
        deadline = time.monotonic() + timeout_s
        while self._connection.poll(max(0.0, deadline - time.monotonic())):
            try:
                answered, failure, value = self._connection.recv()
            except (EOFError, OSError) as error:
                raise RigError(f"the {self.name} died while it was asked for {method}") from error
            if answered != number:
                continue  # the late answer to a call that was given up
            if failure:
                raise RigError(f"{method} failed in the {self.name}:\n{value}")
            return value
        raise RigError(f"the {self.name} did not answer {method} within {timeout_s:g} s")

    def end(self) -> None:
        """Ask it to end, wait, and end it if it does not."""
        try:
            self._connection.send(None)
        except OSError:
            pass
        self._process.join(END_TIMEOUT_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join(END_TIMEOUT_S)
        self._connection.close()
        self._process.close()


class Rig:
    """Both processes."""

    def __init__(self, sender: Remote, receiver: Remote) -> None:
        self.sender = sender
        self.receiver = receiver

    def both(self, method: str, *args: Any, timeout_s: float = CALL_TIMEOUT_S) -> list[Any]:
        """Have both call a method at the same time; what the sender's and the receiver's returned."""
        remotes = (self.sender, self.receiver)
        for remote in remotes:
            remote.begin(method, *args)
        results: list[Any] = []
        errors: list[RigError] = []
        for remote in remotes:
            try:
                results.append(remote.result(timeout_s))
            except RigError as error:
                errors.append(error)
        if errors:
            raise errors[0]
        return results


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
