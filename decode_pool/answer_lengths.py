"""How long answers have been here of late, and how long one that runs is still to be expected to go on.

A small histogram with exponential forgetting. An answer that was cut off by its max_tokens has not shown its length,
only that it is at least so long: such ones count as in survival analysis (Kaplan and Meier 1958), so that the share of
answers that go on beyond a length, `survival`, is not pulled down by clients that ask for few tokens. A few answers of
the length that the configuration predicts are always counted too, and tell of lengths that nobody has reached yet.

The engine loop's thread calls everything here.
"""

from __future__ import annotations

import bisect
import itertools
import math
from dataclasses import dataclass

FORGET_AFTER = 256
"""Answers after which one counts 1/e."""
ENOUGH = 32
"""Answers before which the predicted length alone is believed."""
MIN_SURVIVAL = 1e-200
"""So few go beyond a length that nothing can be said of how much further."""
NUM_PREDICTED = 4.0
"""So many answers of the predicted length are counted beside those that were seen."""


def _edges() -> tuple[int, ...]:
    """Lengths where a bucket begins: each by itself up to 4, then four to an octave, up to a million tokens."""
    edges = list(range(5))
    while edges[-1] < 1_000_000:
        edges.append(max(edges[-1] + 1, math.ceil(edges[-1] * 1.19)))
    return tuple(edges)


EDGES = _edges()


@dataclass(slots=True)
class _Table:
    """Worked out of the counts: at each edge, the share of answers that go beyond it, and its integral from there on.

    The integral is taken from the far end, so that what is small beyond a length is not lost in what came before.
    """

    survival: list[float]
    rest: list[float]

    def at(self, length: float) -> tuple[float, float]:
        """Survival at a length, and its integral from there on; between edges survival falls evenly."""
        index = min(bisect.bisect_right(EDGES, length) - 1, len(EDGES) - 2)
        low, high = EDGES[index], EDGES[index + 1]
        left = max(0.0, (high - length) / (high - low))
        then = self.survival[index + 1]
        here = then + (self.survival[index] - then) * left
        return here, self.rest[index + 1] + (here + then) / 2 * left * (high - low)


class AnswerLengths:
    """The lengths of a worker's answers."""

    def __init__(self, predicted_tokens: int) -> None:
        """`predicted_tokens`: what an answer is taken to have before enough were seen."""
        self.num_seen = 0
        self._predicted = predicted_tokens
        self._ended = [0.0] * len(EDGES)
        self._cut = [0.0] * len(EDGES)
        self._unit = 1.0
        """What the next answer counts; it grows, which is to say that the others shrink."""
        self._table: _Table | None = None

    def add(self, num_tokens: int, *, was_cut: bool) -> None:
        """An answer of so many tokens is over; `was_cut`: only because no more were asked for."""
        index = max(0, bisect.bisect_left(EDGES, max(1, num_tokens)) - 1)
        if was_cut:
            index = min(index + 1, len(EDGES) - 1)  # it has outlived its bucket
        (self._cut if was_cut else self._ended)[index] += self._unit
        self.num_seen += 1
        self._unit *= math.exp(1 / FORGET_AFTER)
        if self._unit > 1e6:
            self._ended = [count / self._unit for count in self._ended]
            self._cut = [count / self._unit for count in self._cut]
            self._unit = 1.0
        self._table = None

    def expected(self, num_tokens: int, max_tokens: int) -> float:
        """The final length to expect of an answer that has so many tokens and may have `max_tokens`: its mean."""
        if num_tokens >= max_tokens:
            return float(num_tokens)
        if self.num_seen < ENOUGH:
            return float(min(max_tokens, max(self._predicted, num_tokens)))
        if self._table is None:
            self._table = self._tabulate()
        survival, rest = self._table.at(num_tokens)
        if survival < MIN_SURVIVAL:
            return float(min(max_tokens, num_tokens + self._predicted))
        return num_tokens + (rest - self._table.at(max_tokens)[1]) / survival

    def _tabulate(self) -> _Table:
        """Bucket by bucket: of those that got so far, which share ended there?"""
        survival = [1.0]
        at_risk = sum(self._ended) + sum(self._cut)
        prior = NUM_PREDICTED * self._unit
        widths = [high - low for low, high in itertools.pairwise(EDGES)]
        for index, width in enumerate(widths):
            at_risk -= self._cut[index]
            ended = self._ended[index] + prior * (1 - math.exp(-width / max(1, self._predicted)))
            survival.append(survival[-1] * min(1.0, max(0.0, 1 - ended / (max(0.0, at_risk) + prior))))
            at_risk -= self._ended[index]
        rest = [0.0] * len(EDGES)
        for index in reversed(range(len(widths))):
            rest[index] = rest[index + 1] + (survival[index] + survival[index + 1]) / 2 * widths[index]
        return _Table(survival, rest)
