"""Linear layers divided among ranks.

A column-parallel layer holds some of the outputs (query heads, feed-forward channels) and needs no
communication; several projections of the same input are fused into one product. A row-parallel layer
holds some of the inputs and sums over ranks. One after the other they cost one all-reduce.

A layer is filled with `load`, part by part, in any order. With the last part the weight takes its final
form (see `matrix`) and the layer can be called.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from engine.errors import IntegrityError
from engine.layers.matrix import Matrix, make_matrix
from engine.layers.norm import RMSNorm
from engine.parallel import TensorParallel

Kind = Literal["weight", "bias"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearSpec:
    """What is common to all projections of a linear layer."""

    inputs: int
    bias: bool
    dtype: torch.dtype
    device: torch.device


class _Assembly:
    """This rank's share of a weight (and bias) being put together from named projections."""

    def __init__(self, spec: LinearSpec, outputs: Mapping[str, int]) -> None:
        total = sum(outputs.values())
        self._weight = torch.empty(total, spec.inputs, dtype=spec.dtype, device=spec.device)
        self._bias = torch.empty(total, dtype=spec.dtype, device=spec.device) if spec.bias else None
        self._rows: dict[str, slice] = {}
        start = 0
        for name, size in outputs.items():
            self._rows[name] = slice(start, start + size)
            start += size
        kinds: tuple[Kind, ...] = ("weight", "bias") if spec.bias else ("weight",)
        self._missing = {(name, kind) for name in outputs for kind in kinds}

    def put(self, name: str, kind: Kind, data: torch.Tensor) -> Matrix | None:
        """Take in one part; the finished matrix once nothing is missing."""
        if (name, kind) not in self._missing:
            raise IntegrityError(f"{name}.{kind} is not awaited here; missing are {sorted(self._missing)}")
        target = self._weight if kind == "weight" else self._bias
        assert target is not None
        target[self._rows[name]].copy_(data)
        self._missing.remove((name, kind))
        return None if self._missing else make_matrix(self._weight, self._bias)


class ColumnParallelLinear:
    """One or more projections of the same input, each divided by outputs.

    `rows` maps a projection's name to the rows of its weight that this rank holds; the outputs lie one
    projection after the other.
    """

    def __init__(self, spec: LinearSpec, rows: Mapping[str, range]) -> None:
        self._rows = dict(rows)
        self._assembly: _Assembly | None = _Assembly(spec, {name: len(part) for name, part in rows.items()})
        self._matrix: Matrix

    def load(self, name: str, kind: Kind, data: torch.Tensor) -> None:
        """Take in the whole (undivided) weight [outputs, inputs] or bias [outputs] of one projection."""
        if self._assembly is None:
            raise IntegrityError(f"{name}.{kind} came twice")
        rows = self._rows[name]
        matrix = self._assembly.put(name, kind, data[rows.start : rows.stop])
        if matrix is not None:
            self._matrix, self._assembly = matrix, None

    def __call__(self, x: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        """The product of norm(x), x [num_rows, inputs] -> [num_rows, this rank's outputs]."""
        return self._matrix.multiply_normed(x, norm)

    def gated(self, x: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        """silu(first projection) * second projection of norm(x), for a layer of two projections of one size."""
        return self._matrix.multiply_gated(x, norm)


class RowParallelLinear:
    """A projection divided by inputs: each rank has a part of every sum.

    `columns` are the inputs this rank holds. The bias is added by rank 0 alone, so that the sum holds it once.
    """

    def __init__(self, spec: LinearSpec, name: str, outputs: int, columns: range, parallel: TensorParallel) -> None:
        self._columns = columns
        self._parallel = parallel
        self._has_bias = spec.bias and parallel.rank == 0
        local = LinearSpec(inputs=len(columns), bias=self._has_bias, dtype=spec.dtype, device=spec.device)
        self._assembly: _Assembly | None = _Assembly(local, {name: outputs})
        self._matrix: Matrix

    def load(self, name: str, kind: Kind, data: torch.Tensor) -> None:
        """Take in the whole (undivided) weight [outputs, inputs] or bias [outputs]."""
        if kind == "bias" and not self._has_bias:
            return
        if self._assembly is None:
            raise IntegrityError(f"{name}.{kind} came twice")
        part = data[:, self._columns.start : self._columns.stop] if kind == "weight" else data
        matrix = self._assembly.put(name, kind, part)
        if matrix is not None:
            self._matrix, self._assembly = matrix, None

    def __call__(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """The product over all ranks + residual, which may be overwritten.

        x [num_rows, this rank's inputs], residual [num_rows, outputs] -> [num_rows, outputs].
        """
        if self._parallel.size == 1:
            return self._matrix.multiply_add(x, residual)
        return self._parallel.all_reduce(self._matrix.multiply(x)).add_(residual)
