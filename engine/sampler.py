"""From logits to tokens.

Order: minimum length, penalties, [log-probabilities are taken here,] temperature, top-k, top-p, min-p; then
one uniform number picks from the cumulative distribution. The number is a hash of (seed, position in the
sequence), so any worker that has the same logits goes on in the same way.

A greedy row is the lowest index of the largest logit. A step in which all rows are greedy and plain costs one
reduction; other work is done for the rows that need it alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Seq

import torch

from engine.api import SamplingParams, TokenLogprobs
from engine.batch import SampledToken
from engine.errors import EngineError
from engine.sequence import Sequence

_MASK = 2**64 - 1


class Sampler:
    """Chooses the next token of each sequence of a step."""

    def __init__(self, eos_token_ids: Seq[int]) -> None:
        self._eos_token_ids = tuple(eos_token_ids)

    def sample(self, logits: torch.Tensor, sequences: Seq[Sequence]) -> list[SampledToken]:
        """Logits [num_seqs, vocab_size] float32, changed in place by penalties -> one token a sequence.

        Raises EngineError if a row has no finite largest logit.
        """
        for row, sequence in zip(logits, sequences, strict=True):
            self._penalise(row, sequence)
        best, chosen = logits.max(dim=-1)
        for row, sequence in enumerate(sequences):
            if sequence.request.params.temperature > 0:
                chosen[row] = _draw(logits[row], sequence)
        finite = torch.isfinite(best)
        token_ids, usable = torch.stack((chosen, finite.long())).tolist()
        for sequence, good in zip(sequences, usable, strict=True):
            if not good:
                raise EngineError(f"the logits of request {sequence.request.request_id} are not finite")
        return [
            SampledToken(token_id, _logprobs(logits[row], token_id, sequence.request.params.logprobs))
            for row, (token_id, sequence) in enumerate(zip(token_ids, sequences, strict=True))
        ]

    def _penalise(self, row: torch.Tensor, sequence: Sequence) -> None:
        """Apply minimum length and penalties to one row [vocab_size] in place."""
        params = sequence.request.params
        if sequence.num_generated_tokens < params.min_tokens:
            ends = params.stop_token_ids if params.ignore_eos else (*self._eos_token_ids, *params.stop_token_ids)
            inside = [token_id for token_id in ends if 0 <= token_id < row.shape[0]]
            row[inside] = -torch.inf
        if params.repetition_penalty != 1.0:
            seen = torch.tensor(sorted(set(sequence.token_ids)), device=row.device)
            values = row[seen]
            penalty = params.repetition_penalty
            row[seen] = torch.where(values > 0, values / penalty, values * penalty)
        if (params.presence_penalty or params.frequency_penalty) and sequence.num_generated_tokens:
            occurrences = Counter(sequence.token_ids[sequence.num_prompt_tokens :])
            seen = torch.tensor(list(occurrences), device=row.device)
            counts = torch.tensor(list(occurrences.values()), device=row.device)
            row[seen] -= params.presence_penalty + params.frequency_penalty * counts


def _draw(row: torch.Tensor, sequence: Sequence) -> torch.Tensor:
    """One token from a row [vocab_size], as a 0-dimensional tensor."""
    params = sequence.request.params
    token_ids, probabilities = candidates(row, params)
    cumulative = probabilities.cumsum(0)
    point = uniform(params.seed, sequence.num_tokens) * cumulative[-1:]
    index = torch.searchsorted(cumulative, point, right=True).clamp_(max=token_ids.shape[0] - 1)
    return token_ids[index[0]]


def candidates(row: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens that may be drawn, in order of id, and their probabilities (float64, not normalised).

    As transformers does: each filter works on what the one before it left; of equals at a limit, top-k keeps all,
    top-p those with lower ids.
    """
    scores = row.double() / params.temperature
    token_ids = torch.arange(row.shape[0], device=row.device)
    if 0 < params.top_k < row.shape[0]:
        threshold = scores.topk(params.top_k).values[-1]
        token_ids = (scores >= threshold).nonzero().squeeze(1)
        scores = scores[token_ids]
    probabilities = torch.softmax(scores, dim=0)
    if params.top_p < 1.0:
        token_ids, probabilities = _nucleus(token_ids, probabilities, params.top_p)
    if params.min_p > 0.0:
        kept = (probabilities >= params.min_p * probabilities.max()).nonzero().squeeze(1)
        token_ids, probabilities = token_ids[kept], probabilities[kept]
    return token_ids, probabilities


def _nucleus(token_ids: torch.Tensor, probabilities: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The likeliest tokens that together reach top_p (Holtzman et al., https://arxiv.org/abs/1904.09751).

    Tokens below (1 - top_p) / count cannot be among them, for together they have less than 1 - top_p: leaving them
    out first makes the sort short.
    """
    kept = (probabilities >= (1.0 - top_p) / probabilities.shape[0]).nonzero().squeeze(1)
    token_ids, probabilities = token_ids[kept], probabilities[kept]
    order = probabilities.argsort(descending=True, stable=True)
    before = probabilities[order].cumsum(0) - probabilities[order]
    kept = order[before < top_p].sort().values
    return token_ids[kept], probabilities[kept]


def _logprobs(row: torch.Tensor, token_id: int, num_top: int | None) -> TokenLogprobs | None:
    """Log-probabilities of the chosen token and of the num_top likeliest; None if none are wanted."""
    if num_top is None:
        return None
    logprobs = torch.log_softmax(row, dim=0)
    values, ids = logprobs.topk(min(num_top, row.shape[0]))
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprobs(token_id, float(logprobs[token_id]), top)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on (seed, position) alone: two rounds of SplitMix64
    (Steele, Lea and Flood, https://doi.org/10.1145/2660193.2660195).
    """
    return (_mix(_mix(seed) + position) >> 11) * 2.0**-53


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
