"""Rotary position embedding (Su et al., https://arxiv.org/abs/2104.09864), in the order of Hugging Face
checkpoints: element i of a head is paired with element i + head_dim / 2.

`at` is called once a step, `place` once a layer: it rotates queries and keys and stores keys and values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch

from engine.layers.norm import RMSNorm
from engine.models.config import ModelConfig, RopeScaling, RopeScalingKind


class Positions(Protocol):
    """The places of one step's rows: in their sequences, and in the cache."""

    def place(
        self, heads: torch.Tensor, layer: torch.Tensor, q_norm: RMSNorm | None, k_norm: RMSNorm | None
    ) -> torch.Tensor:
        """Normalise (where there are norms) and rotate queries and keys, and store keys and values in their slots.

        heads [num_rows, num_heads + 2 * num_kv_heads, head_dim], queries, then keys, then values, may be overwritten;
        layer [2, num_kv_heads, num_slots, head_dim] is a layer of the cache. Returns the queries,
        [num_rows, num_heads, head_dim].
        """


@dataclass(frozen=True, slots=True)
class TorchPositions:
    """Positions by torch's own operations."""

    cos: torch.Tensor  # [num_rows, 1, head_dim]
    sin: torch.Tensor  # [num_rows, 1, head_dim], the first half negated
    slot_ids: torch.Tensor  # [num_tokens]: those of rows that are stored, which come first

    def place(
        self, heads: torch.Tensor, layer: torch.Tensor, q_norm: RMSNorm | None, k_norm: RMSNorm | None
    ) -> torch.Tensor:
        """See Positions."""
        num_kv_heads, head_dim = layer.shape[1], layer.shape[3]
        num_heads = heads.shape[1] - 2 * num_kv_heads
        if q_norm is not None and k_norm is not None:
            q, k, _ = torch.split(heads, [num_heads, num_kv_heads, num_kv_heads], dim=1)
            q.copy_(q_norm(q))
            k.copy_(k_norm(k))
        rotate(heads[:, : num_heads + num_kv_heads], self.cos, self.sin)
        stored = heads[: self.slot_ids.shape[0], num_heads:]  # keys, then values
        layer.view(2 * num_kv_heads, -1, head_dim).index_copy_(1, self.slot_ids, stored.transpose(0, 1))
        return heads[:, :num_heads]


@dataclass(frozen=True, slots=True)
class KernelPositions:
    """Positions by one kernel a layer."""

    frequencies: torch.Tensor  # [head_dim / 2] float32
    positions: torch.Tensor  # [num_rows] int32
    slot_ids: torch.Tensor  # [num_rows] int32, -1: not stored

    def place(
        self, heads: torch.Tensor, layer: torch.Tensor, q_norm: RMSNorm | None, k_norm: RMSNorm | None
    ) -> torch.Tensor:
        """See Positions."""
        from engine.kernels.rope_store import rope_store

        return rope_store(heads, self.positions, self.slot_ids, self.frequencies, layer, q_norm, k_norm)


class RotaryEmbedding:
    """Rotates queries and keys by their positions."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
        frequencies = 1.0 / (config.rope_theta**exponents)
        if config.rope_scaling is not None:
            frequencies = scale_frequencies(frequencies, config.rope_scaling)
        self._frequencies = frequencies.to(device)  # [head_dim / 2] float32
        self._dtype = dtype

    def at(self, positions: torch.Tensor, slot_ids: torch.Tensor) -> Positions:
        """positions, slot_ids [num_rows], -1 for rows that are not stored, which come last."""
        if positions.is_cuda:
            return KernelPositions(self._frequencies, positions, slot_ids)
        cos, sin = self.factors(positions)
        return TorchPositions(cos, sin, slot_ids[slot_ids >= 0])

    def factors(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """positions [num_rows] -> cosines and sines [num_rows, 1, head_dim], in the type of the model."""
        angles = positions.float()[:, None] * self._frequencies  # [num_rows, head_dim / 2]
        cos, sin = angles.cos(), angles.sin()
        return (
            torch.cat((cos, cos), dim=-1)[:, None].to(self._dtype),
            torch.cat((-sin, sin), dim=-1)[:, None].to(self._dtype),
        )


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotate heads [num_rows, num_heads, head_dim] in place by factors [num_rows, 1, head_dim]."""
    first, second = heads.chunk(2, dim=-1)
    swapped = torch.cat((second, first), dim=-1)
    heads.mul_(cos).addcmul_(swapped, sin)


def scale_frequencies(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Stretch rotary frequencies [head_dim / 2] (radians a token) for longer contexts.

    LLAMA3 keeps wavelengths that fit well into the original context, divides those longer than it by `factor`
    and goes from one to the other smoothly in between.
    """
    if scaling.kind is RopeScalingKind.LINEAR:
        return frequencies / scaling.factor
    if scaling.kind is RopeScalingKind.FACTORS:
        return frequencies / torch.tensor(scaling.factors, dtype=torch.float32)
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)  # over the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return frequencies / scaling.factor * (1 - kept) + frequencies * kept
