"""Attention of one new token a sequence over the paged cache: split-KV, grouped-query aware.

The keys of a sequence are cut into splits of about equal length, so many over all sequences that the GPU is filled (a
long sequence among short ones gets more). One program computes one (split, KV head): the query heads that share the KV
head are the rows of one small matrix product, so each key and value is read once. A second kernel joins the splits of a
sequence by their log-sum-exps (Flash-Decoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html); a sequence
of one split is written at once.

Shapes: groups = num_heads / num_kv_heads; a split is (row, first_token, stop_token, first entry in block_ids, alone).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl

from engine.kernels.launch import let_next_start, overlap, wait_for_previous

TILE = 64
"""Keys one turn of a program's loop reads, and the least a split is worth."""
SPLIT_FIELDS = 5
FEW_ROWS = 16
"""Up to here a step has few keys, and what counts is how soon a program has its own."""
_LOG2E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True, slots=True)
class Splits:
    """How a step's keys are cut; on the GPU."""

    table: torch.Tensor  # [max_splits, SPLIT_FIELDS] int32; row -1: no split
    starts: torch.Tensor  # [num_rows + 1] int32, the splits of a row are a half-open range
    block_ids: torch.Tensor  # [any] int32, the blocks of all sequences, one after the other


class SplitPlanner:
    """Cuts contexts into splits; numpy, on the CPU."""

    def __init__(self, *, num_kv_heads: int, num_multiprocessors: int, block_size: int) -> None:
        self._one_wave = num_multiprocessors / num_kv_heads
        self._block_size = block_size

    def max_splits(self, num_rows: int) -> int:
        """No step of so many sequences has more."""
        return self._target(num_rows) + num_rows

    def _target(self, num_rows: int) -> int:
        """Splits to aim at: a few programs for each multiprocessor."""
        return max(1, int(waves_for(num_rows) * self._one_wave))

    def cut(self, context_lens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """context_lens [num_rows] -> (table [num_splits, SPLIT_FIELDS], starts [num_rows + 1]), both int32."""
        total = int(context_lens.sum())
        length = max(TILE, -(-total // (self._target(len(context_lens)) * TILE)) * TILE)
        counts = np.maximum(1, np.rint(context_lens / length)).astype(np.int64)
        starts = np.concatenate(([0], np.cumsum(counts)))
        rows = np.repeat(np.arange(len(context_lens)), counts)
        number, count, context = np.arange(len(rows)) - starts[rows], counts[rows], context_lens[rows]
        tiles = -(-context // TILE)
        first = number * tiles // count * TILE
        stop = np.minimum((number + 1) * tiles // count * TILE, context)
        blocks = -(-context_lens // self._block_size)
        base = np.concatenate(([0], np.cumsum(blocks)[:-1]))[rows]
        table = np.stack((rows, first, stop, base, count == 1), axis=1)
        return table.astype(np.int32), starts.astype(np.int32)


def decode_attention(
    q: torch.Tensor, keys_values: torch.Tensor, splits: Splits, block_size: int, out: torch.Tensor
) -> None:
    """Attend each of the first rows of q to its sequence's keys.

    q [num_rows, num_heads, head_dim] and keys_values [2, num_kv_heads, num_slots, head_dim] may have any strides but
    the last; out is [num_rows, num_heads * head_dim], rows of sequences in `splits` are written.
    """
    num_rows = splits.starts.shape[0] - 1
    _, num_heads, head_dim = q.shape
    num_kv_heads = keys_values.shape[1]
    groups = num_heads // num_kv_heads
    max_splits = splits.table.shape[0]
    parts = torch.empty(max_splits, num_heads, head_dim, dtype=torch.float32, device=q.device)
    sums = torch.empty(max_splits, num_heads, dtype=torch.float32, device=q.device)
    value_stride, head_stride, slot_stride, _ = keys_values.stride()
    block_d = max(16, triton.next_power_of_2(head_dim))
    sizes = dict(HEAD_DIM=head_dim, BLOCK_D=block_d, **overlap(q))
    decode_attention_kernel[(num_kv_heads, max_splits)](
        q, keys_values, splits.table, splits.block_ids, out, parts, sums, head_dim**-0.5,
        q.stride(0), q.stride(1), value_stride, head_stride, slot_stride, num_heads,
        BLOCK_SIZE=block_size,
        GROUPS=groups,
        BLOCK_H=max(16, triton.next_power_of_2(groups)),
        TILE=TILE,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=4,
        num_stages=stages_for(num_rows, block_d, q.element_size()),
        **sizes,
    )  # fmt: skip
    merge_splits_kernel[(num_rows, num_heads)](
        parts, sums, splits.starts, out, num_heads, BLOCK_S=16, num_warps=2, **sizes
    )


def waves_for(num_rows: int) -> int:
    """Programs a multiprocessor should get, when there are enough keys."""
    return 2 if num_rows <= FEW_ROWS else 4


def stages_for(num_rows: int, block_d: int, element_size: int) -> int:
    """Tiles of keys and values under way at once in a program, within the memory it may take."""
    tile_bytes = 2 * TILE * block_d * element_size
    return max(1, min(4 if num_rows <= FEW_ROWS else 2, 140_000 // tile_bytes))


@triton.jit
def soften(scores, largest, total):
    """One turn of an online softmax over scores [BLOCK_H, TILE]: largest and total so far, these scores' weights, and
    the factor by which what was summed before shrinks (https://arxiv.org/abs/1805.02867)."""
    higher = tl.maximum(largest, tl.max(scores, axis=1))
    shrink = tl.exp2(largest - higher)
    weights = tl.exp2(scores - higher[:, None])
    return higher, total * shrink + tl.sum(weights, axis=1), weights, shrink


@triton.jit
def decode_attention_kernel(
    q, cache, table, block_ids, out, parts, sums, scale,
    q_row_stride, q_head_stride, value_stride, head_stride, slot_stride, num_heads,
    BLOCK_SIZE: tl.constexpr, GROUPS: tl.constexpr, BLOCK_H: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One KV head of one split."""
    kv_head, split = tl.program_id(0), tl.program_id(1)
    group, column, key = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D), tl.arange(0, TILE)
    wait_for_previous(PDL)
    let_next_start(PDL)
    row = tl.load(table + split * 5)
    if row < 0:
        return
    first, stop = tl.load(table + split * 5 + 1), tl.load(table + split * 5 + 2)
    blocks = block_ids + tl.load(table + split * 5 + 3)
    alone = tl.load(table + split * 5 + 4)
    heads = kv_head * GROUPS + group
    used = (group < GROUPS)[:, None] & (column < HEAD_DIM)[None, :]
    queries = q + row.to(tl.int64) * q_row_stride + heads[:, None] * q_head_stride + column[None, :]
    queries = tl.load(queries, mask=used, other=0.0)  # [BLOCK_H, BLOCK_D]
    base = cache + kv_head * head_stride
    largest = tl.full([BLOCK_H], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    mixed = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    block = tl.load(blocks + (first + key) // BLOCK_SIZE, mask=first + key < stop, other=0)
    for start in range(first, stop, TILE):
        token = start + key
        there = token < stop
        slot = block.to(tl.int64) * BLOCK_SIZE + token % BLOCK_SIZE
        block = tl.load(blocks + (token + TILE) // BLOCK_SIZE, mask=token + TILE < stop, other=0)  # one turn ahead
        where = base + slot[:, None] * slot_stride + column[None, :]
        mask = there[:, None] & (column < HEAD_DIM)[None, :]
        keys = tl.load(where, mask=mask, other=0.0)  # [TILE, BLOCK_D]
        values = tl.load(where + value_stride, mask=mask, other=0.0)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * (scale * _LOG2E)
        largest, total, weights, shrink = soften(tl.where(there[None, :], scores, -float("inf")), largest, total)
        mixed = mixed * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)
    place = (split * num_heads + heads).to(tl.int64)
    mixed = mixed / total[:, None]
    if alone != 0:
        target = out + (row.to(tl.int64) * num_heads + heads[:, None]) * HEAD_DIM + column[None, :]
        tl.store(target, mixed.to(out.dtype.element_ty), mask=used)
    else:
        tl.store(parts + place[:, None] * HEAD_DIM + column[None, :], mixed, mask=used)
        tl.store(sums + place, largest + tl.log2(total), mask=group < GROUPS)


@triton.jit
def merge_splits_kernel(
    parts, sums, starts, out, num_heads,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One head of one row: a mean of its splits, weighted by what each one's scores sum to."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    column = tl.arange(0, BLOCK_D)
    let_next_start(PDL)
    wait_for_previous(PDL)
    first = tl.load(starts + row)
    stop = tl.load(starts + row + 1)
    if stop - first > 1:
        largest = -float("inf")
        total = 0.0
        mixed = tl.zeros([BLOCK_D], tl.float32)
        for start in range(first, stop, BLOCK_S):
            split = start + tl.arange(0, BLOCK_S)
            there = split < stop
            place = (split * num_heads + head).to(tl.int64)
            weight = tl.load(sums + place, mask=there, other=-float("inf"))
            part = tl.load(
                parts + place[:, None] * HEAD_DIM + column[None, :],
                mask=there[:, None] & (column < HEAD_DIM)[None, :],
                other=0.0,
            )
            higher = tl.maximum(largest, tl.max(weight, axis=0))
            shrink = tl.exp2(largest - higher)
            weight = tl.exp2(weight - higher)
            total = total * shrink + tl.sum(weight, axis=0)
            mixed = mixed * shrink + tl.sum(part * weight[:, None], axis=0)
            largest = higher
        place = out + (row.to(tl.int64) * num_heads + head) * HEAD_DIM + column
        tl.store(place, (mixed / total).to(out.dtype.element_ty), mask=column < HEAD_DIM)
