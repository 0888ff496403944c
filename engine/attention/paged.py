"""Attention on a GPU: sequences of one new token by our own split-KV kernel, prompts by whatever is fastest there.

The first num_decode sequences of a step have one token each; the others are prompts or chunks of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from engine.batch import Batch, StepShape
from engine.kernels.attention import SplitPlanner, Splits, decode_attention
from engine.kv_cache import KVCache
from engine.upload import upload_together


class PromptAttention(Protocol):
    """Attention of sequences with many new tokens."""

    def plan(self, shape: StepShape, first: int) -> Any:
        """What is the same for all layers, for the step's sequences from the first-th on."""

    def forward(self, q: torch.Tensor, layer: int, plan: Any) -> torch.Tensor:
        """q [num_rows, num_heads, head_dim], the rows of these sequences -> [num_rows, num_heads * head_dim]."""


@dataclass(frozen=True, slots=True)
class PagedPlan:
    """A step as this backend sees it."""

    num_decode: int
    """Rows computed by the split-KV kernel."""
    splits: Splits | None
    prompts: Any
    """What PromptAttention.plan gave; None: there are none."""


class PagedAttention:
    """AttentionBackend on a GPU."""

    def __init__(self, kv_cache: KVCache, prompts: PromptAttention) -> None:
        self.prompts = prompts
        self._cache = kv_cache
        self.planner = SplitPlanner(
            num_kv_heads=kv_cache.num_kv_heads,
            num_multiprocessors=torch.cuda.get_device_properties(kv_cache.data.device).multi_processor_count,
            block_size=kv_cache.block_size,
        )

    def plan(self, batch: Batch) -> None:
        """See AttentionBackend."""
        shape, splits, prompts = batch.shape, None, None
        num_decode = shape.num_decode
        if num_decode:
            table, starts = self.planner.cut(shape.context_lens[:num_decode])
            block_ids = shape.block_ids[: shape.block_starts[num_decode]]
            splits = Splits(*upload_together([table, starts, block_ids], self._cache.data.device))
        if num_decode < shape.num_seqs:
            prompts = self.prompts.plan(shape, num_decode)
        batch.scratch = PagedPlan(num_decode, splits, prompts)

    def forward(self, q: torch.Tensor, layer: int, batch: Batch) -> torch.Tensor:
        """See AttentionBackend."""
        plan: PagedPlan = batch.scratch
        if plan.splits is None:
            return self.prompts.forward(q, layer, plan.prompts)
        out = torch.empty(q.shape[0], q.shape[1] * q.shape[2], dtype=q.dtype, device=q.device)
        decode_attention(q, self._cache.layer(layer), plan.splits, self._cache.block_size, out)
        if plan.prompts is not None:
            out[plan.num_decode :] = self.prompts.forward(q[plan.num_decode :], layer, plan.prompts)
        return out
