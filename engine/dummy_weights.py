"""Random weights made on the device, for benchmarks that need a model's shape and not its words."""

from __future__ import annotations

import hashlib

import torch

from engine.loader import Progress, tell_bytes, weight_shapes
from engine.models.config import ModelConfig
from engine.safetensors_reader import Weights

STD = 0.02


def dummy_weights(
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    on_progress: Progress | None = None,
) -> Weights:
    """Yield (name, weight) for each of `weight_shapes(config)`, as `dtype`, made on `device`.

    Norms are ones, biases zeros, all else is normal with a deviation of STD. A weight follows from its name and shape
    alone, so that all workers of a model have equal ones; on a GPU of another kind they may differ.
    """
    shapes = weight_shapes(config)
    weights = ((name, _make(name, shape, dtype, torch.device(device))) for name, shape in shapes.items())
    return tell_bytes(weights, shapes, dtype, on_progress)


def _make(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if name.endswith(".bias"):
        return torch.zeros(shape, dtype=dtype, device=device)
    if name.endswith("norm.weight"):
        return torch.ones(shape, dtype=dtype, device=device)
    generator = torch.Generator(device).manual_seed(_seed(name))
    return torch.empty(shape, dtype=dtype, device=device).normal_(0.0, STD, generator=generator)


def _seed(name: str) -> int:
    """The same in every process, unlike `hash`."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")
