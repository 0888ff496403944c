"""Memory that pieces pass through on their way between the KV cache and the data channel.

Shapes: a piece is [num_layers, 2, num_tokens, num_heads, head_dim]; 2 is K, then V; num_heads are the heads that
travel between the two ranks. A staging buffer is flat uint8; it belongs to the pool, or to one piece from `acquire` to
`release`. It lies where the transport wants it: on the GPU for NCCL, else in the CPU's memory (page-locked if KV is on
a GPU).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from kv_transfer.errors import ProtocolError, TransferIntegrityError
from kv_transfer.layout import KVLayout

SlotIds = np.ndarray
"""int64 [num_tokens]: where tokens lie, block_id * block_size + offset."""


class KVMemory(Protocol):
    """The engine's KV, read and written by slot. Called from the pairs' threads, each on its own lane."""

    @property
    def device(self) -> torch.device:
        """Where the KV lies."""

    def locate(self, slot_ids: SlotIds) -> Any:
        """The places of these slots, for `gather` and `scatter` on the same lane: on a GPU a tensor there."""

    def gather(self, first_layer: int, num_layers: int, places: Any, heads: range, out: torch.Tensor) -> None:
        """Copy the KV of some heads at these places of layers [first_layer, first_layer + num_layers) into a piece.

        On a GPU the copy is enqueued on the current stream.
        """

    def scatter(self, first_layer: int, num_layers: int, places: Any, heads: range, data: torch.Tensor) -> None:
        """The reverse: copy a piece to its places."""


class StagingPool:
    """Buffers of one end of a pair, within a quota; used by that pair's thread alone.

    Memory is allocated as it is needed, and the buffer used last is used next.
    """

    def __init__(
        self, *, quota_bytes: int, piece_bytes: int, device: torch.device | None = None, pinned: bool = False
    ) -> None:
        self._quota_bytes = quota_bytes
        self._piece_bytes = piece_bytes
        self._place: dict[str, Any] = {"device": device or torch.device("cpu"), "pin_memory": pinned}
        self._free: list[torch.Tensor] = []
        self._allocated_bytes = 0
        self._num_lent = 0

    @property
    def num_lent(self) -> int:
        """Buffers that a piece holds."""
        return self._num_lent

    def acquire(self, num_bytes: int) -> torch.Tensor | None:
        """A buffer of at least num_bytes, [capacity] uint8; None while the quota is used up."""
        if num_bytes > self._quota_bytes:
            raise ProtocolError(
                f"a piece of {num_bytes} bytes does not fit into {self._quota_bytes} bytes of staging: "
                "give both workers the same piece_mib and staging_mib"
            )
        buffer = next((free for free in reversed(self._free) if free.numel() >= num_bytes), None)
        if buffer is not None:
            self._free = [free for free in self._free if free is not buffer]
        else:
            buffer = self._allocate(max(num_bytes, self._piece_bytes))
        if buffer is not None:
            self._num_lent += 1
        return buffer

    def release(self, buffer: torch.Tensor) -> None:
        """Take a buffer back."""
        if self._num_lent < 1:
            raise TransferIntegrityError("a staging buffer was released twice")
        self._num_lent -= 1
        self._free.append(buffer)

    def close(self) -> None:
        """Give all memory back, lent or not: nothing reads or writes it any more."""
        self._free.clear()
        self._quota_bytes = self._num_lent = 0

    def _allocate(self, num_bytes: int) -> torch.Tensor | None:
        while self._free and self._allocated_bytes + num_bytes > self._quota_bytes:
            self._allocated_bytes -= self._free.pop().numel()
        if self._allocated_bytes + num_bytes > self._quota_bytes:
            return None
        self._allocated_bytes += num_bytes
        return torch.empty(num_bytes, dtype=torch.uint8, **self._place)


def slots_of(block_ids: Sequence[int], block_size: int, first: int, num_tokens: int) -> SlotIds:
    """Where tokens [first, first + num_tokens) of a run of blocks lie, counted from the start of its first block."""
    places = np.arange(first, first + num_tokens)
    slot_ids: SlotIds = np.asarray(block_ids, dtype=np.int64)[places // block_size] * block_size + places % block_size
    return slot_ids


def as_piece(data: torch.Tensor, layout: KVLayout, num_layers: int, num_tokens: int, num_heads: int) -> torch.Tensor:
    """View bytes [num_bytes] uint8 as [num_layers, 2, num_tokens, num_heads, head_dim]."""
    dtype: torch.dtype = getattr(torch, layout.dtype)
    return data.view(dtype).view(num_layers, 2, num_tokens, num_heads, layout.head_dim)
