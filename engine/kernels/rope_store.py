"""Rotate queries and keys by their positions and store keys and values, in one pass over a step's heads.

The queries go to memory of their own: flash attention reads them 3 % faster than between the keys and values.

Shapes: heads [num_rows, num_heads + 2 * num_kv_heads, head_dim], queries, keys, values; element i of a head is
paired with element i + head_dim / 2. keys, values [num_slots, num_kv_heads, head_dim] are one layer of the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.launch import let_next_start, overlap, wait_for_previous
from engine.layers.norm import RMSNorm

FEW_ROWS = 64
"""Up to here a program takes few heads, so that the GPU is filled."""


def rope_store(
    heads: torch.Tensor,
    positions: torch.Tensor,
    slot_ids: torch.Tensor,
    frequencies: torch.Tensor,
    keys_values: torch.Tensor,
    q_norm: RMSNorm | None = None,
    k_norm: RMSNorm | None = None,
) -> torch.Tensor:
    """The rotated queries [num_rows, num_heads, head_dim]; rotated keys and plain values go to the slots.

    With norms (Qwen3) each query and key head is normalised before.

    positions, slot_ids [num_rows] int32 (a slot below 0: nothing is stored); frequencies [head_dim / 2] float32;
    keys_values [2, num_kv_heads, num_slots, head_dim], any strides but the last.
    """
    num_rows, num_all, head_dim = heads.shape
    num_kv_heads = keys_values.shape[1]
    tile = min(triton.next_power_of_2(num_all), 4 if num_rows <= FEW_ROWS else 16)
    query_norm, key_norm, eps = frequencies, frequencies, 0.0
    if q_norm is not None and k_norm is not None:
        query_norm, key_norm, eps = q_norm.weight, k_norm.weight, q_norm.eps
    value_stride, head_stride, slot_stride, _ = keys_values.stride()
    num_heads = num_all - 2 * num_kv_heads
    queries = torch.empty(num_rows, num_heads, head_dim, dtype=heads.dtype, device=heads.device)
    rope_store_kernel[(num_rows, triton.cdiv(num_all, tile))](
        heads, queries, positions, slot_ids, frequencies, keys_values, query_norm, key_norm, eps,
        heads.stride(0), num_heads, num_kv_heads, value_stride, head_stride, slot_stride,
        HALF=head_dim // 2,
        BLOCK=triton.next_power_of_2(head_dim // 2),
        HEADS=tile,
        NORMED=q_norm is not None,
        num_warps=4,
        **overlap(heads),
    )  # fmt: skip
    return queries


@triton.jit
def rope_store_kernel(
    heads, queries, positions, slot_ids, frequencies, cache, query_norm, key_norm, eps,
    row_stride, num_heads, num_kv_heads, value_stride, head_stride, slot_stride,
    HALF: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr, NORMED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A few heads of one row a program."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]  # [HEADS, 1]
    column = tl.arange(0, BLOCK)[None, :]  # [1, BLOCK]
    inside = (head < num_heads + 2 * num_kv_heads) & (column < HALF)
    frequency = tl.load(frequencies + column, mask=column < HALF, other=0.0)
    let_next_start(PDL)
    wait_for_previous(PDL)
    place = heads + row * row_stride + head * (2 * HALF) + column
    first = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(place + HALF, mask=inside, other=0.0).to(tl.float32)
    if NORMED:
        square = tl.sum(first * first + second * second, axis=1)[:, None] / (2 * HALF)
        rstd = tl.rsqrt(square + eps)
        weights = tl.where(head < num_heads, query_norm + column, key_norm + column)
        low = tl.load(weights, mask=column + 0 * head < HALF, other=0.0).to(tl.float32)
        high = tl.load(weights + HALF, mask=column + 0 * head < HALF, other=0.0).to(tl.float32)
        is_value = head >= num_heads + num_kv_heads
        first = tl.where(is_value, first, first * rstd * low)
        second = tl.where(is_value, second, second * rstd * high)
    angle = tl.load(positions + row).to(tl.float32) * frequency
    cosine, sine = tl.cos(angle), tl.sin(angle)
    turned = head < num_heads + num_kv_heads
    new_first = tl.where(turned, first * cosine - second * sine, first)
    new_second = tl.where(turned, second * cosine + first * sine, second)
    kind = heads.dtype.element_ty
    is_query = inside & (head < num_heads)
    place = queries + (row * num_heads + head) * (2 * HALF) + column
    tl.store(place, new_first.to(kind), mask=is_query)
    tl.store(place + HALF, new_second.to(kind), mask=is_query)
    slot = tl.load(slot_ids + row).to(tl.int64)
    stored = inside & (head >= num_heads) & (slot >= 0)
    is_value = (head >= num_heads + num_kv_heads).to(tl.int64)
    kv_head = head - num_heads - is_value * num_kv_heads
    target = cache + is_value * value_stride + kv_head * head_stride + slot * slot_stride + column
    tl.store(target, new_first.to(kind), mask=stored)
    tl.store(target + HALF, new_second.to(kind), mask=stored)
