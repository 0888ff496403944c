"""Row-wise kernels for any number of rows: RMSNorm, SiLU·mul, embedding, greedy choice.

Shapes: num_rows x size, rows contiguous.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.launch import let_next_start, overlap, wait_for_previous

SILU_BLOCK = 2048
EMBED_BLOCK = 2048
GREEDY_BLOCK = 4096
"""Logits one program looks at."""


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., size] (last dimension contiguous) -> x / sqrt(mean(x²) + eps) * weight, computed in float32."""
    size = x.shape[-1]
    rows = x.reshape(-1, size)
    out = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(size)
    num_warps = min(16, max(1, block // 512))
    rms_norm_kernel[(rows.shape[0],)](
        rows, weight, out, rows.stride(0), size, eps, BLOCK=block, num_warps=num_warps, **overlap(x)
    )
    return out.view(x.shape)


@triton.jit
def rms_norm_kernel(x, weight, out, x_stride, size, eps, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """One row a program."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    let_next_start(PDL)
    wait_for_previous(PDL)
    values = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(values * values, axis=0) / size + eps)
    tl.store(out + row * size + columns, (values * rstd * scale).to(out.dtype.element_ty), mask=inside)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up [num_rows, 2 * size] -> silu(first half) * second half, [num_rows, size]."""
    num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(num_rows, size, dtype=gate_up.dtype, device=gate_up.device)
    grid = (num_rows, triton.cdiv(size, SILU_BLOCK))
    silu_mul_kernel[grid](gate_up, out, size, BLOCK=SILU_BLOCK, num_warps=4, **overlap(gate_up))
    return out


@triton.jit
def silu_mul_kernel(gate_up, out, size, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """A run of one row a program."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    let_next_start(PDL)
    wait_for_previous(PDL)
    gate = tl.load(gate_up + row * 2 * size + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * size + size + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * size + columns, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=inside)


def embed(
    token_ids: torch.Tensor, sources: torch.Tensor, previous: torch.Tensor, table: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of `table` [vocab_size, size] for token_ids [num_rows], or where sources >= 0 for previous[sources, 0].

    `previous` [any, 2] int64 holds what the step before chose and the CPU may not have seen yet. Also returns the
    tokens, [num_rows] int64.
    """
    num_rows, size = token_ids.shape[0], table.shape[1]
    out = torch.empty(num_rows, size, dtype=table.dtype, device=table.device)
    tokens = torch.empty(num_rows, dtype=torch.int64, device=table.device)
    embed_kernel[(num_rows, triton.cdiv(size, EMBED_BLOCK))](
        token_ids, sources, previous, table, out, tokens, size, BLOCK=EMBED_BLOCK, num_warps=4, **overlap(table)
    )
    return out, tokens


@triton.jit
def embed_kernel(token_ids, sources, previous, table, out, tokens, size, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """A run of one row a program."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    let_next_start(PDL)
    wait_for_previous(PDL)
    source = tl.load(sources + row)
    token = tl.load(token_ids + row).to(tl.int64)
    token = tl.where(source >= 0, tl.load(previous + 2 * tl.maximum(source, 0)), token)
    tl.store(tokens + row, token, mask=tl.program_id(1) == 0)
    tl.store(out + row * size + columns, tl.load(table + token * size + columns, mask=inside), mask=inside)


def greedy(logits: torch.Tensor, choices: torch.Tensor) -> None:
    """The lowest index of each row's largest logit into choices [num_rows, 2] int64.

    Beside it stands 1 where the largest logit is a finite number and none is NaN, else 0.
    """
    num_rows, size = logits.shape
    num_chunks = triton.cdiv(size, GREEDY_BLOCK)
    values = torch.empty(num_rows, num_chunks, dtype=torch.float32, device=logits.device)
    indices = torch.empty(num_rows, num_chunks, dtype=torch.int32, device=logits.device)
    greedy_kernel[(num_rows, num_chunks)](
        logits, values, indices, logits.stride(0), size, num_chunks, BLOCK=GREEDY_BLOCK, num_warps=8, **overlap(logits)
    )
    block = triton.next_power_of_2(num_chunks)
    greedy_merge_kernel[(num_rows,)](values, indices, choices, num_chunks, BLOCK=block, num_warps=1, **overlap(logits))


@triton.jit
def greedy_kernel(logits, values, indices, stride, size, num_chunks, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """The best of one chunk of one row; +inf stands for a chunk with a NaN."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    columns = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    let_next_start(PDL)
    wait_for_previous(PDL)
    found = tl.load(logits + row * stride + columns, mask=inside, other=-float("inf")).to(tl.float32)
    found = tl.where(found == found, found, float("inf"))
    best = tl.max(found, axis=0)
    index = tl.min(tl.where((found == best) & inside, columns, size), axis=0)
    tl.store(values + row * num_chunks + chunk, best)
    tl.store(indices + row * num_chunks + chunk, index)


@triton.jit
def greedy_merge_kernel(values, indices, choices, num_chunks, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """The best of a row's chunks."""
    row = tl.program_id(0).to(tl.int64)
    chunks = tl.arange(0, BLOCK)
    inside = chunks < num_chunks
    let_next_start(PDL)
    wait_for_previous(PDL)
    found = tl.load(values + row * num_chunks + chunks, mask=inside, other=-float("inf"))
    index = tl.load(indices + row * num_chunks + chunks, mask=inside, other=2147483647)
    best = tl.max(found, axis=0)
    first = tl.min(tl.where((found == best) & inside, index, 2147483647), axis=0)
    tl.store(choices + 2 * row, first.to(tl.int64))
    tl.store(choices + 2 * row + 1, (tl.abs(best) < float("inf")).to(tl.int64))
