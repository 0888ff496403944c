"""A worker's front process: gRPC for routers, the registry, and the link to the engine process.

    STARTING --engine linked, registered--> SERVING --drain--> DRAINING --nothing left, or time up--> STOPPED
        ^---------engine gone (new epoch)------'
    SERVING --the engine process is about to end--> DRAINING --engine gone (new epoch)--> STARTING

It holds no model and no torch; it comes back fast, and the engine's model outlives it.

Its role may change while it serves (`set_role`): the engine, the registry and every router are told, and what runs
stays. A worker that leaves, or leaves the decode pool, gives back after `move_after_s` what still generates; that goes
on at other workers. As long as the registry names no other that decodes and stays, nothing is given back.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import math
import time
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import grpc

from cluster.key_check import WorkerKeyCheck
from decode_pool.service import DecodeService
from engine.ipc import EngineGoneError
from engine.link import EngineLink, LinkState
from prefill_pool.service import PrefillService
from protos import worker_pb2 as pb
from protos import worker_pb2_grpc
from protos.auth import worker_key
from router.errors import StaleEpochError, StoreUnavailableError
from router.store import FleetStore, Role, WorkerRecord

log = logging.getLogger(__name__)

LEASE_TTL_S = 10.0
LEASE_PERIOD_S = 3.0
STOP_GRACE_S = 1.0
NOTICE_S = 0.2
"""A drain takes at least so long: what routers have sent meanwhile is refused by word, and not by a lost connection."""
HAND_BACK_EVERY_S = 1.0
"""How often what generates all the same, as it was adopted late, is given back."""
TELL_TIMEOUT_S = 5.0
"""Bound of a word to the engine that nobody else bounds."""


class FrontState(enum.Enum):
    """What a front does with new work."""

    STARTING = "STARTING"
    SERVING = "READY"
    DRAINING = "DRAINING"
    STOPPED = "STOPPED"


@dataclass(frozen=True, kw_only=True, slots=True)
class FrontOptions:
    """What a front needs to know."""

    worker_id: str
    pool: str
    role: Role
    """The one that it was made with; both: for good."""
    host: str
    socket_path: str
    secret: bytes
    metrics_address: str = ""
    prompt_shares: Mapping[str, float] = field(default_factory=dict)
    """What prompts get at most of a step that also generates, by role; a role that is not named changes nothing."""
    move_after_s: float = 10.0
    """How long requests may go on generating at a worker that has left the decode pool."""
    move_at_end_after_s: float = 10.0
    """The same where the worker's engine process is about to end."""


class WorkerFront:
    """Serves one worker's two gRPC services."""

    def __init__(self, options: FrontOptions, store: FleetStore) -> None:
        self.address = ""
        self.link = EngineLink(
            socket_path=options.socket_path,
            worker_id=options.worker_id,
            next_epoch=self._next_epoch,
            on_step=self._on_step,
            role=self._role_order,
        )
        self.link.on_started = self._started
        self.role: Role = options.role
        """Whose work it does."""
        self._ordered: Role = options.role
        """What the engine was told last."""
        self._state = FrontState.STARTING
        self._options = options
        self._store = store
        self._started_at = time.time()
        self._prefill = PrefillService(self.link)
        self._decode = DecodeService(self.link)
        self._server: grpc.aio.Server | None = None
        self._lease_task: asyncio.Task[None] | None = None
        self._moving: asyncio.Task[None] | None = None
        """Gives back what generates, a while after it has left the decode pool."""
        self._engine_leaves = False
        """The engine process is about to end, and this epoch with it."""
        self._leaving: asyncio.Task[dict[str, Any]] | None = None

    @property
    def state(self) -> FrontState:
        """What it does with new work at this moment; without its engine it is STARTING again."""
        if self._state is FrontState.SERVING and self.link.state is not LinkState.STARTED:
            return FrontState.STARTING
        if self._state is FrontState.SERVING and self._engine_leaves:
            return FrontState.DRAINING
        return self._state

    async def start(self) -> str:
        """Listen, link to the engine, register when it is up; returns the bound address."""
        self._server = grpc.aio.server(
            interceptors=[WorkerKeyCheck(worker_key(self._options.secret))],
            options=[
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", 64 << 20),
                ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
            ],
        )
        worker_pb2_grpc.add_PrefillWorkerServicer_to_server(self._prefill, self._server)  # type: ignore[no-untyped-call]
        worker_pb2_grpc.add_DecodeWorkerServicer_to_server(self._decode, self._server)  # type: ignore[no-untyped-call]
        port = self._server.add_insecure_port(f"{self._options.host}:0")
        await self._server.start()
        self.address = f"{self._options.host}:{port}"
        self.link.open()
        self._lease_task = asyncio.create_task(self._hold_lease(), name="lease")
        return self.address

    async def ready(self, timeout_s: float) -> None:
        """Wait until the engine is linked; TimeoutError after timeout_s."""
        await asyncio.wait_for(self.link.started.wait(), timeout_s)

    async def set_role(self, role: str, timeout_s: float, move_after_s: float | None = None) -> None:
        """Change whose work it does, now and in its lives to come; idempotent.

        Raises ValueError for a role that cannot be, StoreUnavailableError where it cannot be kept, and then nothing
        has changed; EngineGoneError where the engine does not take it within the time, which then hears of it later.
        `move_after_s`: as in FrontOptions, instead of it.
        """
        known = _checked(role, self._options)
        if self._state in (FrontState.DRAINING, FrontState.STOPPED):
            raise ValueError(f"worker {self._options.worker_id} is {self._state.value}: its role changes no more")
        await self._store.set_role(self._options.worker_id, known)
        old, self.role = self.role, known
        if old != known:
            log.info("the role changes", extra={"worker": self._options.worker_id, "old": old, "new": known})
            self._move_later(old, self._options.move_after_s if move_after_s is None else move_after_s)
        if self.link.state is LinkState.STARTED:
            await self._tell_engine(timeout_s)
            await self._register()

    async def leave(self, timeout_s: float, move_after_s: float) -> dict[str, Any]:
        """Drain, then stop; its status at the end of the drain, and in `finished` whether nothing was left.

        Whoever asks again, meanwhile or afterwards, waits for the same end and gets the same answer.
        """
        if self._leaving is None:
            self._leaving = asyncio.create_task(self._leave(timeout_s, move_after_s), name="leave")
        return await asyncio.shield(self._leaving)

    async def drain(self, timeout_s: float, move_after_s: float = math.inf) -> bool:
        """Take nothing new, wait for what runs; False if time was up first.

        After `move_after_s` routers get back what still generates here, if another worker can go on with it.
        """
        self._state = FrontState.DRAINING
        loop = asyncio.get_running_loop()
        hand_back_at = loop.time() + move_after_s
        try:
            async with asyncio.timeout(timeout_s):
                await self._set_leaving()
                await asyncio.sleep(NOTICE_S)
                while not await self._is_done():
                    if not await self._is_idle_within(hand_back_at - loop.time()):
                        await self._hand_back("its worker leaves")
                        hand_back_at = loop.time() + HAND_BACK_EVERY_S
        except TimeoutError:
            log.warning("drain: %d requests are left after %.1f s", num_open(self.link.stats), timeout_s)
            return False
        return True

    async def stop(self) -> None:
        """Leave the registry, end every stream, let go of the engine."""
        self._state = FrontState.STOPPED
        for task in (self._lease_task, self._moving):
            if task is not None:
                task.cancel()
        with contextlib.suppress(StoreUnavailableError):
            await self._store.deregister(self._options.worker_id, self.link.epoch)
        if self._server is not None:
            await self._server.stop(STOP_GRACE_S)
        await self.link.close()

    def status(self) -> dict[str, Any]:
        """For people and metrics: state, identity, stats."""
        return {
            "worker_id": self._options.worker_id,
            "pool": self._pool,
            "role": self.role,
            "epoch": self.link.epoch,
            "state": self.state.value,
            "address": self.address,
            "metrics_address": self._options.metrics_address,
            "paced": self.link.description.paced,
            "stats": {field.name: getattr(self.link.stats, field.name) for field in pb.WorkerStats.DESCRIPTOR.fields},
        }

    @property
    def _pool(self) -> str:
        """The pool whose work it does."""
        return self._options.pool if self.role == self._options.role else self.role

    def _on_step(self, step: pb.StepEvent) -> None:
        self.link.stats = step.stats
        self._decode.on_step(step)
        if step.draining and not self._engine_leaves:
            log.info("the engine process is about to end: draining", extra={"worker": self._options.worker_id})
            self._engine_leaves = True
            self._set_moving(self._move_at_end())

    async def _set_leaving(self) -> None:
        """Tell every router, and the registry."""
        self._set_draining(True)
        if self.link.state is LinkState.STARTED:
            with contextlib.suppress(StoreUnavailableError, StaleEpochError):
                await self._register()

    def _set_draining(self, draining: bool) -> None:
        self._prefill.draining = self._decode.draining = draining
        self._decode.tell_all()

    async def _leave(self, timeout_s: float, move_after_s: float) -> dict[str, Any]:
        finished = await self.drain(timeout_s, move_after_s)
        answer = {"finished": finished, **self.status()}
        await self.stop()
        return answer

    async def _is_done(self) -> bool:
        """Whether nothing is left of all that was ever asked for; the engine tells between two steps."""
        with contextlib.suppress(EngineGoneError):  # then nothing runs any more
            await self.link.catch_up(TELL_TIMEOUT_S)
        return num_open(self.link.stats) == 0

    async def _is_idle_within(self, wait_s: float) -> bool:
        """Whether nothing seems to be left, now or before the time is over."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(None if math.isinf(wait_s) else wait_s), self.link.news:
                await self.link.news.wait_for(lambda: num_open(self.link.stats) == 0)
        return num_open(self.link.stats) == 0

    async def _next_epoch(self) -> int:
        """A new epoch, in the role that it was given last."""
        kept = await self._store.role_of(self._options.worker_id)
        if kept is not None and self._options.role != "both":
            self.role = kept
        if self._engine_leaves:
            self._engine_leaves = False
            self._set_moving(None)
        if self._state in (FrontState.STARTING, FrontState.SERVING):
            self._set_draining(False)
        return await self._store.next_epoch(self._options.worker_id)

    def _role_order(self) -> pb.SetRole:
        self._ordered = self.role
        return pb.SetRole(role=self.role, prompt_share=self._options.prompt_shares.get(self.role))

    async def _started(self) -> None:
        if self._ordered != self.role:  # it changed while the engine was being told
            await self._tell_engine(TELL_TIMEOUT_S)
        await self._register()

    async def _tell_engine(self, timeout_s: float) -> None:
        """Have the engine take the role, then every router."""
        description = self.link.description
        reply = await self.link.call(pb.EngineCommand(set_role=self._role_order()), timeout_s)
        if reply.WhichOneof("result") == "error":
            raise EngineGoneError(f"the engine did not take the role {self.role}: {reply.error.message}")
        description.role = self.role
        self._decode.tell_all()

    def _move_later(self, old: Role, move_after_s: float) -> None:
        """See to it that what generates here does not do so for long, where that is no more this worker's affair."""
        leaves_decode = self.role == "prefill" and old != "prefill"
        self._set_moving(self._move(move_after_s, "its worker computes prompts now") if leaves_decode else None)

    def _set_moving(self, moving: Coroutine[Any, Any, None] | None) -> None:
        """Have this task instead of the one before."""
        if self._moving is not None:
            self._moving.cancel()
        self._moving = None if moving is None else asyncio.create_task(moving, name="move")

    async def _move(self, move_after_s: float, reason: str, *, again: bool = False) -> None:
        await asyncio.sleep(move_after_s)
        while True:
            if await self._hand_back(reason) and not again:
                return
            await asyncio.sleep(HAND_BACK_EVERY_S)

    async def _move_at_end(self) -> None:
        """Until there is another epoch."""
        await self._set_leaving()
        await self._move(self._options.move_at_end_after_s, "its engine process is about to end", again=True)

    async def _hand_back(self, reason: str) -> bool:
        """Have the engine give back what generates; False where nobody is known who would go on with it."""
        if not await self._another_decodes():
            return False
        with contextlib.suppress(EngineGoneError):  # without an engine nothing generates
            await self.link.call(pb.EngineCommand(hand_back=pb.HandBack(reason=reason)), TELL_TIMEOUT_S)
        return True

    async def _another_decodes(self) -> bool:
        try:
            records = await self._store.workers()
        except StoreUnavailableError:
            return False
        own = self._options.worker_id
        return any(record.worker_id != own and record.role != "prefill" and not record.leaving for record in records)

    async def _register(self) -> None:
        options = self._options
        record = WorkerRecord(
            worker_id=options.worker_id,
            epoch=self.link.epoch,
            role=self.role,
            address=self.address,
            metrics_address=options.metrics_address,
            pool=self._pool,
            started_at=self._started_at,
            leaving=self._engine_leaves or self._state is FrontState.DRAINING,
        )
        await self._store.register(record, LEASE_TTL_S)
        if self._state is FrontState.STARTING:
            self._state = FrontState.SERVING

    async def _hold_lease(self) -> None:
        """Renew the record; on word of a newer epoch, start over with one newer still."""
        while True:
            await asyncio.sleep(LEASE_PERIOD_S)
            if self.link.state is not LinkState.STARTED or self._state is FrontState.STOPPED:
                continue
            try:
                await self._register()
            except StoreUnavailableError as error:
                log.warning("the lease was not renewed: %s", error)
            except StaleEpochError as error:
                log.warning("%s; starting a new epoch", error)
                await self.link.restart()


def _checked(role: str, options: FrontOptions) -> Role:
    """A role that this worker can have; ValueError if it is none."""
    found: Role | None = next((known for known in get_args(Role) if known == role), None)
    if found is None:
        raise ValueError(f"the role of worker {options.worker_id} must be one of {get_args(Role)}, got {role!r}")
    if options.role == "both" != found:
        raise ValueError(f"worker {options.worker_id} has both roles for good, for its cluster is colocated")
    return found


def num_open(stats: pb.WorkerStats) -> int:
    """Requests of any phase that a worker still has."""
    return stats.num_running + stats.num_waiting + stats.num_reserved + stats.open_sends
