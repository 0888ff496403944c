"""Where requests wait for a place on a worker.

While nobody waits, requests try their workers at once and side by side. One that every worker refused
joins the line, and whoever comes later queues as well, in the order of `fair_queue`: priority class, fair shares of
tenants, earliest deadline. Only the head of the line tries again, when a worker has news; when it gets its place the
next one tries. So no wake-up causes a stampede.

Nobody is overtaken for ever. A head that was refused again and again (it is large, say) stays the head of its class,
whoever comes; so does a request that had a place before and lost it with its worker.

Who cannot be served in time is told so as early as that is known: on arrival, before any work is done for it, and
while it waits (there only if it would be late even at twice the rate at which places are given out).

States of a place: FREE (may try) -> WAITING (in the line) -> TRYING (head, woken) -> WAITING or FREE;
-> LEFT at the end of the request, in whatever way.
"""

from __future__ import annotations

import asyncio
import enum
import random
import time
from collections.abc import Callable
from types import TracebackType

from router.config import RouterConfig
from router.errors import OverloadedError
from router.fair_queue import Claim, FairQueue
from router.tenant_config import TenantConfig
from router.wait_forecast import AdmissionRate, Arrivals, Usual, expected_wait_s, retry_s

EARMARK_AFTER = 3
"""Tries without success after which the head stays the head of its class."""
INSIST_EVERY_S = 1.0
"""How often such a one may ask workers for more than they share out."""
LOOK_EVERY_S = 0.25
"""How often it is looked at who of those that wait cannot be served in time, at most."""
CAUTION = 0.7
"""So much of the time that a request may wait the wait that is expected may take: it is no more than expected."""
DOUBT = 0.5
"""Of those that wait, who would be late even if the wait were so much shorter is refused."""
MAX_LOOKS = 64
"""Of so many at a time the wait is worked out."""
_NO_TENANT = TenantConfig()


class PlaceState(enum.Enum):
    """Where a request stands."""

    FREE = "free"
    WAITING = "waiting"
    TRYING = "trying"
    LEFT = "left"


class Line:
    """The requests that wait, in the order in which they may try. Its clock must be that of the event loop."""

    def __init__(self, config: RouterConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.refused: dict[str, int] = {}
        """Requests that were refused for what waits here, by reason (see RouterStats)."""
        self._config = config
        self._queue = FairQueue[Place](lambda tenant: self._tenant(tenant).weight)
        self._rate = AdmissionRate()
        self._usual = Usual()
        self._came = Arrivals()
        self._num_serving = 0
        """Requests that have a place."""
        self._arrivals = 0
        self._news = 0
        self._look_at = 0.0

    def __len__(self) -> int:
        return len(self._queue)

    def num_tokens(self) -> int:
        """Of all that wait: of their prompts, and of the answers that are expected."""
        return self._queue.num_tokens()

    def claim(self, *, priority: int, tenant: str, num_prompt_tokens: int, max_tokens: int, deadline: float) -> Claim:
        """The standing of a request that has just arrived."""
        serving = self._usual.serving
        admit_by, for_slo = serving.admit_by(self.clock(), deadline, max_tokens, self._config.ttft_slo_s)
        num_tokens = num_prompt_tokens + round(serving.expected_tokens(max_tokens))
        return Claim(priority, tenant, max(1, num_tokens), deadline, admit_by, for_slo)

    def arrive(self, claim: Claim) -> Place:
        """A place of one's own; use it as a context manager."""
        self._arrivals += 1
        self._came.add(claim.priority, claim.num_tokens, self.clock())
        return Place(self, claim, self._arrivals)

    def served(self, num_answer_tokens: int, first_token_s: float | None, rest_s: float | None) -> None:
        """A request has ended: the length of its answer, the time from its place to its first token, and from there."""
        self._usual.observe(num_answer_tokens, first_token_s, rest_s)

    def check_open(self, claim: Claim) -> None:
        """OverloadedError if no more may wait, or if such a request would wait too long; its size does not matter."""
        self.check_full(claim.tenant)
        if not len(self._queue):
            return
        now = self.clock()
        wait_s = self._wait_s(self._queue.tokens_before(claim), claim.priority, now)
        if wait_s is not None and wait_s > CAUTION * (claim.admit_by - now):
            raise self._too_late(claim, wait_s, now)

    def check_full(self, tenant: str) -> None:
        """OverloadedError if no more may wait."""
        num, limit, whose = len(self._queue), self._config.max_queued, ""
        own_limit = self._tenant(tenant).max_queued
        if num < limit and own_limit is not None and self._queue.num_of(tenant) >= own_limit:
            num, limit, whose = self._queue.num_of(tenant), own_limit, f" of tenant {tenant}"
        if num < limit:
            return
        wait_s = self._wait_s(self._queue.num_tokens(), None, self.clock())
        after_s = self._retry_s(None if wait_s is None else wait_s * 0.5)
        expected = "" if wait_s is None else f", which takes about {wait_s:.1f} s"
        raise self._refusal(
            "tenant_full" if whose else "full",
            f"{num} requests{whose} wait for a worker already{expected}, the limit is {limit}; "
            f"try again in {after_s:.1f} s",
            after_s,
        )

    def news(self) -> None:
        """A worker may have room: the head of the line may try."""
        self._news += 1
        if len(self._queue):
            self._look()
            self._wake_head()

    def head(self) -> Place | None:
        """Who may try next."""
        return self._queue.head()

    def news_since(self, seen: int) -> bool:
        """Whether there has been news since that count."""
        return self._news != seen

    @property
    def news_count(self) -> int:
        """News so far."""
        return self._news

    def insert(self, place: Place, *, first: bool) -> None:
        """Add to the line; `first`: before all of its class."""
        if not len(self._queue):
            self._rate.wait(self.clock(), is_waiting=True)
        self._queue.add(place, first=first)

    def keep_first(self, place: Place) -> None:
        """Nobody of its class may overtake it any more."""
        self._queue.mark_first(place)

    def serves(self, change: int) -> None:
        """So many more, or fewer, have a place."""
        self._num_serving += change

    def admitted(self, place: Place) -> None:
        """One of the line has its place: it counts as its tenant's."""
        self._queue.charge(place.claim)
        self._rate.admitted(place.claim.num_tokens, self.clock())

    def remove(self, place: Place) -> None:
        """Take out of the line; the next one may be the head now."""
        self._queue.remove(place)
        if len(self._queue):
            self._wake_head()
        else:
            self._rate.wait(self.clock(), is_waiting=False)

    def _wake_head(self) -> None:
        head, now = self._queue.head(), self.clock()
        if head is None or head.state is not PlaceState.WAITING:
            return
        if head.may_refuse and head.claim.admit_by < now:
            head.refuse(self._too_late(head.claim, 0.0, now, has_waited=True))
        else:
            head.wake()

    def _tenant(self, name: str) -> TenantConfig:
        return self._config.tenants.get(name, _NO_TENANT)

    def _wait_s(self, tokens_ahead: float, priority: int | None, now: float) -> float | None:
        """Until so many tokens have gone; `priority`: those of higher classes that come meanwhile go before, too."""
        above_per_s = 0.0 if priority is None else self._came.above_per_s(priority, now)
        rate, seen_s, serving = self._rate.per_s(now), self._rate.seen_s, self._usual.serving
        if rate is None:
            rate = serving.rate(self._num_serving, self._queue.num_tokens() / max(1, len(self._queue)))
            seen_s = max(seen_s, serving.whole_s())
        return expected_wait_s(tokens_ahead, rate, seen_s, above_per_s)

    def _look(self) -> None:
        """Refuse those that cannot be served in time; now and then, and the most urgent ones first."""
        now = self.clock()
        if now < self._look_at:
            return
        self._look_at = now + LOOK_EVERY_S
        far_s = self._wait_s(self._queue.num_tokens(), max(place.claim.priority for place in self._queue), now)
        if far_s is None:
            return
        urgent = [place for place in self._queue if place.may_refuse and place.claim.admit_by < now + DOUBT * far_s]
        for place in sorted(urgent, key=lambda place: place.claim.admit_by)[:MAX_LOOKS]:
            wait_s = self._wait_s(self._queue.tokens_ahead_of(place), place.claim.priority, now) or 0.0
            if place.state is PlaceState.WAITING and now + DOUBT * wait_s > place.claim.admit_by:
                place.refuse(self._too_late(place.claim, wait_s, now, has_waited=True))

    def _too_late(self, claim: Claim, wait_s: float, now: float, *, has_waited: bool = False) -> OverloadedError:
        after_s = self._retry_s(wait_s - CAUTION * (claim.admit_by - now))
        what, advice = "its deadline", "or allow more time with deadline_s"
        if claim.for_slo:
            what, advice = f"a first token within {self._config.ttft_slo_s:g} s (ttft_slo_s)", "or ask another router"
        left_s = max(0.0, claim.admit_by - now)
        told = f"{len(self._queue)} requests wait for a worker, this one for about {wait_s:.1f} s; {what} leaves it "
        text = f"{told}{left_s:.1f} s to wait; try again in {after_s:.1f} s, {advice}"
        reason = "waited" if has_waited else "ttft_slo" if claim.for_slo else "deadline"
        return self._refusal(reason, text, after_s)

    def _retry_s(self, drained_in_s: float | None) -> float:
        return retry_s(drained_in_s, self._config.retry_after_s, random.random())

    def _refusal(self, reason: str, message: str, retry_after_s: float) -> OverloadedError:
        self.refused[reason] = self.refused.get(reason, 0) + 1
        return OverloadedError(message, retry_after_s=retry_after_s)


class Place:
    """One request's standing in the line."""

    def __init__(self, line: Line, claim: Claim, number: int) -> None:
        self.claim = claim
        self.number = number
        """Of its arrival."""
        self.state = PlaceState.FREE
        self.may_refuse = True
        """Whether it may be sent away: one whose client has tokens may not, nor one that had a place and lost it."""
        self._line = line
        self._seen = 0
        self._had_place = False
        self._num_refusals = 0
        self._insist_at = line.clock() + INSIST_EVERY_S
        self._woken: asyncio.Future[OverloadedError | None] | None = None

    def __enter__(self) -> Place:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave_line()
        self.state = PlaceState.LEFT
        if self._had_place:
            self._line.serves(-1)

    @property
    def is_earmarked(self) -> bool:
        """Whether it was refused so often that nobody of its class may overtake it."""
        return self._num_refusals >= EARMARK_AFTER

    def may_insist(self) -> bool:
        """Whether it may now ask workers beyond their credits; an earmarked one now and then, or it could wait for
        ever for a share that is large enough."""
        now = self._line.clock()
        if not self.is_earmarked or now < self._insist_at:
            return False
        self._insist_at = now + INSIST_EVERY_S
        return True

    async def turn(self, *, may_refuse: bool) -> None:
        """Return when this request may try: at once, unless others wait ahead of it."""
        if self.state is PlaceState.FREE and len(self._line):
            self._enter_line(may_refuse)
            if self._line.head() is self:
                self.state = PlaceState.TRYING
            else:
                await self._sleep()
        self._seen = self._line.news_count

    async def wait(self, *, may_refuse: bool) -> None:
        """Every worker refused: wait for news, bounded by the request's scope.

        OverloadedError if the line is full, or if it is to be too late, and `may_refuse`.
        """
        if self.state is PlaceState.FREE:
            self._enter_line(may_refuse)
        self._num_refusals += 1
        if self._num_refusals == EARMARK_AFTER:
            self._line.keep_first(self)
        if self._line.head() is self and self._line.news_since(self._seen):
            self.state = PlaceState.TRYING
            return
        await self._sleep()

    def admitted(self) -> None:
        """A worker took the request: let the next one try."""
        if not self._had_place:
            self._line.serves(1)
            if self.state is not PlaceState.FREE:
                self._line.admitted(self)
        self._had_place = True
        self._leave_line()

    def wake(self) -> None:
        """Called by the line: this place is its head and there is news."""
        self.state = PlaceState.TRYING
        self._answer(None)

    def refuse(self, error: OverloadedError) -> None:
        """Called by the line: it is not worth waiting any longer."""
        self._answer(error)

    async def _sleep(self) -> None:
        self.state = PlaceState.WAITING
        self._woken = asyncio.get_running_loop().create_future()
        if (refusal := await self._woken) is not None:
            raise refusal

    def _answer(self, error: OverloadedError | None) -> None:
        if self._woken is not None and not self._woken.done():
            self._woken.set_result(error)

    def _enter_line(self, may_refuse: bool) -> None:
        self.may_refuse = may_refuse and not self._had_place
        if self.may_refuse:
            self._line.check_full(self.claim.tenant)
        self._line.insert(self, first=self._had_place)
        self.state = PlaceState.WAITING

    def _leave_line(self) -> None:
        if self.state in (PlaceState.WAITING, PlaceState.TRYING):
            self.state = PlaceState.FREE
            self._line.remove(self)
