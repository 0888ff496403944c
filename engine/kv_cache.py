"""Where keys and values lie: one tensor for all layers, cut into blocks of slots.

Shapes: data is [num_layers, 2 (key, value), num_kv_heads, num_blocks * block_size, head_dim], and
slot = block_id * block_size + offset. Heads come before slots, so that attention reads a sequence whose
blocks are consecutive in place and without a stride.

Which block belongs to whom is the block pool's affair; here slots are only checked to exist. The engine's
thread reads and writes; transfer threads call `gather` and `scatter` on slots that nobody
else touches meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.config import CacheOptions
from engine.errors import CapacityError, IntegrityError
from engine.models.config import ModelConfig

MIN_BLOCKS = 2


class KVCache:
    """The keys and values of one rank."""

    def __init__(
        self,
        *,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Allocate room for num_blocks blocks, with no content yet: a CPU spends memory only on what is written."""
        self.num_layers = num_layers
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        num_slots = num_blocks * block_size
        self.data = torch.empty(num_layers, 2, num_kv_heads, num_slots, head_dim, dtype=dtype, device=device)
        self._layers: list[torch.Tensor] = list(self.data)
        self._planes: list[torch.Tensor] = list(self.data.view(num_layers, 2 * num_kv_heads, num_slots, head_dim))

    @property
    def num_slots(self) -> int:
        """Tokens there is room for."""
        return self.num_blocks * self.block_size

    @property
    def bytes_per_block(self) -> int:
        """Memory of one block over all layers."""
        return int(self.data.nbytes) // self.num_blocks

    def read(self, layer: int, first_slot: int, num_tokens: int) -> torch.Tensor:
        """A layer's keys and values in consecutive slots, in place: [2, num_kv_heads, num_tokens, head_dim]."""
        return self._layers[layer][:, :, first_slot : first_slot + num_tokens]

    def read_blocks(self, layer: int, block_ids: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """A copy of a layer's first num_tokens keys and values in any blocks, in the shape that `read` gives."""
        by_block = self._planes[layer].view(2 * self.num_kv_heads, self.num_blocks, self.block_size * self.head_dim)
        found = by_block.index_select(1, block_ids)
        return found.view(2, self.num_kv_heads, -1, self.head_dim)[:, :, :num_tokens]

    def write(self, layer: int, slot_ids: torch.Tensor, heads: torch.Tensor) -> None:
        """Store a layer's keys, then values, heads [num_tokens, 2 * num_kv_heads, head_dim], in slots [num_tokens]."""
        self._planes[layer].index_copy_(1, slot_ids, heads.transpose(0, 1))

    @torch.inference_mode()
    def gather(self, first_layer: int, num_layers: int, slot_ids: Sequence[int], out: torch.Tensor) -> None:
        """Copy some layers' keys and values of some slots into out.

        out is [num_layers, 2, num_slot_ids, num_kv_heads, head_dim], of the cache's type. Raises IntegrityError
        for layers or slots that do not exist, or an `out` of another shape or type.
        """
        layers, index = self._check(first_layer, num_layers, slot_ids, out)
        out.copy_(layers.index_select(3, index).transpose(2, 3))

    @torch.inference_mode()
    def scatter(self, first_layer: int, num_layers: int, slot_ids: Sequence[int], data: torch.Tensor) -> None:
        """The reverse of gather: copy data into the slots, which must differ from each other."""
        layers, index = self._check(first_layer, num_layers, slot_ids, data)
        layers.index_copy_(3, index, data.to(self.data.device).transpose(2, 3))

    def _check(
        self, first_layer: int, num_layers: int, slot_ids: Sequence[int], data: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The layers named (a view) and the slots as a tensor."""
        if num_layers < 1 or first_layer < 0 or first_layer + num_layers > self.num_layers:
            raise IntegrityError(
                f"layers {first_layer} to {first_layer + num_layers} are not within the {self.num_layers} of this model"
            )
        if slot_ids and not (min(slot_ids) >= 0 and max(slot_ids) < self.num_slots):
            raise IntegrityError(f"slots must be from 0 to {self.num_slots - 1}, got {min(slot_ids)}..{max(slot_ids)}")
        expected = (num_layers, 2, len(slot_ids), self.num_kv_heads, self.head_dim)
        if tuple(data.shape) != expected or data.dtype != self.data.dtype:
            raise IntegrityError(
                f"expected {self.data.dtype} values of shape {expected}, got {data.dtype} of {tuple(data.shape)}"
            )
        index = torch.tensor(slot_ids, dtype=torch.int64, device=self.data.device)
        return self.data[first_layer : first_layer + num_layers], index


def blocks_for(cache: CacheOptions, config: ModelConfig, dtype: torch.dtype, num_kv_heads: int | None = None) -> int:
    """How many blocks a worker has: as configured, else as many as fit into the configured memory.

    num_kv_heads: those of one rank, default all. Raises CapacityError if fewer than two fit.
    """
    if cache.num_blocks is not None:
        return cache.num_blocks
    heads = config.num_kv_heads if num_kv_heads is None else num_kv_heads
    block_bytes = 2 * config.num_layers * cache.block_size * heads * config.head_dim * dtype.itemsize
    num_blocks = (cache.memory_mib << 20) // block_bytes
    if num_blocks < MIN_BLOCKS:
        raise CapacityError(
            f"memory_mib ({cache.memory_mib}) has room for {num_blocks} KV blocks of {block_bytes} bytes; "
            f"at least {MIN_BLOCKS} are needed"
        )
    return num_blocks
