"""Turns a step's plan into tensors.

Rows are padded at the end to a multiple that the matrices like (`layers.matrix.row_multiple`): token_ids and
positions with zeros, sources and slot_ids with -1, sample_indices with its own last entry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from engine.batch import Batch, LayerHook, ScheduledSequence, StepPlan, StepShape
from engine.errors import IntegrityError
from engine.sequence import PENDING, Sequence
from engine.upload import upload_together


@dataclass(frozen=True, slots=True)
class StepArrays:
    """A step's plan as numbers; numpy, int32, without padding."""

    token_ids: np.ndarray  # [num_tokens]
    sources: np.ndarray  # [num_tokens]
    positions: np.ndarray  # [num_tokens]
    slot_ids: np.ndarray  # [num_tokens]
    sample_indices: np.ndarray  # [num_samples]
    shape: StepShape


class BatchBuilder:
    """Builds batches for one device and block size."""

    def __init__(self, *, block_size: int, row_multiple: int, device: torch.device) -> None:
        self._block_size = block_size
        self._row_multiple = row_multiple
        self._device = device

    def arrays(self, plan: StepPlan, rows_of: Mapping[Sequence, int]) -> StepArrays:
        """The numbers of a plan; rows_of tells where the step before put each sequence's choice.

        Raises IntegrityError if a share has no blocks for its tokens, or an unknown token that no step has chosen.
        """
        tokens: list[int] = []
        blocks: list[int] = []
        block_counts: list[int] = []
        for share in plan.shares:
            self._check(share)
            tokens += share.sequence.token_ids[share.start : share.stop]
            block_counts.append(-(-share.stop // self._block_size))
            blocks += share.sequence.block_ids[: block_counts[-1]]
        token_ids = np.array(tokens, dtype=np.int32)
        counts = np.array([share.num_tokens for share in plan.shares], dtype=np.int64)
        context_lens = np.array([share.stop for share in plan.shares], dtype=np.int64)
        query_starts = _starts(counts)
        shape = StepShape(query_starts, context_lens, np.array(blocks, dtype=np.int64), _starts(np.array(block_counts)))
        owner = np.repeat(np.arange(len(counts)), counts)  # [num_tokens], which sequence
        positions = np.arange(len(tokens)) - query_starts[owner] + (context_lens - counts)[owner]
        places = shape.block_starts[owner] + positions // self._block_size
        slot_ids = shape.block_ids[places] * self._block_size + positions % self._block_size
        samples = np.array([share.samples for share in plan.shares], dtype=bool)
        return StepArrays(
            token_ids=token_ids,
            sources=self._sources(plan, token_ids, rows_of),
            positions=positions.astype(np.int32),
            slot_ids=slot_ids.astype(np.int32),
            sample_indices=(query_starts[1:][samples] - 1).astype(np.int32),
            shape=shape,
        )

    def build(self, arrays: StepArrays, previous: torch.Tensor, hook: LayerHook | None = None) -> Batch:
        """The batch of a step; `previous` is what the step before chose."""
        padding = -len(arrays.token_ids) % self._row_multiple
        samples = arrays.sample_indices
        padded = [
            np.pad(arrays.token_ids, (0, padding)),
            np.pad(arrays.sources, (0, padding), constant_values=-1),
            np.pad(arrays.positions, (0, padding)),
            np.pad(arrays.slot_ids, (0, padding), constant_values=-1),
            np.pad(samples, (0, -len(samples) % self._row_multiple), mode="edge") if len(samples) else samples,
        ]
        there = upload_together(padded, self._device)
        if self._device.type == "cpu":
            there = [tensor.long() for tensor in there]
        token_ids, sources, positions, slot_ids, sample_indices = there
        return Batch(
            token_ids=token_ids,
            sources=sources,
            previous=previous,
            positions=positions,
            slot_ids=slot_ids,
            sample_indices=sample_indices,
            shape=arrays.shape,
            every_row_samples=len(samples) == len(arrays.token_ids),
            hook=hook,
        )

    def _check(self, share: ScheduledSequence) -> None:
        sequence = share.sequence
        if not (0 <= share.start < share.stop <= len(sequence.token_ids)):
            raise IntegrityError(
                f"tokens {share.start} to {share.stop} of request {sequence.request.request_id} cannot be computed: "
                f"it has {len(sequence.token_ids)}"
            )
        if len(sequence.block_ids) * self._block_size < share.stop:
            raise IntegrityError(
                f"request {sequence.request.request_id} has {len(sequence.block_ids)} blocks of "
                f"{self._block_size}, too few for its first {share.stop} tokens"
            )

    @staticmethod
    def _sources(plan: StepPlan, token_ids: np.ndarray, rows_of: Mapping[Sequence, int]) -> np.ndarray:
        sources = np.full(len(token_ids), -1, dtype=np.int32)
        if (token_ids == PENDING).any():
            last = -1
            for share in plan.shares:
                last += share.num_tokens
                if token_ids[last] == PENDING:
                    if share.sequence not in rows_of:
                        raise IntegrityError(f"no step has chosen token {share.stop - 1} of this sequence yet")
                    sources[last] = rows_of[share.sequence]
                    token_ids[last] = 0
        return sources


def _starts(counts: np.ndarray) -> np.ndarray:
    """Half-open ranges of so many things each, as their ends: [len(counts) + 1]."""
    return np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(counts, dtype=np.int64)))
