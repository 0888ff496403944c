"""Shows a person how far each engine has loaded its model."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

LINE_EVERY_S = 10.0


class LoadBars:
    """A bar for each engine in a terminal, elsewhere a line every LINE_EVERY_S. Bars go when the context ends."""

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console or Console()
        self._clock = clock
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._line_at: dict[str, float] = {}

    def line(self, text: str) -> None:
        """Print a line, above the bars."""
        if self._bars is None:
            click.echo(text)
        else:  # click writes past rich
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def show(self, engine: str, done_bytes: int, total_bytes: int) -> None:
        """So much of an engine's weights is there."""
        if self._console.is_terminal:
            self._show_bar(engine, done_bytes, total_bytes)
            return
        now = self._clock()
        if now >= self._line_at.setdefault(engine, now + LINE_EVERY_S) and done_bytes < total_bytes:
            self._line_at[engine] = now + LINE_EVERY_S
            self.line(f"  ... {engine} has loaded {done_bytes / 1e9:.1f} of {total_bytes / 1e9:.1f} GB")

    def _show_bar(self, engine: str, done_bytes: int, total_bytes: int) -> None:
        if self._bars is None:
            columns = (TextColumn("  ... {task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
            self._bars = Progress(*columns, console=self._console, transient=True)
            self._bars.start()
        if engine not in self._tasks:
            self._tasks[engine] = self._bars.add_task(engine, total=total_bytes)
        self._bars.update(self._tasks[engine], completed=done_bytes, total=total_bytes)

    def __enter__(self) -> LoadBars:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()
