"""Turns a step's plan into tensors.

Rows are padded at the end to a multiple that the matrices like (`layers.matrix.row_multiple`): token_ids and
positions with zeros, sample_indices with its own last entry. slot_ids is never padded: its length is the number of
tokens of the step.
"""

from __future__ import annotations

import torch

from engine.batch import Batch, OnLayer, StepPlan
from engine.errors import IntegrityError


class BatchBuilder:
    """Builds batches for one device and block size."""

    def __init__(self, *, block_size: int, row_multiple: int, device: torch.device) -> None:
        self._block_size = block_size
        self._row_multiple = row_multiple
        self._device = device

    def build(self, plan: StepPlan, on_layer: OnLayer | None = None) -> Batch:
        """The batch of a plan; IntegrityError if a share has no blocks for its tokens."""
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        query_starts = [0]
        samples: list[int] = []
        for share in plan.shares:
            stop = share.start + share.num_tokens
            sequence = share.sequence
            if not (0 <= share.start < stop <= len(sequence.token_ids)):
                raise IntegrityError(
                    f"tokens {share.start} to {stop} of request {sequence.request.request_id} cannot be computed: "
                    f"it has {len(sequence.token_ids)}"
                )
            if len(sequence.block_ids) * self._block_size < stop:
                raise IntegrityError(
                    f"request {sequence.request.request_id} has {len(sequence.block_ids)} blocks of "
                    f"{self._block_size}, too few for its first {stop} tokens"
                )
            tokens += sequence.token_ids[share.start : stop]
            positions += range(share.start, stop)
            slots += self._slots(sequence.block_ids, share.start, stop)
            query_starts.append(len(tokens))
            if share.samples:
                samples.append(len(tokens) - 1)
        padding = [0] * (-len(tokens) % self._row_multiple)
        return Batch(
            token_ids=self._tensor(tokens + padding),
            positions=self._tensor(positions + padding),
            slot_ids=self._tensor(slots),
            query_starts=query_starts,
            context_lens=[share.start + share.num_tokens for share in plan.shares],
            block_ids=[share.sequence.block_ids for share in plan.shares],
            sample_indices=self._tensor(samples + samples[-1:] * (-len(samples) % self._row_multiple)),
            on_layer=on_layer,
        )

    def _slots(self, block_ids: list[int], start: int, stop: int) -> list[int]:
        size = self._block_size
        return [block_ids[position // size] * size + position % size for position in range(start, stop)]

    def _tensor(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)
