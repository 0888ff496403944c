"""Introduces workers to each other, so that the first request between two finds their pair made.

Each prefill worker in READY is told once of each decode worker in READY that can use its KV. What it makes of
that is its own affair: nobody waits for a pair, and one that is not made ahead of time is made on first use. So
a Meet that fails is logged and not tried again; another life of either worker, or a role that one of them had
given up meanwhile, is another introduction.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

from protos import worker_pb2
from router.background import Background
from router.errors import InvalidArgumentError, WorkerError, WorkerLostError
from router.fleet import Fleet
from router.info import WorkerInfo, WorkerState
from router.policies import same_layout
from router.workers import WorkerLink

logger = logging.getLogger(__name__)

LOOK_AGAIN_S = 60.0
"""Bound of a wait for a change of the fleet."""
Meeting = tuple[str, str]
"""The lives of a prefill and a decode worker, each worker_id/epoch."""


class Introductions:
    """Follows a router's fleet; `follow` runs until it is cancelled."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._made: set[Meeting] = set()
        """Begun, however they ended; only of lives that the fleet still knows, in the roles that they have."""
        self._background = Background()

    async def follow(self) -> None:
        """Introduce whoever is READY, at every change of the fleet."""
        changed = self._fleet.changed
        try:
            while True:
                seen = changed.version
                self._introduce()
                await changed.wait(seen, timeout_s=LOOK_AGAIN_S)
        finally:
            await self._background.cancel()

    def _introduce(self) -> None:
        workers = self._fleet.workers()
        prefillers = {info.label for info in workers if info.can_prefill}
        decoders = {info.label for info in workers if info.can_decode}
        self._made = {(one, other) for one, other in self._made if one in prefillers and other in decoders}
        for prefill, decode in _couples([info for info in workers if info.state is WorkerState.READY]):
            meeting = (prefill.label, decode.label)
            if meeting not in self._made:
                self._made.add(meeting)
                self._background.spawn(_meet(self._fleet.link(prefill), decode), f"introduce {meeting}")


async def _meet(prefill: WorkerLink, decode: WorkerInfo) -> None:
    described = decode.description
    request = worker_pb2.MeetRequest(
        epoch=prefill.info.epoch,
        worker=described.identity,
        control_addresses=described.control_addresses,
        layout=described.layout,
    )
    try:
        await prefill.meet(request)
    except (WorkerError, InvalidArgumentError) as error:
        level = logging.DEBUG if isinstance(error, WorkerLostError) else logging.WARNING
        logger.log(level, "%s was not introduced to %s: %s", prefill.info.label, decode.label, error)


def _couples(ready: list[WorkerInfo]) -> Iterator[tuple[WorkerInfo, WorkerInfo]]:
    """Each worker that prefills with each other one that decodes, listens, and can use its KV."""
    for prefill in ready:
        for decode in ready:
            if (
                prefill is not decode
                and prefill.can_prefill
                and decode.can_decode
                and decode.description.control_addresses
                and same_layout(prefill, decode)
            ):
                yield prefill, decode
