"""Measures what a device reaches at best: copying, reading, multiplying."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.engine_floor import Ceilings


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large the measured operations are."""

    num_bytes: int
    """Of the tensor that is read, and of each side of the copy."""
    matrix: int
    """Rows and columns of both factors of the product."""
    repeats: int


GPU_SIZES = Sizes(num_bytes=2 << 30, matrix=8192, repeats=20)
SUSTAINED_S = 0.25
"""About as long as a prompt of 8,192 tokens takes."""
REST_S = 0.5
"""Rest of a GPU before work that its power would limit sooner or later."""
CPU_SIZES = Sizes(num_bytes=16 << 20, matrix=256, repeats=3)


def measure_ceilings(device: torch.device) -> Ceilings:
    """Medians over a few repeats, in bfloat16 on random data. Frees what it allocates."""
    sizes = GPU_SIZES if device.type == "cuda" else CPU_SIZES
    copy_s, read_s = _memory_s(sizes, device)
    rest(device)
    matrix_s, sustained_s = _matrix_s(sizes, device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return Ceilings(
        copy_bytes_s=2 * sizes.num_bytes / copy_s,
        read_bytes_s=sizes.num_bytes / read_s,
        matrix_flop_s=2 * sizes.matrix**3 / matrix_s,
        sustained_flop_s=2 * sizes.matrix**3 / sustained_s,
    )


def rest(device: torch.device) -> None:
    """Let a GPU cool down."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        time.sleep(REST_S)


def _memory_s(sizes: Sizes, device: torch.device) -> tuple[float, float]:
    """Seconds of a copy and of a sum."""
    source = torch.empty(sizes.num_bytes // 2, dtype=torch.bfloat16, device=device).normal_()
    target = torch.empty_like(source)
    copy_s = _median_s(lambda: target.copy_(source), device, sizes.repeats)
    return copy_s, _median_s(lambda: source.sum(), device, sizes.repeats)


def _matrix_s(sizes: Sizes, device: torch.device) -> tuple[float, float]:
    """Seconds of a product in a short burst, and at the end of a long one."""
    left, right = (torch.randn(sizes.matrix, sizes.matrix, dtype=torch.bfloat16, device=device) for _ in range(2))
    product = torch.empty_like(left)
    burst_s = _median_s(lambda: torch.mm(left, right, out=product), device, sizes.repeats)
    repeats = max(sizes.repeats, int(SUSTAINED_S / burst_s)) if device.type == "cuda" else sizes.repeats
    return burst_s, _median_s(lambda: torch.mm(left, right, out=product), device, repeats)


def _median_s(operation: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Seconds of one operation; on a GPU between events, all queued at once so that no launch is waited for."""
    for _ in range(3):
        operation()
    if device.type != "cuda":
        return statistics.median(_wall_s(operation) for _ in range(repeats))
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        operation()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in itertools.pairwise(events)) / 1e3


def _wall_s(operation: Callable[[], object]) -> float:
    start = time.perf_counter()
    operation()
    return time.perf_counter() - start
