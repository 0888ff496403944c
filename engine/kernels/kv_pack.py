"""Copy the KV of some tokens out of the cache's slots into one run of memory, and back.

Shapes: layers [num_layers, 2, num_heads, num_slots, head_dim], a view of the cache with any strides but the last;
slot_ids [num_tokens] int64; packed [num_layers, 2, num_tokens, num_heads, head_dim], contiguous.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TOKENS = 8
"""Tokens a program."""


def pack(layers: torch.Tensor, slot_ids: torch.Tensor, packed: torch.Tensor) -> None:
    """Fill `packed` from the slots."""
    _copy(layers, slot_ids, packed, unpack=False)


def unpack(layers: torch.Tensor, slot_ids: torch.Tensor, packed: torch.Tensor) -> None:
    """Fill the slots from `packed`; they must differ from each other."""
    _copy(layers, slot_ids, packed, unpack=True)


def _copy(layers: torch.Tensor, slot_ids: torch.Tensor, packed: torch.Tensor, *, unpack: bool) -> None:
    num_layers, _, num_heads, _, head_dim = layers.shape
    num_tokens = slot_ids.shape[0]
    if num_tokens == 0:
        return
    layer_stride, value_stride, head_stride, slot_stride, _ = layers.stride()
    kv_pack_kernel[(triton.cdiv(num_tokens, TOKENS), 2 * num_layers)](
        layers, slot_ids, packed, num_tokens,
        layer_stride, value_stride, head_stride, slot_stride,
        HEADS=num_heads,
        HEAD_DIM=head_dim,
        ROW=triton.next_power_of_2(num_heads * head_dim),
        SIZE=TOKENS,
        UNPACK=unpack,
        num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens"])
def kv_pack_kernel(
    layers, slot_ids, packed, num_tokens,
    layer_stride, value_stride, head_stride, slot_stride,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, ROW: tl.constexpr, SIZE: tl.constexpr, UNPACK: tl.constexpr,
):  # fmt: skip
    """SIZE tokens' keys or values of one layer a program."""
    part = tl.program_id(1)
    token = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    there = token < num_tokens
    column = tl.arange(0, ROW)
    inside = there[:, None] & (column < HEADS * HEAD_DIM)[None, :]  # [SIZE, ROW]
    slot = tl.load(slot_ids + token, mask=there, other=0)
    place = (part // 2).to(tl.int64) * layer_stride + (part % 2).to(tl.int64) * value_stride
    place += (column // HEAD_DIM).to(tl.int64)[None, :] * head_stride + (column % HEAD_DIM)[None, :]
    place += slot[:, None] * slot_stride
    row = (part.to(tl.int64) * num_tokens + token) * (HEADS * HEAD_DIM)
    flat = row[:, None] + column[None, :]
    if UNPACK:
        tl.store(layers + place, tl.load(packed + flat, mask=inside), mask=inside)
    else:
        tl.store(packed + flat, tl.load(layers + place, mask=inside), mask=inside)
