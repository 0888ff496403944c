"""Where a device's time went: kernels recorded by torch.profiler, put into classes, and the gaps between them.

Each instant of the window belongs to the kernel that started first among those running, so that kernels
that overlap (another stream, or a kernel launched before the last one ended) are not counted twice,
and the classes and the gaps add up to the window. Copies and fills by the copy engine count as gaps.
"""

from __future__ import annotations

import heapq
import json
import statistics
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

Interval = tuple[float, float]

CLASSES: tuple[tuple[str, str], ...] = (
    ("flash", "attention"),
    ("attention", "attention"),
    ("attn", "attention"),
    ("fmha", "attention"),
    ("merge_splits", "attention"),
    ("gemm", "products"),
    ("nvjet", "products"),
    ("cutlass", "products"),
    ("xmma", "products"),
    ("gemv", "products"),
    ("splitk", "products"),
    ("cublas", "products"),
    ("skinny_linear", "products"),
    ("row_linear", "products"),
    ("cute", "attention"),
)
"""Part of a kernel's name in lower case -> its class; the first that fits counts, and none means REST."""
REST = "rest"
CLASS_NAMES = ("attention", "products", REST)

LONG_GAP_US = 20.0
NUM_TOP = 5


@dataclass(frozen=True, slots=True)
class Kernel:
    """One run of a kernel, in microseconds of the trace's clock."""

    name: str
    start: float
    end: float
    stream: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Breakdown:
    """Shares of the window, from 0 to 1: `shares` and `gaps` add up to 1."""

    window_us: float
    num_steps: int
    shares: dict[str, float]
    gaps: float
    """Time in which no kernel ran."""
    long_gaps: float
    """Time in gaps of LONG_GAP_US and more: what lies between steps rather than between two kernels of one."""
    largest_gap_us: float
    """Median over the steps of each one's largest gap."""
    top: list[tuple[str, float]] = field(default_factory=list)
    """The kernels that took most, with their shares."""


def classify(name: str) -> str:
    """The class of a kernel of that name."""
    lower = name.lower()
    return next((kind for part, kind in CLASSES if part in lower), REST)


def exclusive_us(kernels: Iterable[Kernel], window: Interval) -> list[tuple[Kernel, float]]:
    """Each kernel with the time of the window that it alone accounts for: see the module's docstring."""
    covered, times = window[0], []
    for kernel in sorted(kernels, key=lambda kernel: (kernel.start, kernel.end)):
        start, end = max(kernel.start, covered), min(kernel.end, window[1])
        if end > start:
            times.append((kernel, end - start))
            covered = end
    return times


def gaps_between(intervals: Iterable[Interval], window: Interval) -> list[Interval]:
    """The parts of the window, in order, that no interval covers."""
    covered, gaps = window[0], []
    for start, end in sorted(intervals):
        if start >= window[1]:
            break
        if start > covered:
            gaps.append((covered, start))
        covered = max(covered, end)
    if covered < window[1]:
        gaps.append((covered, window[1]))
    return gaps


def step_marks(kernels: Iterable[Kernel], num_steps: int, tolerance: int = 3) -> list[float]:
    """The ends of a kernel that runs once a step, in order; empty if there is none.

    Of all names the one whose number of runs is nearest to the steps counted on the host is taken.
    """
    counts = Counter(kernel.name for kernel in kernels)
    name = min(counts, key=lambda name: (abs(counts[name] - num_steps), name), default="")
    if not name or abs(counts[name] - num_steps) > tolerance:
        return []
    return sorted(kernel.end for kernel in kernels if kernel.name == name)


def break_down(kernels: list[Kernel], marks: list[float]) -> Breakdown | None:
    """Shares of the time from the first to the last mark; with fewer than two, of all that was recorded.

    None if no kernel was recorded.
    """
    if not kernels:
        return None
    if len(marks) < 2:
        marks = [min(kernel.start for kernel in kernels), max(kernel.end for kernel in kernels)]
    window = (marks[0], marks[-1])
    length = window[1] - window[0]
    by_class = dict.fromkeys(CLASS_NAMES, 0.0)
    by_name: defaultdict[str, float] = defaultdict(float)
    for kernel, time_us in exclusive_us(kernels, window):
        by_class[classify(kernel.name)] += time_us / length
        by_name[kernel.name] += time_us / length
    gaps = gaps_between([(kernel.start, kernel.end) for kernel in kernels], window)
    lengths = [end - start for start, end in gaps]
    return Breakdown(
        window_us=length,
        num_steps=len(marks) - 1,
        shares=by_class,
        gaps=sum(lengths) / length,
        long_gaps=sum(gap for gap in lengths if gap >= LONG_GAP_US) / length,
        largest_gap_us=_largest_gap_us(gaps, marks),
        top=heapq.nlargest(NUM_TOP, by_name.items(), key=lambda item: item[1]),
    )


def _largest_gap_us(gaps: list[Interval], marks: list[float]) -> float:
    """A gap belongs to the step between two marks in which it starts."""
    largest = [0.0] * (len(marks) - 1)
    step = 0
    for start, end in gaps:
        while step < len(largest) - 1 and start >= marks[step + 1]:
            step += 1
        largest[step] = max(largest[step], end - start)
    return statistics.median(largest)


def kernels_of(trace: dict[str, Any]) -> list[Kernel]:
    """The kernels in a Chrome trace, of all streams, in order of their start."""
    found = [
        Kernel(event["name"], float(event["ts"]), float(event["ts"]) + float(event["dur"]), _stream(event))
        for event in trace["traceEvents"]
        if event.get("cat") == "kernel" and event.get("ph") == "X"
    ]
    return sorted(found, key=lambda kernel: kernel.start)


def _stream(event: dict[str, Any]) -> int:
    return int(event.get("args", {}).get("stream", 0))


class Tracer:
    """Records every kernel of the process between start and stop, whichever thread or graph launched it.

    Call start and stop on one thread (the engine's, between two steps); `kernels` from any, afterwards.
    """

    def __init__(self) -> None:
        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])

    def start(self) -> None:
        """Record from now on; the first time in a process this takes seconds."""
        torch.cuda.synchronize()
        self._profile.start()

    def stop(self) -> None:
        """Wait for what was launched, and stop recording."""
        torch.cuda.synchronize()
        self._profile.stop()

    def kernels(self) -> list[Kernel]:
        """What was recorded."""
        with tempfile.TemporaryDirectory(prefix="pdserve-trace-") as folder:
            file = Path(folder) / "trace.json"
            self._profile.export_chrome_trace(str(file))
            return kernels_of(json.loads(file.read_text(errors="replace")))
