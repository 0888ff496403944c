"""Follows a wish on its way to reality, by what the controller says of itself."""

from __future__ import annotations

import contextlib
import enum
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console

from cluster.cluster_store import ClusterStore, ClusterStoreError

LOOK_EVERY_S = 0.3
"""The controller's report is no message: it is looked at so often, and whenever something else changes."""
SILENT_AFTER_S = 5.0


class Outcome(enum.Enum):
    """How a wait ended."""

    SETTLED = "settled"
    TIMED_OUT = "timed out"
    LEFT = "left"
    """Whoever waited had something else to do."""


class Settling:
    """Waits until the controller has seen a generation and reality fits; shows on stderr what is under way."""

    def __init__(self, store: ClusterStore, generation: int, console: Console | None = None) -> None:
        self._store = store
        self._generation = generation
        self._console = console or Console(stderr=True)
        self._said: list[str] = []
        self._heard_at = time.monotonic()

    def follow(self, timeout_s: float, leave: Callable[[], bool] = lambda: False) -> Outcome:
        """Wait at most `timeout_s` seconds, or until `leave` says so (asked at each look)."""
        until = time.monotonic() + timeout_s
        with self._shown() as show:
            while True:
                report = self._look()
                if self.is_settled(report):
                    return Outcome.SETTLED
                if leave():
                    return Outcome.LEFT
                left_s = until - time.monotonic()
                if left_s <= 0:
                    return Outcome.TIMED_OUT
                show(self._waiting(report))
                self._wait(min(LOOK_EVERY_S, left_s))

    def is_settled(self, report: dict[str, Any] | None) -> bool:
        """Whether reality fits the wish of that generation, or of a later one."""
        return report is not None and report["generation"] >= self._generation and bool(report["settled"])

    def _look(self) -> dict[str, Any] | None:
        try:
            report = self._store.report()
        except ClusterStoreError:
            return None
        if report is not None:
            self._heard_at = time.monotonic()
        return report

    def _wait(self, timeout_s: float) -> None:
        until = time.monotonic() + timeout_s
        try:
            self._store.wait(timeout_s)
        except ClusterStoreError:
            threading.Event().wait(max(0.0, until - time.monotonic()))  # Redis may be starting again

    def _waiting(self, report: dict[str, Any] | None) -> list[str]:
        if report is None:
            if time.monotonic() - self._heard_at < SILENT_AFTER_S:
                return self._said
            return ["the controller is silent; what was asked for stays, and it goes on when it is back"]
        if report["generation"] < self._generation:
            return ["the controller takes it up"]
        return list(report.get("waiting") or []) or self._said

    @contextlib.contextmanager
    def _shown(self) -> Iterator[Callable[[list[str]], None]]:
        """A spinner with the newest texts at a terminal; elsewhere a line for each that is new."""
        if not self._console.is_terminal:
            yield self._print_new
            return
        with self._console.status("...", spinner="line") as spinner:

            def show(texts: list[str]) -> None:
                self._said = texts
                spinner.update("; ".join(_escaped(text) for text in texts) or "...")

            yield show

    def _print_new(self, texts: list[str]) -> None:
        for text in texts:
            if text not in self._said:
                self._console.print(f"  ... {text}", markup=False, highlight=False, soft_wrap=True)
        self._said = texts


def _escaped(text: str) -> str:
    return text.replace("[", r"\[")
