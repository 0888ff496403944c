"""Attention with torch's scaled_dot_product_attention: the CPU's backend and every other's reference.

Sequence by sequence, straight from the cache: in place where a sequence's blocks are consecutive, from a
copy made block by block where they are scattered. The query heads that share a KV head are folded into rows
(one new token) or broadcast over it (more), so that KV is never repeated.

Shapes: n = a sequence's tokens in this step, context = its tokens of KV after the step's writes,
groups = num_heads / num_kv_heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from engine.batch import Batch
from engine.kv_cache import KVCache

_SCRATCH = "sdpa"


@dataclass(frozen=True, slots=True)
class _Span:
    """One sequence of a step."""

    start: int  # its rows are [start, stop)
    stop: int
    context: int
    first_slot: int  # of consecutive blocks
    blocks: torch.Tensor | None  # [num_blocks of the sequence] int64, if they are scattered
    mask: torch.Tensor | None  # [n, context], added to the scores; None: see causal
    causal: bool


class SdpaAttention:
    """AttentionBackend on torch SDPA."""

    def __init__(self, kv_cache: KVCache, num_heads: int) -> None:
        """`num_heads`: the query heads of this rank."""
        self._cache = kv_cache
        self._groups = num_heads // kv_cache.num_kv_heads

    def plan(self, batch: Batch) -> None:
        """See AttentionBackend."""
        starts = batch.query_starts
        batch.scratch[_SCRATCH] = [
            self._span(starts[i], starts[i + 1], context, batch.block_ids[i])
            for i, context in enumerate(batch.context_lens)
        ]

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int, batch: Batch) -> torch.Tensor:
        """See AttentionBackend."""
        num_rows, num_heads, head_dim = q.shape
        out = q.new_zeros(num_rows, num_heads, head_dim)
        for span in batch.scratch[_SCRATCH]:
            self._attend(q[span.start : span.stop], self._keys_values(layer, span), span, out[span.start : span.stop])
        return out.view(num_rows, num_heads * head_dim)

    def _span(self, start: int, stop: int, context: int, block_ids: list[int]) -> _Span:
        n = stop - start
        block_size = self._cache.block_size
        used = block_ids[: -(-context // block_size)]
        consecutive = used == list(range(used[0], used[0] + len(used)))
        device = self._cache.data.device
        blocks = None if consecutive else torch.tensor(used, dtype=torch.int64, device=device)
        mask = None
        if 1 < n < context:
            mask = torch.full((n, context), -torch.inf, dtype=self._cache.data.dtype, device=device)
            mask.triu_(context - n + 1)
        return _Span(start, stop, context, used[0] * block_size, blocks, mask, causal=n == context and n > 1)

    def _keys_values(self, layer: int, span: _Span) -> torch.Tensor:
        """[2 * num_kv_heads, context, head_dim], keys first."""
        cached = self._cache.layer(layer)
        if span.blocks is None:
            return cached[:, span.first_slot : span.first_slot + span.context]
        heads, _, head_dim = cached.shape
        by_block = cached.view(heads, self._cache.num_blocks, self._cache.block_size * head_dim)
        return by_block.index_select(1, span.blocks).view(heads, -1, head_dim)[:, : span.context]

    def _attend(self, q: torch.Tensor, keys_values: torch.Tensor, span: _Span, out: torch.Tensor) -> None:
        """q and out [n, num_heads, head_dim]."""
        n, _, head_dim = q.shape
        heads = self._cache.num_kv_heads
        keys, values = keys_values[:heads], keys_values[heads:]
        if n == 1:
            rows = q.view(1, heads, self._groups, head_dim)
            result = functional.scaled_dot_product_attention(rows, keys[None], values[None])
            out.copy_(result.view(1, heads * self._groups, head_dim))
            return
        grouped = q.view(n, heads, self._groups, head_dim).permute(1, 2, 0, 3)  # [heads, groups, n, head_dim]
        shape = (heads, self._groups, span.context, head_dim)
        result = functional.scaled_dot_product_attention(
            grouped,
            keys[:, None].expand(shape),
            values[:, None].expand(shape),
            attn_mask=span.mask,
            is_causal=span.causal,
        )
        out.view(n, heads, self._groups, head_dim).copy_(result.permute(2, 0, 1, 3))
