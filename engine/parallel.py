"""The ranks of one worker: who computes which part of a layer, and how the parts come together.

A worker of size 1 never communicates. With more ranks, every rank calls the same collectives in the
same order. On a CPU each wait is bounded by the timeout the process group was made with; on a GPU nothing
waits here, and rank 0 watches the steps under way (engine/ranks.py).
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING

import torch

from engine.errors import RankLostError, UnsupportedModelError
from protos.rendezvous import first_line

if TYPE_CHECKING:
    from torch._C._distributed_c10d import ProcessGroup, Store

LOOPBACK = "127.0.0.1"
MEET_TIMEOUT_S = 600.0
"""Longest that a rank waits for another to load its part of the model; one that dies meanwhile is noticed at once."""


class TensorParallel:
    """One rank's view of its worker."""

    def __init__(
        self, rank: int = 0, size: int = 1, group: ProcessGroup | None = None, store: Store | None = None
    ) -> None:
        """Several ranks sum and gather through `group`, and agree on numbers through `store`."""
        if not 0 <= rank < size:
            raise ValueError(f"rank must be from 0 to {size - 1}, got {rank}")
        if size > 1 and (group is None or store is None):
            raise ValueError(f"{size} ranks need a process group and a store to meet in")
        self.rank = rank
        self.size = size
        self._group = group
        self._store = store

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
            try:
                self._group.allreduce([tensor]).wait()
            except RuntimeError as error:
                raise self._lost("sum", error) from error
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Every rank's tensor (equal shapes), joined along the last dimension in order of rank."""
        if self._group is None or self.size == 1:
            return tensor
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.size)]
        tensor = tensor.contiguous()
        try:
            self._group.allgather([parts], [tensor]).wait()
        except RuntimeError as error:
            raise self._lost("join", error) from error
        return torch.cat(parts, dim=-1)

    def least(self, value: int, what: str) -> int:
        """The least that any rank says of `what`, a name that is used once; waits for all ranks to say theirs."""
        if self._store is None or self.size == 1:
            return value
        keys = [f"{what}/{rank}" for rank in range(self.size)]
        self._store.set(keys[self.rank], str(value))
        self._store.wait(keys, timedelta(seconds=MEET_TIMEOUT_S))
        return min(int(self._store.get(key)) for key in keys)

    def meet(self, what: str) -> None:
        """Wait until every rank has come to `what`, a name that is used once."""
        self.least(0, what)

    def _lost(self, what: str, error: RuntimeError) -> RankLostError:
        return RankLostError(f"rank {self.rank} of {self.size} could not {what} with the others: {first_line(error)}")


def connect(rank: int, size: int, store: Store, device: torch.device, timeout_s: float) -> TensorParallel:
    """Join this rank to the others through gloo on a CPU and NCCL on a GPU; RankLostError if they do not come.

    On a CPU a wait within a step ends after twice `timeout_s`: who is silent for so long is found out before.
    The first exchange happens here, so that what a channel takes of a GPU's memory is taken before it is measured.
    """
    make = _gloo if device.type == "cpu" else _nccl
    try:
        group = make(store, rank, size, 2 * timeout_s)
    except RuntimeError as error:
        raise RankLostError(f"rank {rank} of {size} could not connect to the others: {first_line(error)}") from error
    parallel = TensorParallel(rank, size, group, store)
    parallel.all_reduce(torch.zeros(1, device=device))
    return parallel


def _gloo(store: Store, rank: int, size: int, timeout_s: float) -> ProcessGroup:
    """Over loopback: the ranks of a worker share a node."""
    from torch.distributed import ProcessGroupGloo

    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._threads = 1
    options._timeout = timedelta(seconds=timeout_s)
    options._devices = [ProcessGroupGloo.create_device(hostname=LOOPBACK)]
    return ProcessGroupGloo(store, rank, size, options)  # type: ignore[return-value]


def _nccl(store: Store, rank: int, size: int, timeout_s: float) -> ProcessGroup:
    """Without NCCL's own watchdog, which would end the process in its own way: rank 0's does."""
    from torch.distributed import ProcessGroupNCCL

    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
    options = ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=timeout_s)
    return ProcessGroupNCCL(store, rank, size, options)  # type: ignore[return-value]
