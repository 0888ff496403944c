"""From logits to tokens, on the device that has the logits.

Order: minimum length, penalties, [log-probabilities are taken here,] temperature, top-k, top-p, min-p; then
one uniform number picks from the cumulative distribution. The number is a hash of (seed, position in the
sequence), so any worker that has the same logits goes on in the same way.

A greedy row is the lowest index of the largest logit. Rows that ask for nothing else cost one reduction over all of
them; other work is done for the rows that need it alone. Nothing here waits for a GPU: what a step chose is read from
`Sampled`, and the next step finds it on the device (`choices`).

Shapes: choices [num_rows, 2] int64: the token, and 1 if its row had a finite largest logit and no NaN, else 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from engine.api import SamplingParams, TokenLogprobs
from engine.batch import SampledToken, ScheduledSequence
from engine.errors import EngineError
from engine.sequence import PENDING
from engine.upload import Download, upload

MAX_SPECIAL = 32
"""Rows that ask for more than their largest logit are worked on so many at a time, to bound their memory."""
_MASK = 2**64 - 1


def choose_greedy(logits: torch.Tensor, choices: torch.Tensor) -> None:
    """Fill choices [num_rows, 2] with the lowest index of each row's largest logit [num_rows, vocab_size]."""
    if logits.is_cuda:
        from engine.kernels.rows import greedy

        greedy(logits, choices)
    else:
        best, chosen = logits.max(dim=-1)
        choices[:, 0] = chosen
        choices[:, 1] = torch.isfinite(best)


@dataclass(frozen=True, slots=True)
class _Logprobs:
    """Log-probabilities of some rows of a step, on their way to the CPU."""

    rows: list[int]
    counts: list[int]
    """Alternatives each row wants."""
    own: Download  # [num_rows]
    values: Download  # [num_rows, most wanted]
    token_ids: Download  # [num_rows, most wanted]


class Sampled:
    """What a step chose, on its way to the CPU."""

    def __init__(self, choices: torch.Tensor, shares: Seq[ScheduledSequence], logprobs: Seq[_Logprobs]) -> None:
        self._choices = Download(choices)
        self._shares = shares
        self._logprobs = logprobs

    def wait(self) -> list[SampledToken]:
        """One token a share; EngineError if a row had no finite largest logit."""
        chosen = self._choices.wait().tolist()
        for share, (_, usable) in zip(self._shares, chosen, strict=True):
            if not usable:
                raise EngineError(f"the logits of request {share.sequence.request.request_id} are not finite")
        found: dict[int, TokenLogprobs] = {}
        for wanted in self._logprobs:
            own, values, ids = (part.wait().tolist() for part in (wanted.own, wanted.values, wanted.token_ids))
            for index, (row, count) in enumerate(zip(wanted.rows, wanted.counts, strict=True)):
                top = tuple(zip(ids[index][:count], values[index][:count], strict=True))
                found[row] = TokenLogprobs(chosen[row][0], own[index], top)
        return [SampledToken(token_id, found.get(row)) for row, (token_id, _) in enumerate(chosen)]


class Sampler:
    """Chooses the next token of each sequence of a step."""

    def __init__(self, eos_token_ids: Seq[int]) -> None:
        self._eos_token_ids = tuple(eos_token_ids)

    def sample(
        self,
        logits: torch.Tensor,
        shares: Seq[ScheduledSequence],
        token_ids: torch.Tensor,
        rows: Seq[int],
        choices: torch.Tensor,
    ) -> Sampled:
        """Choose for every row of logits [num_shares, vocab_size], which are left as they are.

        choices [num_shares, 2] has each row's greedy choice and is overwritten where more is asked for; the token
        before the one to choose is token_ids[rows[share]] [int64].
        """
        special = [index for index, share in enumerate(shares) if self._is_special(share)]
        logprobs: list[_Logprobs] = []
        for first in range(0, len(special), MAX_SPECIAL):
            some = special[first : first + MAX_SPECIAL]
            places = upload(some, torch.int64, logits.device)
            scores = logits.index_select(0, places).float()
            for row, index in zip(scores, some, strict=True):
                self._penalise(row, shares[index], token_ids[rows[index] : rows[index] + 1])
            scores.clamp_(max=torch.finfo(scores.dtype).max)  # a penalty may take a large one beyond all numbers
            chosen = _choose([shares[index] for index in some], scores)
            choices[:, 0].index_copy_(0, places, chosen)
            logprobs += _take_logprobs(scores, chosen, some, shares)
        return Sampled(choices, shares, logprobs)

    def _is_special(self, share: ScheduledSequence) -> bool:
        """Whether a row asks for anything but its largest logit."""
        params = share.sequence.request.params
        penalised = params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty
        return bool(params.temperature > 0 or params.logprobs is not None or penalised or _too_short(share))

    def _penalise(self, row: torch.Tensor, share: ScheduledSequence, last: torch.Tensor) -> None:
        """Apply minimum length and penalties to one row [vocab_size] in place; last [1] is the token before."""
        sequence, params = share.sequence, share.sequence.request.params
        if _too_short(share):
            ends = params.stop_token_ids if params.ignore_eos else (*self._eos_token_ids, *params.stop_token_ids)
            inside = [token_id for token_id in ends if 0 <= token_id < row.shape[0]]
            row.index_fill_(0, upload(inside, torch.int64, row.device), -torch.inf)
        if params.repetition_penalty != 1.0:
            seen = _seen(sequence.token_ids[: share.stop], last)
            values, penalty = row[seen], params.repetition_penalty
            row[seen] = torch.where(values > 0, values / penalty, values * penalty)
        generated = sequence.token_ids[sequence.num_prompt_tokens : share.stop]
        if (params.presence_penalty or params.frequency_penalty) and generated:
            occurrences = Counter(token for token in generated if token != PENDING)
            counts = torch.zeros_like(row)
            counts[upload(list(occurrences), torch.int64, row.device)] = upload(
                list(occurrences.values()), row.dtype, row.device
            )
            if generated[-1] == PENDING:
                counts.index_add_(0, last, torch.ones_like(last, dtype=row.dtype))
            row -= params.presence_penalty * (counts > 0) + params.frequency_penalty * counts


def _too_short(share: ScheduledSequence) -> bool:
    return share.stop - share.sequence.num_prompt_tokens < share.sequence.request.params.min_tokens


def _seen(token_ids: list[int], last: torch.Tensor) -> torch.Tensor:
    """The different ones of these tokens, on the device; the last of them may be known there alone."""
    known = upload(sorted(set(token_ids) - {PENDING}), torch.int64, last.device)
    return torch.cat((known, last)) if token_ids[-1] == PENDING else known


def _choose(shares: Seq[ScheduledSequence], scores: torch.Tensor) -> torch.Tensor:
    """The tokens [num_shares] for penalised scores [num_shares, vocab_size]."""
    chosen = scores.argmax(dim=-1)
    drawn = [row for row, share in enumerate(shares) if share.sequence.request.params.temperature > 0]
    if drawn:
        rows = upload(drawn, torch.int64, scores.device)
        params = [shares[row].sequence.request.params for row in drawn]
        numbers = [uniform(each.seed, shares[row].stop) for each, row in zip(params, drawn, strict=True)]
        cumulative = candidates(scores.index_select(0, rows), params).cumsum(-1)
        total = cumulative[:, -1:].contiguous()
        points = upload(numbers, torch.float64, scores.device)[:, None] * total
        index = torch.searchsorted(cumulative, points, right=True)
        last = torch.searchsorted(cumulative, total)  # rounding may put a point at the very end
        chosen.index_copy_(0, rows, torch.minimum(index, last).clamp_(max=scores.shape[1] - 1).squeeze(1))
    return chosen


def candidates(scores: torch.Tensor, params: Seq[SamplingParams]) -> torch.Tensor:
    """The probabilities (float64, not normalised) of scores [num_rows, vocab_size]; 0: the token may not be drawn.

    As transformers does: each filter works on what the one before it left; of equals at a limit, top-k keeps all,
    top-p those with lower ids.
    """
    device, vocab_size = scores.device, scores.shape[1]

    def column(name: str) -> torch.Tensor:
        return upload([getattr(each, name) for each in params], torch.float64, device)[:, None]

    scores = scores.double()
    scores = (scores - scores.amax(-1, keepdim=True)) / column("temperature")  # at most 0, however small the divisor
    top_k = [each.top_k if 0 < each.top_k < vocab_size else vocab_size for each in params]
    cut = [row for row, count in enumerate(top_k) if count < vocab_size]
    if cut:
        rows = upload(cut, torch.int64, device)
        some = scores.index_select(0, rows)
        places = upload([top_k[row] - 1 for row in cut], torch.int64, device)[:, None]
        limits = some.topk(max(top_k[row] for row in cut)).values.gather(1, places)
        scores.index_copy_(0, rows, some.masked_fill(some < limits, -torch.inf))
    probabilities = torch.softmax(scores, dim=-1)
    if any(each.top_p < 1.0 for each in params):
        probabilities = _nucleus(probabilities, column("top_p"))
    if any(each.min_p > 0.0 for each in params):
        limit = column("min_p") * probabilities.amax(-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < limit, 0.0)
    return probabilities


def _nucleus(probabilities: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Keep the likeliest tokens that together reach top_p [num_rows, 1]
    (Holtzman et al., https://arxiv.org/abs/1904.09751); the others become 0.

    Tokens below (1 - top_p) / vocab_size cannot be among them, for together they have less than 1 - top_p. On a CPU
    leaving them out first makes the sort short; a GPU would have to be waited for.
    """
    columns = None
    some = probabilities
    if not probabilities.is_cuda:
        columns = (probabilities >= (1.0 - top_p) / probabilities.shape[1]).any(0).nonzero().squeeze(1)
        some = probabilities.index_select(1, columns)
    ordered, order = some.sort(dim=-1, descending=True, stable=True)
    kept = (ordered.cumsum(-1) - ordered < top_p) | (top_p >= 1.0)
    some = torch.zeros_like(some).scatter_(1, order, ordered.masked_fill(~kept, 0.0))
    return some if columns is None else torch.zeros_like(probabilities).index_copy_(1, columns, some)


def _take_logprobs(
    scores: torch.Tensor, chosen: torch.Tensor, special: list[int], shares: Seq[ScheduledSequence]
) -> list[_Logprobs]:
    """Natural-log probabilities of the rows that want them; scores and chosen have the `special` rows of a step."""
    wanted = [
        (index, row, params.logprobs)
        for index, row in enumerate(special)
        if (params := shares[row].sequence.request.params).logprobs is not None
    ]
    if not wanted:
        return []
    indices = upload([index for index, _, _ in wanted], torch.int64, scores.device)
    counts = [min(count or 0, scores.shape[1]) for _, _, count in wanted]
    logprobs = torch.log_softmax(scores.index_select(0, indices), dim=-1)
    own = logprobs.gather(1, chosen.index_select(0, indices)[:, None]).squeeze(1)
    values, token_ids = logprobs.topk(max(counts))
    return [_Logprobs([row for _, row, _ in wanted], counts, Download(own), Download(values), Download(token_ids))]


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
