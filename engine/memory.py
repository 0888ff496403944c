"""How many KV blocks a worker has: as configured, or what its memory leaves.

On a GPU the weights are loaded and the largest steps run first, so that their peak is measured rather than guessed.
The recorded steps (engine/graphs.py) keep work space of their own, so the peak counts twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.config import CacheOptions
from engine.errors import CapacityError

MIN_BLOCKS = 2
CPU_MEMORY_MIB = 512
_GIB = 1 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuUse:
    """What lies on a GPU before its KV cache is made, in bytes."""

    total: int
    share: float
    """The part of it that this worker may use."""
    others: int
    """Other processes, and what CUDA itself takes of this one."""
    weights: int
    work: int
    """The measured peak of a step beyond the weights."""

    @property
    def left_for_kv(self) -> int:
        """What may be spent on KV; below 0 if it is too much already."""
        return min(int(self.total * self.share), self.total - self.others) - self.weights - 2 * self.work

    def __str__(self) -> str:
        return (
            f"of {self.total / _GIB:.1f} GiB this worker may use {self.total * self.share / _GIB:.1f} "
            f"(gpu_memory_share {self.share:g}); weights take {self.weights / _GIB:.1f}, work space "
            f"{2 * self.work / _GIB:.1f}; other processes and CUDA take {self.others / _GIB:.1f}, "
            f"which leaves {self.left_for_kv / _GIB:.1f} for KV"
        )


def configured_blocks(cache: CacheOptions, block_bytes: int, device: torch.device) -> int | None:
    """The number of blocks where the configuration decides it; None: it depends on what a GPU has left.

    Raises CapacityError if fewer than two fit into memory_mib.
    """
    if cache.num_blocks is not None:
        return cache.num_blocks
    if cache.memory_mib is None and device.type != "cpu":
        return None
    memory_mib = cache.memory_mib or CPU_MEMORY_MIB
    num_blocks = (memory_mib << 20) // block_bytes
    if num_blocks < MIN_BLOCKS:
        raise CapacityError(
            f"memory_mib ({memory_mib}) has room for {num_blocks} KV blocks of {block_bytes} bytes; "
            f"at least {MIN_BLOCKS} are needed"
        )
    return num_blocks


def blocks_left(use: GpuUse, block_bytes: int) -> int:
    """As many blocks as fit; CapacityError, which says what took what, if fewer than two do."""
    num_blocks = max(0, use.left_for_kv) // block_bytes
    if num_blocks < MIN_BLOCKS:
        raise CapacityError(
            f"the GPU has no room for {MIN_BLOCKS} KV blocks of {block_bytes} bytes: {use}. "
            "Raise gpu_memory_share, lower max_step_tokens or max_running, or stop what else runs there"
        )
    return num_blocks


class PeakMeter:
    """Measures what steps need beyond what is allocated when it is made."""

    def __init__(self, device: torch.device, share: float) -> None:
        self._device = device
        self._share = share
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        self._weights = torch.cuda.memory_allocated(device)
        free, self._total = torch.cuda.mem_get_info(device)
        self._others = self._total - free - torch.cuda.memory_reserved(device)

    def read(self, extra: int) -> GpuUse:
        """The use of the GPU at the peak since; `extra` bytes of it are not work space."""
        torch.cuda.synchronize(self._device)
        peak = torch.cuda.max_memory_reserved(self._device)
        return GpuUse(
            total=self._total,
            share=self._share,
            others=self._others,
            weights=self._weights,
            work=max(0, peak - self._weights - extra),
        )


def explain_out_of_memory(error: torch.OutOfMemoryError, device: torch.device, what: str) -> CapacityError:
    """A GPU's refusal as an error that says what was being done and what took what."""
    free, total = torch.cuda.mem_get_info(device)
    ours = torch.cuda.memory_allocated(device)
    return CapacityError(
        f"the GPU ran out of memory {what}: of {total / _GIB:.1f} GiB this process holds {ours / _GIB:.1f}, "
        f"{free / _GIB:.1f} are free and others hold {(total - free - ours) / _GIB:.1f}. Use a smaller model, a GPU of "
        f"its own, or tensor_parallel ({str(error).splitlines()[0]})"
    )
