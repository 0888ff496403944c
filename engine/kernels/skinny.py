"""Linear layers of few rows, which cost what it costs to read their weights once.

Shapes: x [num_rows, inputs], weight [outputs, inputs] -> [num_rows, outputs].

A program computes some outputs for all rows over all inputs. What stands before and behind the product is done on the
way: the RMSNorm of x (its scale is a factor of each row's sum, so it is applied at the end), and a bias, a sum with the
residual or SiLU·mul behind. Before it waits for its predecessor, a program fetches the first of its weights into the L2
cache, so that the memory is busy while the kernel before it drains.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from engine.kernels.launch import overlap, wait_for_previous
from engine.layers.norm import RMSNorm

MAX_ROWS = 64
"""With more rows a product of large tiles (cuBLAS) is faster."""


@dataclass(frozen=True, slots=True)
class Tile:
    """How the work is cut."""

    outputs: int
    """Outputs a program computes."""
    inputs: int
    """Inputs one turn of its loop takes."""
    warps: int
    stages: int
    """Turns whose weights are under way at once."""
    prefetch: int
    """Bytes of each output's weights that are fetched early; 0: none."""


def fits(num_rows: int, weight: torch.Tensor) -> bool:
    """Whether so many rows are computed faster here than by cuBLAS."""
    return num_rows <= MAX_ROWS and weight.shape[1] % 16 == 0


def choose_tile(num_rows: int, outputs: int, *, gated: bool) -> Tile:
    """What measured best on an H200 for the shapes of an 8B model; see benchmarks/RESULTS.md."""
    if num_rows <= 16:
        if gated:
            return Tile(16, 256, 4, 4, 2048)
        return Tile(16, 512, 4, 4, 2048 if outputs < 32768 else 0)
    return Tile(32 if num_rows <= 32 else 64, 128, 4, 5, 1024 if outputs < 32768 else 0)


def skinny_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    norm: RMSNorm | None = None,
    gated: bool = False,
    tile: Tile | None = None,
) -> torch.Tensor:
    """weight · (norm of) x + bias + residual; gated: silu(first half of the outputs) * second half."""
    num_rows, inputs = x.shape
    outputs = weight.shape[0] // 2 if gated else weight.shape[0]
    tile = tile or choose_tile(num_rows, outputs, gated=gated)
    out = torch.empty(num_rows, outputs, dtype=x.dtype, device=x.device)
    skinny_linear_kernel[(triton.cdiv(outputs, tile.outputs),)](
        x,
        weight,
        bias if bias is not None else weight,
        residual if residual is not None else x,
        norm.weight if norm is not None else x,
        out,
        num_rows,
        outputs,
        inputs,
        x.stride(0),
        norm.eps if norm is not None else 0.0,
        BLOCK_M=max(16, triton.next_power_of_2(num_rows)),
        BLOCK_N=tile.outputs,
        BLOCK_K=tile.inputs,
        EVEN=inputs % tile.inputs == 0 and outputs % tile.outputs == 0,
        VECTOR=num_rows == 1,
        NORMED=norm is not None,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        GATED=gated,
        PREFETCH=tile.prefetch if inputs * x.element_size() >= tile.prefetch else 0,
        THREADS=32 * tile.warps,
        STAGES=tile.stages,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **overlap(x),
    )
    return out


@triton.jit
def prefetch_rows(start, row_bytes, rows, BYTES: tl.constexpr, BLOCK_N: tl.constexpr, THREADS: tl.constexpr):
    """Fetch the first BYTES of BLOCK_N rows into the L2 cache, a piece a thread."""
    PIECES: tl.constexpr = THREADS // BLOCK_N if THREADS > BLOCK_N else 1
    thread = tl.arange(0, BLOCK_N * PIECES)
    row = tl.minimum(thread // PIECES, rows - 1)
    address = start.to(tl.int64) + row.to(tl.int64) * row_bytes + (thread % PIECES) * (BYTES // PIECES)
    size = tl.full([BLOCK_N * PIECES], BYTES // PIECES, tl.int32)
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
        "=r,l,r",
        [address, size],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def skinny_linear_kernel(
    x,
    weight,
    bias,
    residual,
    norm_weight,
    out,
    num_rows,
    outputs,
    inputs,
    x_stride,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
    VECTOR: tl.constexpr,
    NORMED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    GATED: tl.constexpr,
    PREFETCH: tl.constexpr,
    THREADS: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_N outputs of all rows."""
    first = tl.program_id(0) * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    weights = weight + n[:, None].to(tl.int64) * inputs + k[None, :]
    above = outputs.to(tl.int64) * inputs
    if PDL and PREFETCH > 0:
        start = weight + first.to(tl.int64) * inputs
        row_bytes = inputs * (weight.dtype.element_ty.primitive_bitwidth // 8)
        prefetch_rows(start, row_bytes, outputs - first, PREFETCH, BLOCK_N, THREADS)
        if GATED:
            prefetch_rows(start + above, row_bytes, outputs - first, PREFETCH, BLOCK_N, THREADS)
    wait_for_previous(PDL)
    rows = x + m[:, None] * x_stride + k[None, :]
    if VECTOR:
        sum_a = tl.zeros([BLOCK_N], tl.float32)
        sum_b = tl.zeros([BLOCK_N], tl.float32)
        square = tl.zeros([BLOCK_K], tl.float32)
    else:
        sum_a = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        sum_b = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        square = tl.zeros([BLOCK_M], tl.float32)
    for start in tl.range(0, inputs, BLOCK_K, num_stages=STAGES):
        if EVEN:
            a = tl.load(weights + start)
            if GATED:
                b = tl.load(weights + above + start)
        else:
            there = (n < outputs)[:, None] & (start + k < inputs)[None, :]
            a = tl.load(weights + start, mask=there, other=0.0)
            if GATED:
                b = tl.load(weights + above + start, mask=there, other=0.0)
        if NORMED:
            scale = tl.load(norm_weight + start + k, mask=start + k < inputs, other=0.0).to(tl.float32)
        if VECTOR:
            values = tl.load(x + start + k, mask=start + k < inputs, other=0.0).to(tl.float32)
            if NORMED:
                square += values * values
                values *= scale
            sum_a += tl.sum(a.to(tl.float32) * values[None, :], axis=1)
            if GATED:
                sum_b += tl.sum(b.to(tl.float32) * values[None, :], axis=1)
        else:
            inside = (m < num_rows)[:, None] & (start + k < inputs)[None, :]
            values = tl.load(rows + start, mask=inside, other=0.0)  # [BLOCK_M, BLOCK_K]
            if NORMED:
                wide = values.to(tl.float32)
                square += tl.sum(wide * wide, axis=1)
                values = (wide * scale[None, :]).to(values.dtype)
            sum_a = tl.dot(a, tl.trans(values), sum_a)
            if GATED:
                sum_b = tl.dot(b, tl.trans(values), sum_b)
    if VECTOR:
        finish_row(sum_a, sum_b, tl.sum(square, axis=0), bias, residual, out, n, outputs, inputs, eps,
                   NORMED, HAS_BIAS, HAS_RESIDUAL, GATED)  # fmt: skip
    else:
        if NORMED:
            rstd = tl.rsqrt(square / inputs + eps)[None, :]
            sum_a *= rstd
            sum_b *= rstd
        place = m[None, :].to(tl.int64) * outputs + n[:, None]
        inside = (m < num_rows)[None, :] & (n < outputs)[:, None]
        if HAS_BIAS:
            sum_a += tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)[:, None]
            if GATED:
                sum_b += tl.load(bias + outputs + n, mask=n < outputs, other=0.0).to(tl.float32)[:, None]
        if GATED:
            sum_a = sum_a * tl.sigmoid(sum_a) * sum_b
        if HAS_RESIDUAL:
            sum_a += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + place, sum_a.to(out.dtype.element_ty), mask=inside)


@triton.jit
def finish_row(
    sum_a,
    sum_b,
    square,
    bias,
    residual,
    out,
    n,
    outputs,
    inputs,
    eps,
    NORMED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    GATED: tl.constexpr,
):
    """What stands behind the product, for a single row."""
    inside = n < outputs
    if NORMED:
        rstd = tl.rsqrt(square / inputs + eps)
        sum_a *= rstd
        sum_b *= rstd
    if HAS_BIAS:
        sum_a += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            sum_b += tl.load(bias + outputs + n, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        sum_a = sum_a * tl.sigmoid(sum_a) * sum_b
    if HAS_RESIDUAL:
        sum_a += tl.load(residual + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + n, sum_a.to(out.dtype.element_ty), mask=inside)
