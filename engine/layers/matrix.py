"""The weight of a linear layer in the form its device multiplies fastest.

Shapes: num_rows x inputs -> num_rows x outputs. A weight arrives as [outputs, inputs].

On a CPU in float32 the weight is packed once into oneDNN's blocked layout and the original is dropped.
Its kernels are faster than MKL's on the plain layout at every number of rows, and a row's result does not
depend on how many rows there are as long as these are at least two; see `ROW_MULTIPLE`. On a GPU in 16 bits few rows
go through kernels that read the weight once at the memory's speed and do what stands before and behind on the way
(`engine/kernels/skinny.py`); more rows go through cuBLAS.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch.nn import functional

from engine.layers.norm import RMSNorm

if TYPE_CHECKING:
    from engine.kernels.skinny import Tile

ROW_MULTIPLE = 4
"""Packed matrices want this many rows or a multiple: four rows take less time than one (the kernel for a
single row is a slow special case that rounds differently), and each new number of rows costs about a
millisecond of code generation, kept in a cache of 1024 entries."""

_PACKING_HINT_ROWS = 64


class Matrix(Protocol):
    """A weight that can be multiplied with."""

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """x [num_rows, inputs] -> [num_rows, outputs], bias added."""

    def multiply_add(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """`multiply(x) + other`, with other [num_rows, outputs], which may be overwritten."""

    def multiply_normed(self, x: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        """`multiply(norm(x))`."""

    def multiply_gated(self, x: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        """silu(gate) * up -> [num_rows, outputs / 2], where `multiply(norm(x))` is gate, then up."""


class DenseMatrix:
    """A weight as it came, for any device and type."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight = weight
        self._bias = bias

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """See Matrix."""
        return functional.linear(x, self._weight, self._bias)

    def multiply_add(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """See Matrix."""
        other.addmm_(x, self._weight.t())
        return other if self._bias is None else other.add_(self._bias)

    def multiply_normed(self, x: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        """See Matrix."""
        return self.multiply(norm(x))

    def multiply_gated(self, x: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        """See Matrix."""
        return gate(self.multiply(norm(x)))


class PackedMatrix:
    """A float32 weight in oneDNN's blocked layout."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKING_HINT_ROWS)
        self._bias = bias
        self._linear = torch.ops.mkldnn._linear_pointwise.default
        self._linear_binary = torch.ops.mkldnn._linear_pointwise.binary

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """See Matrix."""
        y: torch.Tensor = self._linear(x, self._weight, self._bias, "none", [], "")
        return y

    def multiply_add(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """See Matrix."""
        y: torch.Tensor = self._linear_binary(x, other, self._weight, self._bias, "add")
        return y

    def multiply_normed(self, x: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        """See Matrix."""
        return self.multiply(norm(x))

    def multiply_gated(self, x: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        """See Matrix."""
        return gate(self.multiply(norm(x)))


class SkinnyMatrix:
    """A 16-bit weight on a GPU: few rows by our own kernels, more by cuBLAS."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        from engine.kernels import skinny

        self._kernels = skinny
        self._dense = DenseMatrix(weight, bias)
        self._weight = weight
        self._bias = bias

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """See Matrix."""
        tile = self._tile(x)
        if tile is None:
            return self._dense.multiply(x)
        return self._kernels.skinny_linear(x, self._weight, tile, bias=self._bias)

    def multiply_add(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """See Matrix."""
        tile = self._tile(x)
        if tile is None:
            return self._dense.multiply_add(x, other)
        return self._kernels.skinny_linear(x, self._weight, tile, bias=self._bias, residual=other)

    def multiply_normed(self, x: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        """See Matrix."""
        tile = self._tile(x)
        if tile is None:
            return self._dense.multiply_normed(x, norm)
        return self._kernels.skinny_linear(x, self._weight, tile, bias=self._bias, norm=norm)

    def multiply_gated(self, x: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        """See Matrix."""
        tile = self._tile(x, gated=True)
        if tile is None:
            return self._dense.multiply_gated(x, norm)
        return self._kernels.skinny_linear(x, self._weight, tile, bias=self._bias, norm=norm, gated=True)

    def _tile(self, x: torch.Tensor, *, gated: bool = False) -> Tile | None:
        outputs, inputs = self._weight.shape
        return self._kernels.choose_tile(x.shape[0], outputs // 2 if gated else outputs, inputs, gated=gated)


def gate(gate_up: torch.Tensor) -> torch.Tensor:
    """[num_rows, 2 * size] -> silu(first half) * second half."""
    if gate_up.is_cuda:
        from engine.kernels.rows import silu_mul

        return silu_mul(gate_up)
    first, second = gate_up.chunk(2, dim=-1)
    return functional.silu(first).mul_(second)


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether weights on this device and of this type are packed."""
    return device.type == "cpu" and dtype is torch.float32 and torch._C._has_mkldnn


def row_multiple(device: torch.device, dtype: torch.dtype) -> int:
    """The number of rows of a step should be a multiple of this."""
    return ROW_MULTIPLE if can_pack(device, dtype) else 1


def make_matrix(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Matrix:
    """The fastest form of a weight [outputs, inputs] with an optional bias [outputs]."""
    if can_pack(weight.device, weight.dtype):
        return PackedMatrix(weight, bias)
    if weight.is_cuda and weight.dtype in (torch.bfloat16, torch.float16):
        return SkinnyMatrix(weight, bias)
    return DenseMatrix(weight, bias)
