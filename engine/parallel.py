"""The ranks of one worker: who computes which part of a layer, and how the parts come together.

A worker of size 1 never communicates. With more ranks, every rank calls the same collectives in the
same order; each wait is bounded by the timeout its process group was made with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from engine.errors import UnsupportedModelError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class TensorParallel:
    """One rank's view of its worker."""

    def __init__(self, rank: int = 0, size: int = 1, group: ProcessGroup | None = None) -> None:
        if not 0 <= rank < size:
            raise ValueError(f"rank must be from 0 to {size - 1}, got {rank}")
        if size > 1 and group is None:
            raise ValueError(f"{size} ranks need a process group to meet in")
        self.rank = rank
        self.size = size
        self._group = group

    def share(self, count: int, what: str) -> range:
        """This rank's half-open range of `count` equal things; UnsupportedModelError if they do not divide."""
        if count % self.size:
            raise UnsupportedModelError(
                f"this model's {what} ({count}) cannot be divided equally among {self.size} ranks; "
                f"set tensor_parallel to a divisor of {count}"
            )
        width = count // self.size
        return range(self.rank * width, (self.rank + 1) * width)

    def share_kv_heads(self, num_kv_heads: int) -> range:
        """This rank's KV heads. Fewer heads than ranks: neighbouring ranks hold copies of one head."""
        if num_kv_heads >= self.size:
            return self.share(num_kv_heads, "num_kv_heads")
        if self.size % num_kv_heads:
            raise UnsupportedModelError(f"{self.size} ranks cannot share this model's {num_kv_heads} KV heads equally")
        head = self.rank * num_kv_heads // self.size
        return range(head, head + 1)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place where there are several; returns the tensor."""
        if self._group is not None and self.size > 1:
            tensor = tensor.contiguous()
            self._group.allreduce([tensor]).wait()
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Every rank's tensor (equal shapes), joined along the last dimension in order of rank."""
        if self._group is None or self.size == 1:
            return tensor
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.size)]
        self._group.allgather([parts], [tensor.contiguous()]).wait()
        return torch.cat(parts, dim=-1)
