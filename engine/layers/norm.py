"""Root-mean-square normalisation (Zhang and Sennrich, https://arxiv.org/abs/1910.07467)."""

from __future__ import annotations

import torch


class RMSNorm:
    """x / sqrt(mean(x²) + eps) * weight over the last dimension, computed in float32."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        self._weight = weight
        self._eps = eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., size] -> the same shape and type."""
        wide = x.float()
        scale = wide.square().mean(-1, keepdim=True).add_(self._eps).rsqrt_()
        return (wide * scale).to(x.dtype).mul_(self._weight)
