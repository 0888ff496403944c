"""From Python and numpy to the engine's device and back, without waiting for what the device computes.

A copy from memory that is not page-locked waits for everything enqueued before it; these go through torch's cache of
page-locked memory, which gives a buffer out again only when its copy is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

ALIGNMENT = 4
"""Every array begins at a multiple of this many elements (16 bytes)."""


def upload(values: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor on the device with these numbers."""
    tensor = torch.as_tensor(values, dtype=dtype)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def upload_together(arrays: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """One int32 tensor an array, all in one copy."""
    starts = offsets_of([array.size for array in arrays])
    packed = torch.empty(starts[-1], dtype=torch.int32, pin_memory=device.type != "cpu")
    host = packed.numpy()
    for start, array in zip(starts, arrays, strict=False):
        host[start : start + array.size] = array.ravel()
    there = packed.to(device, non_blocking=True)
    return [there[start : start + array.size].view(array.shape) for start, array in zip(starts, arrays, strict=False)]


def offsets_of(sizes: Sequence[int]) -> list[int]:
    """Where arrays of these sizes begin when they lie aligned one after the other, and behind the last one, the end."""
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + -(-size // ALIGNMENT) * ALIGNMENT)
    return starts


def mark(device: torch.device) -> torch.cuda.Event | None:
    """An event behind all that is enqueued; None on a CPU, where it is done."""
    if device.type == "cpu":
        return None
    event = torch.cuda.Event()
    event.record()
    return event


class Download:
    """What a tensor holds now, on its way to the CPU; the tensor may be overwritten meanwhile."""

    def __init__(self, tensor: torch.Tensor) -> None:
        if tensor.is_cuda:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
        else:
            self._host = tensor.clone()
        self._arrived = mark(tensor.device)

    def wait(self) -> torch.Tensor:
        """The tensor, once everything enqueued before it and its copy are done."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host
