"""What the tests on a GPU share."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.api import TokenLogprobs
from engine.config import CacheOptions, EngineOptions, ModelOptions
from engine.runner import ModelRunner

DEVICE = torch.device("cuda")
GPU = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:.*cannot be converted to a JitArgument:UserWarning"),
    pytest.mark.filterwarnings("ignore:::(flash_attn|cutlass)"),
]
"""Marks of a module of such tests; flash-attn-4 warns of its own ways."""
DTYPES = ("float32", "bfloat16")


def make_gpu_runner(
    path: Path, dtype: str, *, num_blocks: int | None = 256, share: float = 0.9, **options: Any
) -> ModelRunner:
    """A runner on the GPU; num_blocks None: as many as it has room for."""
    cache = CacheOptions(num_blocks=num_blocks, block_size=16, gpu_memory_share=share)
    model = ModelOptions(path=str(path), dtype=dtype)  # type: ignore[arg-type]
    return ModelRunner(model, cache, EngineOptions(device=DEVICE.type, **options))  # type: ignore[arg-type]


def count_alike(ours: Seq[TokenLogprobs], theirs: Seq[TokenLogprobs], *, bound: float, greedy: bool = True) -> int:
    """How many tokens two answers have in common before they part, if ever.

    So far their log-probabilities may differ by `bound`, and they may part only where that decides: a greedy choice
    between two that are so close, or a draw.
    """
    assert len(ours) == len(theirs) > 0
    for place, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        known = dict(other.top)
        gaps = [abs(value - known[token]) for token, value in one.top if token in known]
        assert len(gaps) > len(one.top) // 2, f"other candidates at token {place}"
        assert max(gaps) <= bound, f"log-probabilities differ by {max(gaps):.4f} at token {place}"
        if one.token_id != other.token_id:
            if greedy:
                assert one.token_id in known, f"token {place} is {one.token_id}, which is not even likely there"
                gap = known[other.token_id] - known[one.token_id]
                assert gap <= 2 * bound, f"token {place} is {one.token_id}, not {other.token_id}, {gap:.4f} likelier"
            return place
    return len(ours)
