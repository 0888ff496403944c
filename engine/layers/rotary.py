"""Rotary position embedding (Su et al., https://arxiv.org/abs/2104.09864), in the order of Hugging Face
checkpoints: element i of a head is paired with element i + head_dim / 2.

`angles` is called once a step, `rotate` once a layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from engine.models.config import ModelConfig, RopeScaling, RopeScalingKind


@dataclass(frozen=True, slots=True)
class Angles:
    """Factors for one step's rows, in the type of the model."""

    cos: torch.Tensor  # [num_rows, 1, head_dim]
    sin: torch.Tensor  # [num_rows, 1, head_dim], the first half negated


class RotaryEmbedding:
    """Rotates queries and keys by their positions."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
        frequencies = 1.0 / (config.rope_theta**exponents)
        if config.rope_scaling is not None:
            frequencies = scale_frequencies(frequencies, config.rope_scaling)
        self._frequencies = frequencies.to(device)  # [head_dim / 2] float32
        self._dtype = dtype

    def angles(self, positions: torch.Tensor) -> Angles:
        """positions [num_rows] -> the factors of those rows."""
        angles = positions.float()[:, None] * self._frequencies  # [num_rows, head_dim / 2]
        cos, sin = angles.cos(), angles.sin()
        return Angles(
            torch.cat((cos, cos), dim=-1)[:, None].to(self._dtype),
            torch.cat((-sin, sin), dim=-1)[:, None].to(self._dtype),
        )


def rotate(heads: torch.Tensor, angles: Angles) -> None:
    """Rotate heads [num_rows, num_heads, head_dim] in place."""
    first, second = heads.chunk(2, dim=-1)
    swapped = torch.cat((second, first), dim=-1)
    heads.mul_(angles.cos).addcmul_(swapped, angles.sin)


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
