"""The weight of a linear layer in the form its device multiplies fastest.

Shapes: num_rows x inputs -> num_rows x outputs. A weight arrives as [outputs, inputs].

On a CPU in float32 the weight is packed once into oneDNN's blocked layout and the original is dropped.
Its kernels are faster than MKL's on the plain layout at every number of rows, and a row's result does not
depend on how many rows there are as long as these are at least two; see `ROW_MULTIPLE`.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch.nn import functional

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
        """`multiply(x) + other`, with other [num_rows, outputs] left as it is."""


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
        return functional.linear(x, self._weight, self._bias).add_(other)


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
    return DenseMatrix(weight, bias)
