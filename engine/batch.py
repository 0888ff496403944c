"""What one forward pass reads.

Shapes: num_tokens = tokens computed this step over all sequences; num_seqs = sequences in the step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from engine.api import TokenLogprobs
from engine.sequence import Sequence

if TYPE_CHECKING:
    import torch

OnLayer = Callable[[int, Any], None]
"""Called as on_layer(layer, event) once the work that writes this layer's KV of the step is enqueued;
`event` marks its completion (None on a CPU: it is complete). Must not block."""


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """A sequence's share of a step: tokens [start, start + num_tokens) are computed."""

    sequence: Sequence
    start: int
    num_tokens: int

    @property
    def samples(self) -> bool:
        """Whether this share reaches the sequence's last token, so that a new one is sampled."""
        return self.start + self.num_tokens == self.sequence.num_tokens


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What the scheduler wants computed. Every sequence already owns the blocks its share writes."""

    shares: tuple[ScheduledSequence, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens computed in this step."""
        return sum(share.num_tokens for share in self.shares)


@dataclass(frozen=True, slots=True)
class SampledToken:
    """The token chosen for one sequence."""

    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(slots=True)
class StepResult:
    """Outcome of a step: one entry per share of the plan, None where the share does not sample."""

    sampled: list[SampledToken | None] = field(default_factory=list)


@dataclass(slots=True)
class Batch:
    """A step as tensors, on the engine's device.

    num_rows >= num_tokens: rows may be padded to what the matrix kernels like best; padding comes
    last, writes no KV and is never sampled.
    """

    token_ids: torch.Tensor  # [num_rows] int64
    positions: torch.Tensor  # [num_rows] int64, place in the sequence
    slot_ids: torch.Tensor  # [num_tokens] int64, block_id * block_size + offset, where KV is written
    query_starts: list[int]  # [num_seqs + 1], half-open ranges into num_tokens
    context_lens: list[int]  # [num_seqs], tokens of KV a sequence has after this step's writes
    block_ids: list[list[int]]  # [num_seqs][blocks of the sequence]
    sample_indices: torch.Tensor  # [num_samples, padded with its last entry] int64, rows whose logits are needed
    on_layer: OnLayer | None = None
    scratch: dict[str, Any] = field(default_factory=dict)
    """What the attention backend's plan() leaves for its forward()."""
