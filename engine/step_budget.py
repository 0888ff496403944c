"""How many tokens a step may have, and how much of that each sequence gets. Pure arithmetic.

Sequences that generate take one token each; prompts share what is left. Beside sequences that generate, prompts take
no more than `mixed_tokens`, so that running streams are held up no longer than that takes. A step of prompts alone may
be `slack_tokens` longer where that ends a prompt, which would otherwise need a small step of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from engine.batch import ScheduledSequence
from engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class StepLimits:
    """What a step may have."""

    max_tokens: int
    mixed_tokens: int
    """Most tokens of prompts in a step that also generates."""
    slack_tokens: int = 0

    @property
    def most_tokens(self) -> int:
        """Tokens of the longest step."""
        return self.max_tokens + self.slack_tokens

    def with_prompt_share(self, share: float) -> StepLimits:
        """The same, with that part of a step for prompts beside sequences that generate."""
        return replace(self, mixed_tokens=max(1, int(self.max_tokens * share)))


class StepShares:
    """A step that is being put together."""

    def __init__(self, limits: StepLimits) -> None:
        self._limits = limits
        self._shares: dict[Sequence, ScheduledSequence] = {}
        self._num_tokens = 0
        self._num_generating = 0

    def room_for(self, sequence: Sequence) -> int:
        """Tokens of the sequence that this step still takes; 0 if none."""
        limits, missing = self._limits, sequence.num_missing_tokens
        room = limits.max_tokens - self._num_tokens
        if missing > 1 and self._num_generating:
            room = min(room, limits.mixed_tokens - (self._num_tokens - self._num_generating))
        elif 0 < room < missing <= room + limits.slack_tokens:
            room = missing
        return max(0, min(room, missing))

    @property
    def is_full(self) -> bool:
        """Whether nobody gets anything any more."""
        return self._num_tokens >= self._limits.max_tokens

    def add(self, sequence: Sequence, num_tokens: int) -> None:
        """Give a sequence its next tokens."""
        self._num_generating += sequence.num_missing_tokens == 1
        self._num_tokens += num_tokens
        self._shares[sequence] = ScheduledSequence.next_of(sequence, num_tokens)

    def drop(self, sequence: Sequence) -> None:
        """Take a sequence's share back, if it has one."""
        share = self._shares.pop(sequence, None)
        if share is not None:
            self._num_generating -= sequence.num_missing_tokens == 1
            self._num_tokens -= share.num_tokens

    def end_of(self, sequence: Sequence) -> int:
        """How many of its tokens are computed once this step, and those under way, are done."""
        share = self._shares.get(sequence)
        return sequence.num_computed_tokens if share is None else share.stop

    def shares(self) -> list[ScheduledSequence]:
        """Everybody's, in the order given."""
        return list(self._shares.values())
