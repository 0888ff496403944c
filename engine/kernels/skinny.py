"""Linear layers of few rows, which cost what it costs to read their weights once.

Shapes: x [num_rows, inputs], weight [outputs, inputs] -> [num_rows, outputs].

A program computes some outputs for all rows over all inputs; a bias, a sum with the residual or SiLU·mul behind is done
on the way. So is the RMSNorm of a single row (its scale is a factor of the row's sum, so it is applied at the end); for
more rows, which the matrix units want from shared memory as they are, a kernel of its own is faster. Before it waits
for its predecessor, a program fetches the first of its weights into the L2 cache, so that the memory is busy while the
kernel before it drains.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from engine.kernels.launch import let_next_start, overlap, wait_for_previous
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


def choose_tile(num_rows: int, outputs: int, inputs: int, *, gated: bool) -> Tile | None:
    """What measured best inside a decode step of an 8B model on an H200, for products shaped like its own (fused
    query-key-value, attention output, gate-up, down, head); None: cuBLAS is faster. See benchmarks/RESULTS.md.
    """
    if inputs % 16 or num_rows > MAX_ROWS:
        return None
    head, down = outputs >= 32768, outputs < inputs
    if num_rows == 1:
        if head:
            return Tile(32, 256, 4, 4, 0)
        return Tile(16, 256, 4, 6 if down else 4, 2048 if outputs == inputs else 0)
    if num_rows <= 16:
        if gated or head:
            return Tile(64, 128, 4, 4, 0)
        if down:
            return Tile(32, 128, 4, 8, 0)
        return Tile(64, 128, 4, 6, 2048) if outputs > inputs else Tile(64, 256, 4, 4, 0)
    if gated:
        return Tile(64, 128, 4, 4, 0)
    if head:
        return Tile(128, 64, 8, 5, 0)
    return Tile(64, 128, 8, 5, 2048) if outputs > inputs else None


def skinny_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    tile: Tile,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    norm: RMSNorm | None = None,
    gated: bool = False,
) -> torch.Tensor:
    """weight · (norm of) x + bias + residual; gated: silu(first half of the outputs) * second half."""
    num_rows, inputs = x.shape
    if norm is not None and num_rows > 1:
        x, norm = norm(x), None
    outputs = weight.shape[0] // 2 if gated else weight.shape[0]
    out = torch.empty(num_rows, outputs, dtype=x.dtype, device=x.device)
    whole = dict(
        BLOCK_N=tile.outputs,
        BLOCK_K=tile.inputs,
        EVEN=inputs % tile.inputs == 0 and outputs % tile.outputs == 0,
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
    grid = (triton.cdiv(outputs, tile.outputs),)
    bias, residual = weight if bias is None else bias, x if residual is None else residual
    if num_rows == 1:
        scale, eps = (norm.weight, norm.eps) if norm is not None else (x, 0.0)
        row_linear_kernel[grid](
            x, weight, bias, residual, scale, out, outputs, inputs, eps, NORMED=norm is not None, **whole
        )
    else:
        block_m = max(16, triton.next_power_of_2(num_rows))
        skinny_linear_kernel[grid](
            x, weight, bias, residual, out, num_rows, outputs, inputs, x.stride(0), BLOCK_M=block_m, **whole
        )
    return out


@triton.jit
def fetch_early(
    weight, first, outputs, inputs,
    GATED: tl.constexpr, BYTES: tl.constexpr, BLOCK_N: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """Fetch the first BYTES of the weights of each of a program's outputs into the L2 cache, a piece a thread."""
    PIECES: tl.constexpr = THREADS // BLOCK_N if THREADS > BLOCK_N else 1
    thread = tl.arange(0, BLOCK_N * PIECES)
    row = tl.minimum(first + thread // PIECES, outputs - 1).to(tl.int64)
    row_bytes = inputs * (weight.dtype.element_ty.primitive_bitwidth // 8)
    address = weight.to(tl.int64) + row * row_bytes + (thread % PIECES) * (BYTES // PIECES)
    size = tl.full([BLOCK_N * PIECES], BYTES // PIECES, tl.int32)
    for half in tl.static_range(2 if GATED else 1):
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
            "=r,l,r",
            [address + half * (outputs.to(tl.int64) * row_bytes), size],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def load_weights(place, n, k, outputs, inputs, EVEN: tl.constexpr):
    """A tile [BLOCK_N, BLOCK_K] of the weights of outputs n [BLOCK_N] and inputs k [BLOCK_K]."""
    if EVEN:
        tile = tl.load(place)
    else:
        tile = tl.load(place, mask=(n < outputs)[:, None] & (k < inputs)[None, :], other=0.0)
    return tile


@triton.jit
def finish(
    sum_a, sum_b, bias, residual, out, n, place, inside, outputs,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """What stands behind the product of outputs n, and where it goes."""
    if HAS_BIAS:
        sum_a += tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)
        if GATED:
            sum_b += tl.load(bias + outputs + n, mask=n < outputs, other=0.0).to(tl.float32)
    if GATED:
        sum_a = sum_a * tl.sigmoid(sum_a) * sum_b
    if HAS_RESIDUAL:
        sum_a += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, sum_a.to(out.dtype.element_ty), mask=inside)


@triton.jit
def row_linear_kernel(
    x, weight, bias, residual, norm_weight, out, outputs, inputs, eps,
    NORMED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, GATED: tl.constexpr,
    PREFETCH: tl.constexpr, THREADS: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs of a single row, without matrix units."""
    first = tl.program_id(0) * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    weights = weight + n[:, None].to(tl.int64) * inputs + k[None, :]
    above = outputs.to(tl.int64) * inputs
    if PDL and PREFETCH > 0:
        fetch_early(weight, first, outputs, inputs, GATED, PREFETCH, BLOCK_N, THREADS)
    wait_for_previous(PDL)
    sum_a = tl.zeros([BLOCK_N], tl.float32)
    sum_b = tl.zeros([BLOCK_N], tl.float32)
    squares = tl.zeros([BLOCK_K], tl.float32)
    for start in tl.range(0, inputs, BLOCK_K, num_stages=STAGES):
        a = load_weights(weights + start, n, start + k, outputs, inputs, EVEN)
        if GATED:
            b = load_weights(weights + above + start, n, start + k, outputs, inputs, EVEN)
        values = tl.load(x + start + k, mask=start + k < inputs, other=0.0).to(tl.float32)
        if NORMED:
            squares += values * values
            values *= tl.load(norm_weight + start + k, mask=start + k < inputs, other=0.0).to(tl.float32)
        sum_a += tl.sum(a.to(tl.float32) * values[None, :], axis=1)
        if GATED:
            sum_b += tl.sum(b.to(tl.float32) * values[None, :], axis=1)
    let_next_start(PDL)
    if NORMED:
        rstd = tl.rsqrt(tl.sum(squares, axis=0) / inputs + eps)
        sum_a *= rstd
        sum_b *= rstd
    finish(sum_a, sum_b, bias, residual, out, n, n, n < outputs, outputs, HAS_BIAS, HAS_RESIDUAL, GATED)


@triton.jit(do_not_specialize=["num_rows"])
def skinny_linear_kernel(
    x, weight, bias, residual, out, num_rows, outputs, inputs, x_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, GATED: tl.constexpr,
    PREFETCH: tl.constexpr, THREADS: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs of all rows; the weights are the larger side of the matrix units' products."""
    first = tl.program_id(0) * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    weights = weight + n[:, None].to(tl.int64) * inputs + k[None, :]
    above = outputs.to(tl.int64) * inputs
    rows = x + m[:, None] * x_stride + k[None, :]
    if PDL and PREFETCH > 0:
        fetch_early(weight, first, outputs, inputs, GATED, PREFETCH, BLOCK_N, THREADS)
    wait_for_previous(PDL)
    sum_a = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    sum_b = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start in tl.range(0, inputs, BLOCK_K, num_stages=STAGES):
        a = load_weights(weights + start, n, start + k, outputs, inputs, EVEN)
        if GATED:
            b = load_weights(weights + above + start, n, start + k, outputs, inputs, EVEN)
        inside = (m < num_rows)[:, None] & (start + k < inputs)[None, :]
        values = tl.load(rows + start, mask=inside, other=0.0)  # [BLOCK_M, BLOCK_K]
        sum_a = tl.dot(a, tl.trans(values), sum_a)
        if GATED:
            sum_b = tl.dot(b, tl.trans(values), sum_b)
    let_next_start(PDL)
    place = m[None, :].to(tl.int64) * outputs + n[:, None]
    inside = (m < num_rows)[None, :] & (n < outputs)[:, None]
    finish(
        sum_a, sum_b, bias, residual, out, n[:, None], place, inside, outputs, HAS_BIAS, HAS_RESIDUAL, GATED
    )  # fmt: skip
