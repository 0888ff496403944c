"""What the models ask of attention."""

from __future__ import annotations

from typing import Protocol

import torch

from engine.batch import Batch


class AttentionBackend(Protocol):
    """Causal grouped-query attention of a step's tokens over the paged KV cache.

    A step's keys and values are in the cache before `forward` is called for their layer.
    """

    def plan(self, batch: Batch) -> None:
        """Leave in batch.scratch what is the same for all layers: once a step, before its forward pass."""

    def forward(self, q: torch.Tensor, layer: int, batch: Batch) -> torch.Tensor:
        """Attend each token of the step to itself and all earlier tokens of its sequence.

        q is [num_rows, num_heads, head_dim]; rows past the step's tokens are padding. Returns
        [num_rows, num_heads * head_dim]; padding rows mean nothing.
        """
