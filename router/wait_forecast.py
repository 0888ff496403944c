"""How long a request would wait, whether that is too long, and when to come back. Pure arithmetic over what was seen.

expected wait = tokens that go before it / (tokens a second that are admitted - those of higher classes that arrive)

What is admitted was seen of late, while somebody waited; or, before that, is what runs over the time that it takes.

What is little known is taken for better than it looks, so that nobody is sent away for a slow start.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

MEMORY_S = 10.0
"""Seconds of waiting after which an admission counts 1/e."""
ARRIVALS_MEMORY_S = 3.0
"""The same of what arrives, which changes faster than what can be served."""
MIN_SEEN_S = 1.0
"""Seconds of waiting before which no rate is known."""
MIN_ADMISSIONS = 3.0
"""Admissions of late before which no rate is known."""
MAX_AHEAD = 20.0
"""Nothing is said of what lies further ahead than so many times the time that was watched."""
USUAL_ANSWER_TOKENS = 256.0
"""What an answer is expected to have before there was one."""
LEAST_LEFT = 0.02
"""However much comes of higher classes, so much of the rate is taken to be left."""
LEAST_SHARE = 0.1
"""So much of the time that a request has it may wait, however long it is expected to take."""
MAX_RETRY_S = 60.0
"""Nobody is told to stay away longer."""
JITTER = 0.25
"""By how much a retry time is lengthened at most, as a share: those refused together do not come back together."""


class AdmissionRate:
    """Tokens a second that get a place while somebody waits for one. `now` is on any clock that only grows."""

    def __init__(self) -> None:
        self._tokens = 0.0
        self._num = 0.0
        self._waited_s = 0.0
        self._seen_s = 0.0
        """Of waiting, ever."""
        self._at: float | None = None
        """Up to when it is counted, while somebody waits."""

    def wait(self, now: float, *, is_waiting: bool) -> None:
        """Somebody waits, or nobody, from now on."""
        self._count(now)
        self._at = now if is_waiting else None

    def admitted(self, num_tokens: int, now: float) -> None:
        """One that waited has its place."""
        self._count(now)
        self._tokens += num_tokens
        self._num += 1

    def per_s(self, now: float) -> float | None:
        """The rate, larger by the standard error of so many admissions; None while it is not known."""
        self._count(now)
        if self._seen_s < MIN_SEEN_S or self._num < MIN_ADMISSIONS:
            return None
        return self._tokens / self._waited_s * (1 + 1 / math.sqrt(self._num))

    @property
    def seen_s(self) -> float:
        """How long it was watched."""
        return self._seen_s

    def _count(self, now: float) -> None:
        if self._at is not None:
            passed_s = max(0.0, now - self._at)
            kept = math.exp(-passed_s / MEMORY_S)
            self._tokens *= kept
            self._num *= kept
            self._waited_s = self._waited_s * kept + MEMORY_S * (1 - kept)
            self._seen_s += passed_s
            self._at = now


class Arrivals:
    """Tokens a second that came of late, by priority class. `now` is on any clock that only grows."""

    def __init__(self) -> None:
        self._tokens: dict[int, float] = {}
        self._at = 0.0

    def add(self, priority: int, num_tokens: int, now: float) -> None:
        """A request came that was not refused."""
        self._age(now)
        self._tokens[priority] = self._tokens.get(priority, 0.0) + num_tokens

    def above_per_s(self, priority: int, now: float) -> float:
        """Those of higher classes."""
        self._age(now)
        return sum(tokens for other, tokens in self._tokens.items() if other < priority) / ARRIVALS_MEMORY_S

    def _age(self, now: float) -> None:
        kept = math.exp(-max(0.0, now - self._at) / ARRIVALS_MEMORY_S)
        self._at = now
        self._tokens = {other: tokens * kept for other, tokens in self._tokens.items() if tokens * kept > 1e-3}


@dataclass(frozen=True, slots=True)
class Serving:
    """How long requests take once they have a place, as of late."""

    first_token_s: float = 0.0
    """From the place to the first token."""
    token_s: float = 0.0
    """From one token to the next."""
    answer_tokens: float = USUAL_ANSWER_TOKENS
    num_seen: int = 0
    """Answers that this was learnt from, if they were few."""

    def whole_s(self, max_tokens: float = math.inf) -> float:
        """From the place to the end of an answer that may have so many tokens."""
        return self.first_token_s + self.token_s * min(max_tokens, self.answer_tokens)

    def rate(self, num_serving: int, tokens_each: float) -> float | None:
        """Tokens a second that get a place where so many requests are served at a time; None while it is not known."""
        whole_s = self.whole_s()
        if self.num_seen < MIN_ADMISSIONS or not num_serving or not whole_s:
            return None
        return num_serving * tokens_each / whole_s * (1 + 1 / math.sqrt(self.num_seen))

    def expected_tokens(self, max_tokens: int) -> float:
        """Of an answer that may have so many."""
        return min(max_tokens, self.answer_tokens)

    def admit_by(self, now: float, deadline: float, max_tokens: int, slo_s: float | None) -> tuple[float, bool]:
        """When a request that comes now must have its place to be served in time; and whether that is for the SLO.

        However little time it has, a part of it may be spent waiting: its answer may turn out shorter.
        """
        for_deadline = max(deadline - self.whole_s(max_tokens), now + LEAST_SHARE * (deadline - now))
        if slo_s is None or now + slo_s - self.first_token_s >= for_deadline:
            return for_deadline, False
        return max(now + slo_s - self.first_token_s, now + LEAST_SHARE * slo_s), True


class Usual:
    """What serving took of late: each answer counts a twentieth, the first ones alike."""

    def __init__(self) -> None:
        self._means = {"first_token_s": _Mean(), "token_s": _Mean(), "answer_tokens": _Mean()}
        self.serving = Serving()

    def observe(self, num_tokens: int, first_token_s: float | None, rest_s: float | None) -> None:
        """An answer is over: its tokens, the time to the first of them, and from that to the last."""
        means = self._means
        means["answer_tokens"].observe(num_tokens)
        if first_token_s is not None:
            means["first_token_s"].observe(first_token_s)
        if rest_s is not None and num_tokens > 1:
            means["token_s"].observe(rest_s / (num_tokens - 1))
        num_seen = means["answer_tokens"].num
        self.serving = Serving(num_seen=num_seen, **{name: mean.value for name, mean in means.items() if mean.num})


@dataclass(slots=True)
class _Mean:
    value: float = 0.0
    num: int = 0

    def observe(self, value: float) -> None:
        self.num = min(self.num + 1, 20)
        self.value += (value - self.value) / self.num


def expected_wait_s(
    tokens_ahead: float, tokens_per_s: float | None, seen_s: float, above_per_s: float = 0.0
) -> float | None:
    """Until so many tokens have got their places, by a rate that was watched for so long; None: it is not known.

    `above_per_s`: tokens a second that come later and go before nevertheless.
    """
    if not tokens_per_s:
        return None
    left_per_s = max(tokens_per_s - above_per_s, LEAST_LEFT * tokens_per_s)
    return min(tokens_ahead / left_per_s, MAX_AHEAD * seen_s)


def retry_s(drained_in_s: float | None, least_s: float, chance: float) -> float:
    """When one that is refused should come again: when the queue has drained enough, and a little later.

    `chance` is a random number from 0 to 1.
    """
    wanted_s = least_s if drained_in_s is None else max(least_s, min(drained_in_s, MAX_RETRY_S))
    return wanted_s * (1 + JITTER * chance)
