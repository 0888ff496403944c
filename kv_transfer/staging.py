"""Memory that pieces pass through on their way between the KV cache and the data channel.

Shapes: a piece is [num_layers, 2, num_tokens, num_local_heads, head_dim]; 2 is K, then V.
A staging buffer is flat uint8; it belongs to the pool, or to one piece from `acquire` to `release`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import xxhash

from kv_transfer.errors import ProtocolError, TransferIntegrityError
from kv_transfer.layout import KVLayout


class KVMemory(Protocol):
    """The engine's KV, read and written by slot. Called from the pairs' threads."""

    def gather(self, first_layer: int, num_layers: int, slot_ids: Sequence[int], out: torch.Tensor) -> None:
        """Copy the KV at slot_ids of layers [first_layer, first_layer + num_layers) into `out` (a piece)."""

    def scatter(self, first_layer: int, num_layers: int, slot_ids: Sequence[int], data: torch.Tensor) -> None:
        """Copy a piece to slot_ids of layers [first_layer, first_layer + num_layers)."""


class StagingPool:
    """Buffers of one end of a pair, within a quota; used by that pair's thread alone.

    Memory is allocated as it is needed, and the buffer used last is used next.
    """

    def __init__(self, *, quota_bytes: int, piece_bytes: int) -> None:
        self._quota_bytes = quota_bytes
        self._piece_bytes = piece_bytes
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

    def _allocate(self, num_bytes: int) -> torch.Tensor | None:
        while self._free and self._allocated_bytes + num_bytes > self._quota_bytes:
            self._allocated_bytes -= self._free.pop().numel()
        if self._allocated_bytes + num_bytes > self._quota_bytes:
            return None
        self._allocated_bytes += num_bytes
        return torch.empty(num_bytes, dtype=torch.uint8)


def as_piece(data: torch.Tensor, layout: KVLayout, num_layers: int, num_tokens: int) -> torch.Tensor:
    """View bytes [num_bytes] uint8 as [num_layers, 2, num_tokens, num_local_heads, head_dim]."""
    dtype: torch.dtype = getattr(torch, layout.dtype)
    return data.view(dtype).view(num_layers, 2, num_tokens, layout.num_local_heads, layout.head_dim)


def digest_of(data: torch.Tensor) -> int:
    """xxh3-64 of the bytes of a flat uint8 tensor on the CPU."""
    return xxhash.xxh3_64_intdigest(data.numpy().data)
