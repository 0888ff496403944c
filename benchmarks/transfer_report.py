"""What a run of `benchmarks.transfer` found out: lines as they come, and JSON that is complete after every section."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Sheet:
    """A table whose lines are printed one by one."""

    def __init__(self, title: str, columns: Sequence[str]) -> None:
        self._widths = [max(len(column), 9) for column in columns]
        print(f"\n{title}", flush=True)
        self.row(columns)

    def row(self, values: Sequence[Any]) -> None:
        """Print a line: numbers with four digits that count."""
        cells = (_text(value).rjust(width) for value, width in zip(values, self._widths, strict=True))
        print("  ".join(cells), flush=True)


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)


class Report:
    """All figures, written to a file after every section."""

    def __init__(self, path: Path | None, about: dict[str, Any]) -> None:
        self._path = path
        self._began = time.monotonic()
        self.figures: dict[str, Any] = {"about": about}

    def save(self) -> None:
        """Write what there is."""
        self.figures["about"]["seconds"] = time.monotonic() - self._began
        if self._path is not None:
            self._path.write_text(json.dumps(self.figures, indent=2))

    def say(self, text: str) -> None:
        """Tell how far the run is, on stderr."""
        print(f"{time.monotonic() - self._began:6.1f} s  {text}", file=sys.stderr, flush=True)


def note(text: str) -> None:
    """A line under a table."""
    print(text, flush=True)


def median_and_p90(values: Sequence[float]) -> tuple[float, float]:
    """The middle, and what nine of ten do not exceed."""
    ordered = sorted(values)
    return statistics.median(ordered), ordered[min(len(ordered) - 1, -(-9 * len(ordered) // 10) - 1)]
