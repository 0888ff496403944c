"""One way to end a request from outside: Cancel, its deadline, a client that lags, a drain that is over.

A scope belongs to the task that serves the request. `interrupt(error)` makes that task raise `error`
out of the scope, wherever it waits. A message that is just being written is let through first, within
a given patience, because a gRPC stream whose write was cut cannot carry another message.

States: OPEN -> INTERRUPTED (by anyone, once) -> CLOSED (by the owner). A client that goes away cancels
the task itself; that CancelledError passes through untouched.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable
from types import TracebackType


class ScopeState(enum.Enum):
    """Where a scope is in its life."""

    OPEN = "open"
    INTERRUPTED = "interrupted"
    CLOSED = "closed"


class Scope:
    """An async context manager around the serving of one request; `with scope.writing()` around each of its writes."""

    def __init__(self) -> None:
        self.state = ScopeState.CLOSED
        self.write_cut = False
        """A write was cut: only a status can end the stream now."""
        self._is_writing = False
        self._thrown = False
        self._error: BaseException | None = None
        self._timers: list[asyncio.TimerHandle] = []

    async def __aenter__(self) -> Scope:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._cancels_before = task.cancelling()
        self._loop = asyncio.get_running_loop()
        self.state = ScopeState.OPEN
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seal()
        task = self._task
        del self._task  # it has a frame that has this scope
        if self._thrown and task.uncancel() <= self._cancels_before and kind is asyncio.CancelledError:
            assert self._error is not None
            raise self._error from None

    def interrupt(self, error: BaseException, patience_s: float = 0.0) -> bool:
        """Raise `error` in the owner, at most `patience_s` later if it is writing; False if it is too late.

        Call it from any other task or callback of the same loop, never from the owner itself.
        """
        if self.state is not ScopeState.OPEN:
            return False
        self.state = ScopeState.INTERRUPTED
        self._error = error
        if not self._is_writing:
            self._throw()
        else:
            self._timers.append(self._loop.call_later(patience_s, self._cut_write))
        return True

    def interrupt_at(self, when: float, make_error: Callable[[], BaseException], patience_s: float = 0.0) -> None:
        """Interrupt at a time of the loop's clock, unless the scope is closed by then."""
        self._timers.append(self._loop.call_at(when, lambda: self.interrupt(make_error(), patience_s)))

    def seal(self) -> None:
        """From here on it is too late to interrupt: the owner says its last word."""
        self.state = ScopeState.CLOSED
        for timer in self._timers:
            timer.cancel()

    def writing(self) -> Scope:
        """Marks a write: an interrupt waits for its end, then is raised here."""
        return self

    def __enter__(self) -> None:
        self._is_writing = True

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        self._is_writing = False
        if kind is None:
            self.raise_if_interrupted()

    def raise_if_interrupted(self) -> None:
        """The error that waited for the end of a write, unless it was thrown into it."""
        if self.state is ScopeState.INTERRUPTED and not self._thrown:
            assert self._error is not None
            raise self._error

    def _cut_write(self) -> None:
        if self._is_writing and not self._thrown:
            self.write_cut = True
            self._throw()

    def _throw(self) -> None:
        self._thrown = True
        self._task.cancel()
