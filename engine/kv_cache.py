"""Where keys and values lie: one tensor for all layers, cut into blocks of slots.

Shapes: data is [num_layers, 2 (key, value), num_kv_heads, num_blocks * block_size, head_dim], and
slot = block_id * block_size + offset. On a CPU heads come before slots in memory, so that attention reads a sequence
whose blocks are consecutive in place and without a stride; on a GPU slots come before heads, as flash attention wants
its pages, so there `data` is a view with strides.

Which block belongs to whom is the block pool's affair; here slots are only checked to exist. The engine's
thread reads and writes; transfer threads call `gather` and `scatter` on slots that nobody
else touches meanwhile, on a GPU each on a stream of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from engine.errors import IntegrityError
from engine.upload import upload

if TYPE_CHECKING:
    from engine.models.config import ModelConfig


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
        """Allocate room for num_blocks blocks, with no content yet: a CPU spends memory only on what is written.

        On a GPU the content is zero: flash attention multiplies slots of a block that hold no token yet by zero, so
        they must be numbers.
        """
        self.num_layers = num_layers
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        num_slots = num_blocks * block_size
        if device.type == "cpu":
            self.data = torch.empty(num_layers, 2, num_kv_heads, num_slots, head_dim, dtype=dtype, device=device)
        else:
            memory = torch.zeros(num_layers, 2, num_slots, num_kv_heads, head_dim, dtype=dtype, device=device)
            self.data = memory.transpose(2, 3)
        self._layers: list[torch.Tensor] = list(self.data)

    @property
    def num_slots(self) -> int:
        """Tokens there is room for."""
        return self.num_blocks * self.block_size

    def layer(self, layer: int) -> torch.Tensor:
        """A layer's keys and values, in place: [2, num_kv_heads, num_slots, head_dim]."""
        return self._layers[layer]

    def pages(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """On a GPU: a layer's keys and values, in place, each [num_blocks, block_size, num_kv_heads, head_dim]."""
        shape = (2, self.num_blocks, self.block_size, self.num_kv_heads, self.head_dim)
        keys, values = self._layers[layer].transpose(1, 2).view(shape)
        return keys, values

    def read(self, layer: int, first_slot: int, num_tokens: int) -> torch.Tensor:
        """A layer's keys and values in consecutive slots, in place: [2, num_kv_heads, num_tokens, head_dim]."""
        return self._layers[layer][:, :, first_slot : first_slot + num_tokens]

    def read_blocks(self, layer: int, block_ids: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """A copy of a layer's first num_tokens keys and values in any blocks, in the shape that `read` gives."""
        by_block = self._layers[layer].unflatten(2, (self.num_blocks, self.block_size))
        copied: torch.Tensor = by_block.index_select(2, block_ids).flatten(2, 3)
        return copied[:, :, :num_tokens]

    @torch.inference_mode()
    def scrub(self) -> None:
        """Put zeros where there is no number, on a GPU: what a broken request left must not reach the next owner.

        Nothing else is written, for KV of others may be arriving meanwhile.
        """
        if self.data.is_cuda:
            for layer in self._layers:
                layer[(~layer.isfinite()).nonzero(as_tuple=True)] = 0.0

    @property
    def device(self) -> torch.device:
        """Where the KV lies."""
        return self.data.device

    def warm_up(self) -> None:
        """Compile what a GPU copies KV with."""
        places, heads = self.locate(np.zeros(1, dtype=np.int64)), range(self.num_kv_heads)
        piece = torch.empty(1, 2, 1, self.num_kv_heads, self.head_dim, dtype=self.data.dtype, device=self.device)
        self.gather(0, 1, places, heads, piece)
        self.scatter(0, 1, places, heads, piece)

    def locate(self, slot_ids: np.ndarray) -> torch.Tensor:
        """The slots as a tensor on the device; IntegrityError if one does not exist."""
        if len(slot_ids) and not (slot_ids.min() >= 0 and slot_ids.max() < self.num_slots):
            raise IntegrityError(
                f"slots must be from 0 to {self.num_slots - 1}, got {slot_ids.min()}..{slot_ids.max()}"
            )
        return upload(np.ascontiguousarray(slot_ids), torch.int64, self.device)

    def gather(self, first_layer: int, num_layers: int, places: torch.Tensor, heads: range, out: torch.Tensor) -> None:
        """Copy some layers' keys and values of some heads and slots into out.

        places are what `locate` gave; out is [num_layers, 2, num_places, num_heads, head_dim], of the cache's type. On
        a GPU it may also lie in page-locked memory, and the copy is only enqueued. Raises IntegrityError for layers
        or heads that do not exist, or an `out` of another shape or type.
        """
        layers = self._check(first_layer, num_layers, places, heads, out)
        if not self.data.is_cuda:
            with torch.inference_mode():
                out.copy_(layers.index_select(3, places).transpose(2, 3))
            return
        from engine.kernels.kv_pack import pack

        packed = out if out.is_cuda else torch.empty(out.shape, dtype=out.dtype, device=self.device)
        pack(layers, places, packed)
        if packed is not out:
            out.copy_(packed, non_blocking=True)

    def scatter(
        self, first_layer: int, num_layers: int, places: torch.Tensor, heads: range, data: torch.Tensor
    ) -> None:
        """The reverse of gather: copy data into the places, which must differ from each other."""
        layers = self._check(first_layer, num_layers, places, heads, data)
        if not self.data.is_cuda:
            with torch.inference_mode():
                layers.index_copy_(3, places, data.transpose(2, 3))
            return
        from engine.kernels.kv_pack import unpack

        unpack(layers, places, data.to(self.device, non_blocking=True))

    def _check(
        self, first_layer: int, num_layers: int, places: torch.Tensor, heads: range, data: torch.Tensor
    ) -> torch.Tensor:
        """The layers and heads named: a view."""
        if num_layers < 1 or first_layer < 0 or first_layer + num_layers > self.num_layers:
            raise IntegrityError(
                f"layers {first_layer} to {first_layer + num_layers} are not within the {self.num_layers} of this model"
            )
        if not 0 <= heads.start < heads.stop <= self.num_kv_heads:
            raise IntegrityError(f"heads {heads.start} to {heads.stop} are not within this rank's {self.num_kv_heads}")
        expected = (num_layers, 2, places.shape[0], len(heads), self.head_dim)
        if tuple(data.shape) != expected or data.dtype != self.data.dtype:
            raise IntegrityError(
                f"expected {self.data.dtype} values of shape {expected}, got {data.dtype} of {tuple(data.shape)}"
            )
        return self.data[first_layer : first_layer + num_layers, :, heads.start : heads.stop]


def bytes_per_block(config: ModelConfig, num_kv_heads: int, block_size: int, dtype: torch.dtype) -> int:
    """Memory of one block over all layers, with num_kv_heads of one rank."""
    return 2 * config.num_layers * block_size * num_kv_heads * config.head_dim * dtype.itemsize
