"""How near a kernel must come to its definition in float64 of the same inputs."""

from __future__ import annotations

import torch


def check(out: torch.Tensor, expected: torch.Tensor) -> None:
    """‖out − expected‖ / ‖expected‖ within what out's type allows, over all and for every row that is far from zero."""
    assert out.shape == expected.shape
    bound = 1e-2
    if out.dtype == torch.float32:
        bound = 1e-4 if out.is_cuda else 1e-5
    difference, size = (out.double() - expected).norm(), expected.norm()
    assert float(difference) <= bound * float(size), f"off by {float(difference / size):.2e}"
    rows = (out.double() - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1).clamp(min=1e-3)
    assert float(rows.max()) <= 3 * bound, f"row {int(rows.argmax())} is off by {float(rows.max()):.2e}"


class Maker:
    """Random tensors, the same every time."""

    def __init__(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> None:
        self._device = device
        self._dtype = dtype
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=self._generator) * scale).to(self._device, self._dtype)

    def positive(self, *shape: int) -> torch.Tensor:
        """From 0.5 to 1.5, as the weights of norms are."""
        return (torch.rand(shape, generator=self._generator) + 0.5).to(self._device, self._dtype)

    def order(self, count: int) -> torch.Tensor:
        """0 to count, shuffled; int32."""
        return torch.randperm(count, generator=self._generator).to(self._device, torch.int32)


def rms_normed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm by its definition, in float64."""
    wide = x.double()
    return wide / (wide.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.double()
