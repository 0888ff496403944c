"""Digests of pieces: what the sender announces, the receiver computes again and compares.

xxh3-64 for pieces in a CPU's memory; for pieces on a GPU a checksum that the GPU computes (`checksum`). Which
pieces carry one is the policy's affair (`config.DigestPolicy`); both ends of a pair have the same.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch

from kv_transfer.config import TransferConfig

Value = Callable[[], int]
"""The digest, once the lane has passed the point where it was begun."""


class Digester:
    """The digests of one end of a pair."""

    def __init__(self, config: TransferConfig, *, on_gpu: bool) -> None:
        policy = config.digest
        if policy == "auto":
            policy = "sampled" if on_gpu else "all"
        self._share = {"all": 1.0, "none": 0.0}.get(policy, config.digest_share)
        self._on_gpu = on_gpu
        self.is_prompt = not on_gpu
        """Whether a received piece's digest is known before the piece is written, or only together with it."""
        self._draw = random.Random().random

    def wanted(self) -> bool:
        """Whether the next piece carries a digest."""
        return self._share >= 1.0 or self._draw() < self._share

    def begin(self, data: torch.Tensor) -> Value:
        """Begin to compute the digest of a flat uint8 tensor, on the current lane."""
        if self._on_gpu:
            from kv_transfer.checksum import begin_checksum

            return begin_checksum(data)
        from xxhash import xxh3_64_intdigest

        return lambda: xxh3_64_intdigest(data.numpy().data)
