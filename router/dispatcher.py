"""One request's way through the workers, from its place in the line to its last token.

    place in the line -> choose a route -> reserve (decode first) -> prefill -> follow the tokens

A worker without room sends it to another worker or back into the line; a failed attempt sends it back to
choosing, with the tokens the client already has. Whatever ends it, each attempt is closed on both sides.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace

from router.admission import Line, Place
from router.attempt import Attempt, AttemptContext, Emit
from router.background import Background
from router.chooser import Chooser
from router.config import RouterConfig
from router.errors import (
    AttemptFailedError,
    HandedBackError,
    PreemptedError,
    SlowClientError,
    UnavailableError,
    WorkerFullError,
)
from router.fleet import Fleet
from router.info import WorkerInfo, WorkerLife, WorkerState
from router.job import Adoption, Ending, Job
from router.policies import Demand, Route
from router.scope import Scope
from router.stats import Routed
from router.timeline import Moment

logger = logging.getLogger(__name__)


class Dispatcher:
    """Serves jobs on the fleet's workers."""

    def __init__(self, fleet: Fleet, line: Line, config: RouterConfig, *, router_id: str, split: bool) -> None:
        self.aborts = Background()
        """Aborts on their way to workers."""
        self._fleet = fleet
        self._line = line
        self._config = config
        self._router_id = router_id
        self._split = split
        self._chooser = Chooser(fleet, config, split=split)
        self.routed = Routed()
        self.num_given_back = 0
        """Attempts that ended because a decode worker needed the blocks for others."""
        self.num_moved = 0
        """Attempts that ended because their decode worker leaves, or has changed its role."""

    async def run(self, job: Job, emit: Emit, scope: Scope) -> Ending:
        """Serve a job to its end; RouterError if that is not to be. The scope ends every wait in here."""
        if job.adoption is not None and (ending := await self._go_on(job, job.adoption, emit, scope)) is not None:
            return ending
        full: frozenset[WorkerLife] = frozenset()
        arrived = asyncio.get_running_loop().time()
        claim = self._line.claim(
            priority=job.priority,
            tenant=job.tenant,
            num_prompt_tokens=len(job.prompt_token_ids),
            max_tokens=job.params.max_tokens,
            deadline=job.deadline,
        )
        with self._line.arrive(claim) as place:
            while True:
                job.awaited = "a place in the line"
                await place.turn(may_refuse=not job.emitted)
                since = max(arrived, job.attempts.ended_at)
                route = await self._route(job, full, since, insists=place.may_insist())
                if route is None:
                    full = frozenset()
                    job.awaited = "room on a worker, all are full"
                    await place.wait(may_refuse=not job.emitted)
                    continue
                attempt = self._attempt(job, route, scope)
                try:
                    return await self._try(job, attempt, route, place, emit)
                except WorkerFullError as error:
                    full |= {error.worker} if error.worker is not None else attempt.took_part()
                except (PreemptedError, HandedBackError) as error:
                    self._given_back(job, error)
                except AttemptFailedError as error:
                    self._failed(job, attempt, error)
                finally:
                    attempt.close("the request ended at the router")

    async def _go_on(self, job: Job, adoption: Adoption, emit: Emit, scope: Scope) -> Ending | None:
        """Follow what another router left at a decode worker; None if it is lost, and the answer begins anew."""
        info = await self._wait_for(adoption)
        if info is None:
            return None
        route = Route(info, None, "it runs there already")
        attempt = self._attempt(job, route, scope, adoption.attempt)
        try:
            return await attempt.follow(emit) if await attempt.adopt() else None
        except WorkerFullError:
            return None
        except (PreemptedError, HandedBackError) as error:
            self._given_back(job, error)
            return None
        except AttemptFailedError as error:
            self._failed(job, attempt, error)
            return None
        finally:
            attempt.close("the request ended at the router")

    async def _wait_for(self, adoption: Adoption) -> WorkerInfo | None:
        """The worker, once it is connected (this router may have just begun); None if it does not come."""
        loop = asyncio.get_running_loop()
        until = loop.time() + self._config.no_worker_grace_s
        while True:
            seen = self._fleet.changed.version
            for info in self._fleet.workers():
                if (info.worker_id, info.epoch) == (adoption.worker_id, adoption.epoch) and info.connected:
                    return info
            left_s = until - loop.time()
            if left_s <= 0 or not await self._fleet.changed.wait(seen, timeout_s=left_s):
                return None

    async def _try(self, job: Job, attempt: Attempt, route: Route, place: Place, emit: Emit) -> Ending:
        self._chooser.took(route, attempt.num_tokens, asyncio.get_running_loop().time())
        try:
            await attempt.reserve()
        except BaseException:
            self._chooser.took_back(route, attempt.num_tokens)
            raise
        place.admitted()
        if job.on_reserved is not None:
            job.on_reserved(route.decode, attempt.number)
        self.routed.count(
            prompt_tokens=attempt.num_tokens,
            missing=route.missing_tokens,
            is_local=route.local_tokens > 0,
            spills=route.spills,
        )
        ending = await attempt.follow(emit)
        times = job.timeline
        first_token_s = times.between(Moment.RESERVED, Moment.FIRST_SENT)
        self._line.served(len(job.emitted), first_token_s, times.between(Moment.FIRST_SENT, Moment.LAST_TOKEN))
        self._line.news()
        return ending

    def _given_back(self, job: Job, error: PreemptedError | HandedBackError) -> None:
        """Nobody has failed: the request goes before its class, and on with the tokens that the client has."""
        job.attempts.given_back()
        if isinstance(error, PreemptedError):
            job.num_preemptions += 1
            self.num_given_back += 1
        else:
            self.num_moved += 1
        logger.info("given back: %s", error, extra={"request_id": job.request_id, "num_emitted": len(job.emitted)})

    def _failed(self, job: Job, attempt: Attempt, error: AttemptFailedError) -> None:
        logger.warning(
            "attempt failed: %s",
            error,
            extra={"request_id": job.request_id, "attempt": job.attempts.number, "num_emitted": len(job.emitted)},
        )
        job.attempts.failed(error, attempt.took_part())

    def _attempt(self, job: Job, route: Route, scope: Scope, number: int | None = None) -> Attempt:
        limit = self._config.max_stream_buffer
        too_slow = SlowClientError(f"the client lags more than {limit} tokens behind its stream; read faster")
        context = AttemptContext(self._router_id, limit, lambda: scope.interrupt(too_slow), self.aborts)
        logger.debug(
            "route chosen",
            extra={
                "request_id": job.request_id,
                "decode": route.decode.label,
                "prefill": route.prefill.label if route.prefill else "local",
                "reason": route.reason,
            },
        )
        prefill = self._fleet.link(route.prefill) if route.prefill is not None else None
        return Attempt(job, self._fleet.link(route.decode), prefill, route, context, number)

    async def _route(self, job: Job, full: frozenset[WorkerLife], since: float, *, insists: bool) -> Route | None:
        """A route; None if there are workers but all are full.

        UnavailableError if there are none, and neither since `since` (on the loop's clock) nor since the last
        change of the fleet less than the grace has passed.
        """
        loop = asyncio.get_running_loop()
        while True:
            seen = self._fleet.changed.version
            tokens = job.prompt_token_ids + job.emitted if job.emitted else job.prompt_token_ids
            prefix = self._chooser.find_prefix(tokens)
            demand = Demand(
                job.num_tokens,
                job.attempts.excluded,
                full,
                job.attempts.avoided,
                prefix,
                answer_tokens=job.params.max_tokens - len(job.emitted),
                insists=insists,
                may_prefill_locally=not job.num_preemptions,
            )
            if (route := self._chooser.choose(demand)) is not None:
                return route
            if self._chooser.choose(replace(demand, full=frozenset(), insists=True)) is not None:
                return None
            left_s = max(since, self._fleet.changed_at) + self._config.no_worker_grace_s - loop.time()
            if left_s <= 0:
                raise self._nobody()
            await self._fleet.changed.wait(seen, timeout_s=left_s)

    def _nobody(self) -> UnavailableError:
        workers = self._fleet.workers()
        ready = [info for info in workers if info.state is WorkerState.READY]
        known = (
            ", ".join(f"{info.label} ({info.role}) is {info.state.value}" for info in workers[:8]) or "none is known"
        )
        roles = ["decode"] if not self._split else ["prefill", "decode"]
        missing = [
            role
            for role in roles
            if not any(info.can_decode if role == "decode" else info.can_prefill for info in ready)
        ]
        what = (
            " and no ".join(f"{role} worker is ready" for role in missing)
            or "worker is left that can take this request"
        )
        return UnavailableError(
            f"no {what}, waited {self._config.no_worker_grace_s:g} s; workers: {known}",
            retry_after_s=self._config.retry_after_s,
        )
