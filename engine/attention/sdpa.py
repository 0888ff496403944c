"""Attention with torch's scaled_dot_product_attention: the CPU's backend and every other's reference.

Sequence by sequence, straight from the cache: in place where a sequence's blocks are consecutive, from a copy
made block by block where they are scattered. KV is never repeated: the query heads that share a KV head are
folded into rows (one new token) or broadcast over it (more). The tokens of a chunk are taken in tiles, each with
the keys up to its own end, for the kernel computes what the causal mask hides.

Shapes: n = a sequence's tokens in this step, context = its tokens of KV after the step's writes,
groups = num_heads / num_kv_heads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from engine.batch import Batch, StepShape
from engine.kv_cache import KVCache
from engine.upload import upload

TILE = 64
"""Tokens of a chunk computed at once. Of 32, 64, 128 and 256 the fastest for chunks of 512 on a CPU."""


@dataclass(frozen=True, slots=True)
class Span:
    """One sequence of a step."""

    start: int
    """Its rows are [start, stop)."""
    stop: int
    context: int
    first_slot: int
    """Where its context begins, if its blocks are consecutive."""
    block_ids: torch.Tensor | None
    """Its blocks, if they are scattered."""
    mask: torch.Tensor | None
    """[n, context], added to the scores, if n > 1 and it is asked for."""

    def moved(self, rows: int) -> Span:
        """The same sequence, its rows so many further on."""
        return replace(self, start=self.start + rows, stop=self.stop + rows)


class SdpaAttention:
    """AttentionBackend on torch SDPA."""

    def __init__(self, kv_cache: KVCache, num_heads: int) -> None:
        """`num_heads`: the query heads of this rank."""
        self._cache = kv_cache
        self._groups = num_heads // kv_cache.num_kv_heads

    def plan(self, batch: Batch) -> None:
        """See AttentionBackend."""
        batch.scratch = self.spans(batch.shape)

    def spans(self, shape: StepShape, first: int = 0, *, masks: bool = True) -> list[Span]:
        """The sequences of a step from the first-th on, with masks or without."""
        starts, contexts = shape.query_starts.tolist(), shape.context_lens.tolist()
        return [
            self._span(starts[i], starts[i + 1], contexts[i], shape.blocks_of(i).tolist(), masks)
            for i in range(first, shape.num_seqs)
        ]

    def forward(self, q: torch.Tensor, layer: int, batch: Batch) -> torch.Tensor:
        """See AttentionBackend."""
        num_rows, num_heads, head_dim = q.shape
        outputs: list[torch.Tensor] = []
        for span in batch.scratch:
            outputs += self.attend(q, layer, span)
        num_padding = num_rows - batch.shape.num_tokens
        if num_padding:
            outputs.append(q.new_zeros(num_padding, num_heads * head_dim))
        return torch.cat(outputs)

    def attend(self, q: torch.Tensor, layer: int, span: Span) -> list[torch.Tensor]:
        """The rows of one sequence, in parts of [any, num_heads * head_dim] that follow each other."""
        keys_values = self.keys_values(layer, span)
        if span.mask is None:
            return [self._one_token(q[span.start], keys_values)]
        return self._tiles(q[span.start : span.stop], keys_values, span.mask)

    def keys_values(self, layer: int, span: Span) -> torch.Tensor:
        """A sequence's keys and values: [2, num_kv_heads, context, head_dim]."""
        if span.block_ids is None:
            return self._cache.read(layer, span.first_slot, span.context)
        return self._cache.read_blocks(layer, span.block_ids, span.context)

    def _span(self, start: int, stop: int, context: int, block_ids: list[int], masks: bool) -> Span:
        n, device = stop - start, self._cache.data.device
        consecutive = block_ids == list(range(block_ids[0], block_ids[0] + len(block_ids)))
        blocks = None if consecutive else upload(block_ids, torch.int64, device)
        mask = None
        if n > 1 and masks:
            mask = torch.full((n, context), -torch.inf, dtype=self._cache.data.dtype, device=device)
            mask.triu_(context - n + 1)
        return Span(start, stop, context, block_ids[0] * self._cache.block_size, blocks, mask)

    def _one_token(self, q: torch.Tensor, keys_values: torch.Tensor) -> torch.Tensor:
        """q [num_heads, head_dim], keys_values [2, num_kv_heads, context, head_dim] -> [1, num_heads * head_dim]."""
        rows = q.view(1, self._cache.num_kv_heads, self._groups, q.shape[-1])
        return functional.scaled_dot_product_attention(rows, keys_values[:1], keys_values[1:]).reshape(1, -1)

    def _tiles(self, q: torch.Tensor, keys_values: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
        """q [n, num_heads, head_dim] -> tile after tile, [up to TILE, num_heads * head_dim] each."""
        n, context = mask.shape
        heads, head_dim = self._cache.num_kv_heads, q.shape[-1]
        grouped = q.view(n, heads, self._groups, head_dim).permute(1, 2, 0, 3)  # [heads, groups, n, head_dim]
        shared = keys_values[:, :, None].expand(2, heads, self._groups, context, head_dim)
        outputs: list[torch.Tensor] = []
        for first in range(0, n, TILE):
            last = min(first + TILE, n)
            seen = context - n + last
            keys, values = shared[:, :, :, :seen]
            out = functional.scaled_dot_product_attention(
                grouped[:, :, first:last], keys, values, attn_mask=mask[first:last, :seen]
            )
            outputs.append(out.permute(2, 0, 1, 3).reshape(last - first, -1))
        return outputs
