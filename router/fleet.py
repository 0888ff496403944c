"""The workers this router knows, and what it knows of each.

The store says who exists; the Attach stream says who is alive. A worker that the store no longer lists
stays as long as its stream does, so that a lost or restarted store costs nothing; one whose stream is
down and that the store does not list is forgotten. A greater epoch replaces the older life at once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from router.background import Background
from router.config import RouterConfig
from router.errors import StoreUnavailableError
from router.info import WorkerInfo, WorkerState
from router.prefix_index import PrefixIndex
from router.roster import Roster
from router.store import FleetStore, WorkerRecord
from router.wakeup import Signal
from router.workers import WorkerLink

logger = logging.getLogger(__name__)


class Fleet:
    """Keeps one link per worker, following the store."""

    def __init__(
        self,
        store: FleetStore,
        config: RouterConfig,
        *,
        router_id: str,
        worker_key: str,
        on_room: Callable[[], None],
    ) -> None:
        self.changed = Signal()
        """A worker came, went or changed its state."""
        self.prefixes = PrefixIndex()
        """Who holds the KV of what."""
        self.changed_at = 0.0
        """When that last happened, on the loop's clock."""
        self._store = store
        self._config = config
        self._router_id = router_id
        self._worker_key = worker_key
        self._on_room = on_room
        self._links: dict[str, WorkerLink] = {}
        self._roster = Roster([])
        self._roster_version = -1
        self._background = Background()

    async def start(self) -> None:
        """Begin to follow the store."""
        self._background.spawn(self._follow_store(), "fleet: follow the store")

    async def stop(self) -> None:
        """Leave the store and all workers; they abort what they still do for this router."""
        await self._background.cancel()
        await asyncio.gather(*(link.stop() for link in self._links.values()))
        self._links.clear()

    def workers(self) -> list[WorkerInfo]:
        """What is known of every worker."""
        return [link.info for link in self._links.values()]

    @property
    def roster(self) -> Roster:
        """Those of them that are READY."""
        if self._roster_version != self.changed.version:
            self._roster, self._roster_version = Roster(self.workers()), self.changed.version
        return self._roster

    def link(self, info: WorkerInfo) -> WorkerLink:
        """The connection to a worker that `workers` gave in this same moment."""
        return self._links[info.worker_id]

    def serves(self, *, split: bool) -> bool:
        """Whether every role that is needed has a worker in READY; any role, where one may serve alone."""
        ready = [info for info in self.workers() if info.state is WorkerState.READY]
        if split and self._config.serve_alone:
            return bool(ready)
        return any(info.can_decode for info in ready) and (not split or any(info.can_prefill for info in ready))

    def pool_tokens(self, *, split: bool) -> int | None:
        """Most tokens of one sequence that the largest workers can hold; None while a role has no worker."""
        ready = [info for info in self.workers() if info.state is WorkerState.READY]
        decode = max((info.max_tokens for info in ready if info.can_decode), default=None)
        prefill = max((info.max_tokens for info in ready if info.can_prefill), default=None)
        if split and self._config.serve_alone and (decode is None or prefill is None):
            return decode or prefill
        if decode is None or not split:
            return decode
        return None if prefill is None else min(decode, prefill)

    @property
    def is_paced(self) -> bool:
        """Whether any worker rehearses other hardware."""
        return any(info.description.paced for info in self.workers())

    async def _follow_store(self) -> None:
        async for _ in self._store.watch():
            try:
                self._adopt(await self._store.workers())
            except StoreUnavailableError as error:
                logger.warning("the fleet keeps what it knows: %s", error)

    def _adopt(self, records: list[WorkerRecord]) -> None:
        listed = {record.worker_id: record for record in records}
        for worker_id, record in listed.items():
            known = self._links.get(worker_id)
            if known is None or record.epoch > known.info.epoch:
                self._replace(known, record)
        for worker_id, link in list(self._links.items()):
            if worker_id not in listed and not link.info.connected:
                del self._links[worker_id]
                self._retire(link)

    def _replace(self, old: WorkerLink | None, record: WorkerRecord) -> None:
        if old is not None:
            self._retire(old)
        link = WorkerLink(
            record,
            self._config,
            router_id=self._router_id,
            worker_key=self._worker_key,
            on_change=self._worker_changed,
            on_room=self._on_room,
            prefixes=self.prefixes,
        )
        self._links[record.worker_id] = link
        link.start()

    def _retire(self, link: WorkerLink) -> None:
        self._background.spawn(link.stop(), f"fleet: leave {link.info.label}")
        self._worker_changed()

    def _worker_changed(self) -> None:
        self.changed_at = asyncio.get_running_loop().time()
        self.changed.notify()
        self._on_room()
