"""Attention of prompts on a GPU: flash-attn-4 where it runs, else torch's own.

Shapes: n = a sequence's tokens in this step, context = its tokens of KV after the step's writes.
"""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right

from engine.attention.sdpa import SdpaAttention, Span
from engine.batch import StepShape
from engine.kv_cache import KVCache
from engine.upload import upload_together

FLASH_PACKAGE = "flash_attn.cute"
MIN_FLASH_BLOCK = 16
"""Smallest block that flash-attn-4 has been tried with here."""


def can_flash(kv_cache: KVCache) -> bool:
    """Whether flash-attn-4 is installed and computes with this cache on its GPU."""
    data, head_dim = kv_cache.data, kv_cache.head_dim
    if not data.is_cuda or data.dtype not in (torch.bfloat16, torch.float16):
        return False
    if head_dim % 8 or kv_cache.block_size < MIN_FLASH_BLOCK:
        return False
    major, _ = torch.cuda.get_device_capability(data.device)
    if not ((major == 9 and head_dim <= 256) or (major in (10, 11) and head_dim <= 128)):
        return False
    try:
        return importlib.util.find_spec(FLASH_PACKAGE) is not None
    except ModuleNotFoundError:
        return False


@dataclass(frozen=True, slots=True)
class FlashPlan:
    """What flash-attn-4 wants to know of a step; int32, on the GPU."""

    query_starts: torch.Tensor  # [num_seqs + 1]
    context_lens: torch.Tensor  # [num_seqs]
    pages: torch.Tensor  # [num_seqs, most blocks of one]
    longest: int
    """At least the most new tokens of one sequence."""


class FlashPrompts:
    """flash-attn-4 over the paged cache, all sequences in one call."""

    def __init__(self, kv_cache: KVCache) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about its own imports
            from flash_attn.cute import flash_attn_varlen_func

        warnings.filterwarnings("ignore", message=".*cannot be converted to a JitArgument", category=UserWarning)
        self._attend = flash_attn_varlen_func
        self._cache = kv_cache

    def plan(self, shape: StepShape, first: int) -> FlashPlan:
        """See PromptAttention."""
        starts, contexts, pages = flash_arrays(shape, first)
        there = upload_together([starts, contexts, pages], self._cache.data.device)
        return FlashPlan(there[0], there[1], there[2], int(np.diff(starts).max()))

    def forward(self, q: torch.Tensor, layer: int, plan: FlashPlan) -> torch.Tensor:
        """See PromptAttention."""
        keys, values = self._cache.pages(layer)
        out, *_ = self._attend(
            q,
            keys,
            values,
            cu_seqlens_q=plan.query_starts,
            seqused_k=plan.context_lens,
            page_table=plan.pages,
            max_seqlen_q=plan.longest,
            causal=True,
        )
        return cast(torch.Tensor, out).flatten(1)


def flash_arrays(shape: StepShape, first: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A FlashPlan's query_starts, context_lens and pages for the sequences from the first-th on."""
    starts = shape.query_starts[first:] - shape.query_starts[first]
    counts = np.diff(shape.block_starts)[first:]
    pages = np.zeros((len(counts), int(counts.max())), dtype=np.int32)
    for row, count in enumerate(counts):
        pages[row, :count] = shape.blocks_of(first + row)
    return starts, shape.context_lens[first:], pages


class TorchPrompts:
    """torch's attention, sequence by sequence: flash attention in 16 bits, the reference's tiles in float32."""

    def __init__(self, kv_cache: KVCache, num_heads: int) -> None:
        self._reference = SdpaAttention(kv_cache, num_heads)
        self._groups = num_heads // kv_cache.num_kv_heads
        self._exact = kv_cache.data.dtype == torch.float32

    def plan(self, shape: StepShape, first: int) -> list[Span]:
        """See PromptAttention."""
        return self._reference.spans(shape, first, masks=self._exact)

    def forward(self, q: torch.Tensor, layer: int, plan: list[Span]) -> torch.Tensor:
        """See PromptAttention."""
        before = plan[0].start
        outputs: list[torch.Tensor] = []
        for span in plan:
            if self._exact or span.stop - span.start == 1:
                outputs += self._reference.attend(q, layer, span.moved(-before))
            else:
                outputs.append(self._flash(q[span.start - before : span.stop - before], layer, span))
        return torch.cat(outputs)

    def _flash(self, q: torch.Tensor, layer: int, span: Span) -> torch.Tensor:
        """q [n, num_heads, head_dim] -> [n, num_heads * head_dim]."""
        keys, values = self._reference.keys_values(layer, span).repeat_interleave(self._groups, dim=1)
        mask = causal_lower_right(q.shape[0], span.context)
        out = functional.scaled_dot_product_attention(
            q.transpose(0, 1)[None], keys[None], values[None], attn_mask=cast(torch.Tensor, mask)
        )
        return out[0].transpose(0, 1).flatten(1)
