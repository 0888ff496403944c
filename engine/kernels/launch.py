"""How the kernels are launched: behind each other without a gap, where the GPU can.

Programmatic dependent launch (Hopper and later): a kernel may start while the one before it on the stream drains. Every
kernel here that is launched so first does what depends on nothing (fetching weights into the L2 cache), then calls
`wait_for_previous`; behind that call all that earlier kernels wrote is there, and nothing they read is still needed.
`let_next_start` says that the next kernel may be started once all programs of this one have come so far. Small kernels
call it first of all; those that read much call it at the end, or what waits would take the place of what works and
fetch what is evicted before its turn.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if not INTERPRETED:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
else:  # the interpreter has neither; kernels are then compiled with PDL off

    @triton.jit
    def gdc_wait():
        """Nothing."""

    @triton.jit
    def gdc_launch_dependents():
        """Nothing."""


@functools.cache
def can_overlap(index: int | None) -> bool:
    """Whether this GPU starts a kernel while the one before it drains."""
    return not INTERPRETED and torch.cuda.get_device_capability(index) >= (9, 0)


def overlap(tensor: torch.Tensor) -> dict[str, Any]:
    """Launch arguments: the kernels' PDL flag and the launcher's, for the GPU this tensor lies on."""
    if INTERPRETED:
        return {"PDL": False}
    if can_overlap(tensor.device.index):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Wait until all kernels before this one are done."""
    if PDL:
        gdc_wait()


@triton.jit
def let_next_start(PDL: tl.constexpr):
    """The kernel behind this one may start its programs."""
    if PDL:
        gdc_launch_dependents()
