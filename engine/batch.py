"""What one forward pass reads.

Shapes: num_tokens = tokens computed this step over all sequences; num_seqs = sequences in the step.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.api import TokenLogprobs
from engine.sequence import Sequence

if TYPE_CHECKING:
    import torch

OnLayer = Callable[[int, Any], None]
"""Called as on_layer(layer, event) once the work that writes this layer's KV of the step is enqueued;
`event` marks its completion (a torch.cuda.Event; None on a CPU: it is complete). Must not block."""


@dataclass(frozen=True, slots=True)
class LayerHook:
    """What goes with a step: who hears of its layers, here and at the worker's other ranks."""

    on_layer: OnLayer | None
    """Hears of this rank's layers."""
    note: bytes = b""
    """From which each other rank makes its own on_layer (`Follower.make_hook`); empty: they have none for this step."""
    layers: Container[int] | None = None
    """Those that on_layer hears of; None: all. Each one that somebody waits for holds a recorded step up, by 25 µs on
    average (benchmarks/RESULTS.md)."""

    def listener(self, layer: int) -> OnLayer | None:
        """Who is to hear of this layer."""
        return self.on_layer if self.layers is None or layer in self.layers else None


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """A sequence's share of a step: tokens [start, start + num_tokens) are computed."""

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool
    """Whether this share reaches the sequence's last token, so that a new one is sampled."""
    life: int = 0
    """How often the sequence had been preempted when this was scheduled."""

    @classmethod
    def next_of(cls, sequence: Sequence, num_tokens: int) -> ScheduledSequence:
        """The sequence's next num_tokens."""
        start = sequence.num_computed_tokens
        return cls(
            sequence, start, num_tokens, start + num_tokens == sequence.num_tokens, life=sequence.num_preemptions
        )

    @property
    def stop(self) -> int:
        """Tokens computed once this is done, and the place of the token it samples."""
        return self.start + self.num_tokens


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


@dataclass(frozen=True, slots=True)
class StepShape:
    """The lengths of a step's sequences and their blocks; numpy, int64, on the CPU."""

    query_starts: np.ndarray  # [num_seqs + 1], half-open ranges into the step's tokens
    context_lens: np.ndarray  # [num_seqs], tokens of KV a sequence has after this step's writes
    block_ids: np.ndarray  # [any], the blocks that hold each sequence's context, one sequence after the other
    block_starts: np.ndarray  # [num_seqs + 1], half-open ranges into block_ids

    @property
    def num_seqs(self) -> int:
        """Sequences of the step."""
        return len(self.context_lens)

    @property
    def num_tokens(self) -> int:
        """Tokens of the step."""
        return int(self.query_starts[-1])

    @property
    def num_decode(self) -> int:
        """Sequences before the first that has more than one token."""
        longer = np.flatnonzero(np.diff(self.query_starts) != 1)
        return int(longer[0]) if len(longer) else self.num_seqs

    def blocks_of(self, index: int) -> np.ndarray:
        """The blocks of one sequence's context."""
        return self.block_ids[self.block_starts[index] : self.block_starts[index + 1]]


@dataclass(slots=True)
class Batch:
    """A step as tensors, on the engine's device.

    num_rows >= num_tokens: rows may be padded to what the matrix kernels like best or to what a recorded step was made
    for; padding comes last, writes no KV and is never sampled. The first num_decode sequences have one token each.
    Ids are int64 on a CPU, as torch's indexing wants them, and int32 on a GPU.
    """

    token_ids: torch.Tensor  # [num_rows]; what stands where sources says so does not matter
    sources: torch.Tensor  # [num_rows], the row of `previous` whose token this is, or -1: token_ids has it
    previous: torch.Tensor  # [any, 2] int64, what the step before chose (see sampler.Choices)
    positions: torch.Tensor  # [num_rows], place in the sequence
    slot_ids: torch.Tensor  # [num_rows], block_id * block_size + offset, where KV is written; -1: nowhere
    sample_indices: torch.Tensor  # [num_samples, padded with its last entry], rows whose logits are needed
    shape: StepShape
    every_row_samples: bool = False
    """Whether sample_indices are all rows in order."""
    hook: LayerHook | None = None
    scratch: Any = None
    """What the attention backend's plan() leaves for its forward()."""
