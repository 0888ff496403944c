"""Root-mean-square normalisation (Zhang and Sennrich, https://arxiv.org/abs/1910.07467)."""

from __future__ import annotations

import torch


class RMSNorm:
    """x / sqrt(mean(x²) + eps) * weight over the last dimension, computed in float32."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        self.weight = weight
        self.eps = eps
        self._eps = torch.tensor(eps, dtype=torch.float32, device=weight.device)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., size] -> the same shape and type."""
        if x.is_cuda:
            from engine.kernels.rows import rms_norm

            return rms_norm(x, self.weight, self.eps)
        wide = x.float()
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = torch.addcmul(self._eps, norm, norm, value=1.0 / x.shape[-1]).rsqrt_()
        return (wide * scale).to(x.dtype).mul_(self.weight)
