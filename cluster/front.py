"""A worker's front process: gRPC for routers, the registry, and the link to the engine process.

    STARTING --engine linked, registered--> SERVING --drain--> DRAINING --nothing left, or time up--> STOPPED
        ^---------engine gone (new epoch)------'

It holds no model and no torch; it comes back fast, and the engine's model outlives it.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Literal

import grpc

from decode_pool.service import DecodeService
from engine.ipc import EngineGoneError
from engine.link import EngineLink, LinkState
from prefill_pool.service import PrefillService
from protos import worker_pb2 as pb
from protos import worker_pb2_grpc
from protos.auth import WORKER_METADATA_KEY, same_key, worker_key
from router.errors import StaleEpochError, StoreUnavailableError
from router.store import FleetStore, WorkerRecord

log = logging.getLogger(__name__)

LEASE_TTL_S = 10.0
LEASE_PERIOD_S = 3.0
STOP_GRACE_S = 1.0
STREAMS = ("/Attach", "/OpenReserve", "/OpenPrefill")
"""The methods that take a stream."""


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
    role: Literal["prefill", "decode", "both"]
    host: str
    socket_path: str
    secret: bytes
    metrics_address: str = ""


class WorkerFront:
    """Serves one worker's two gRPC services."""

    def __init__(self, options: FrontOptions, store: FleetStore) -> None:
        self.address = ""
        self.link = EngineLink(
            socket_path=options.socket_path,
            worker_id=options.worker_id,
            next_epoch=lambda: store.next_epoch(options.worker_id),
            on_step=self._on_step,
        )
        self.link.on_started = self._register
        self._state = FrontState.STARTING
        self._options = options
        self._store = store
        self._started_at = time.time()
        self._prefill = PrefillService(self.link)
        self._decode = DecodeService(self.link)
        self._server: grpc.aio.Server | None = None
        self._lease_task: asyncio.Task[None] | None = None

    @property
    def state(self) -> FrontState:
        """What it does with new work at this moment; without its engine it is STARTING again."""
        if self._state is FrontState.SERVING and self.link.state is not LinkState.STARTED:
            return FrontState.STARTING
        return self._state

    async def start(self) -> str:
        """Listen, link to the engine, register when it is up; returns the bound address."""
        self._server = grpc.aio.server(
            interceptors=[_KeyInterceptor(worker_key(self._options.secret))],
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

    async def drain(self, timeout_s: float) -> bool:
        """Take nothing new, wait for what runs; False if time was up first."""
        self._state = FrontState.DRAINING
        self._prefill.draining = self._decode.draining = True
        try:
            async with asyncio.timeout(timeout_s):
                with contextlib.suppress(EngineGoneError):  # then nothing runs any more, or time is up
                    await self.link.catch_up(timeout_s)
                async with self.link.news:
                    await self.link.news.wait_for(lambda: num_open(self.link.stats) == 0)
        except TimeoutError:
            log.warning("drain: %d requests are left after %.1f s", num_open(self.link.stats), timeout_s)
            return False
        return True

    async def stop(self) -> None:
        """Leave the registry, end every stream, let go of the engine."""
        self._state = FrontState.STOPPED
        if self._lease_task is not None:
            self._lease_task.cancel()
        with contextlib.suppress(StoreUnavailableError):
            await self._store.deregister(self._options.worker_id, self.link.epoch)
        if self._server is not None:
            await self._server.stop(STOP_GRACE_S)
        await self.link.close()

    def status(self) -> dict[str, Any]:
        """For people and metrics: state, identity, stats."""
        return {
            "worker_id": self._options.worker_id,
            "pool": self._options.pool,
            "role": self._options.role,
            "epoch": self.link.epoch,
            "state": self.state.value,
            "address": self.address,
            "metrics_address": self._options.metrics_address,
            "paced": self.link.description.paced,
            "stats": {field.name: getattr(self.link.stats, field.name) for field in pb.WorkerStats.DESCRIPTOR.fields},
        }

    def _on_step(self, step: pb.StepEvent) -> None:
        self.link.stats = step.stats
        self._decode.on_step(step)

    async def _register(self) -> None:
        options = self._options
        record = WorkerRecord(
            worker_id=options.worker_id,
            epoch=self.link.epoch,
            role=options.role,
            address=self.address,
            metrics_address=options.metrics_address,
            pool=options.pool,
            started_at=self._started_at,
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


def num_open(stats: pb.WorkerStats) -> int:
    """Requests of any phase that a worker still has."""
    return stats.num_running + stats.num_waiting + stats.num_reserved + stats.open_sends


class _KeyInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Lets in only callers who know the cluster secret."""

    def __init__(self, key: str) -> None:
        self._key = key

        async def refuse(_request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "this port is for the cluster's own routers")

        self._refusals = {
            False: grpc.unary_unary_rpc_method_handler(refuse),
            True: grpc.stream_stream_rpc_method_handler(refuse),
        }

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """Refuse a call whose metadata lacks the key."""
        metadata = dict(handler_call_details.invocation_metadata or ())
        if same_key(str(metadata.get(WORKER_METADATA_KEY, "")), self._key):
            return await continuation(handler_call_details)
        return self._refusals[handler_call_details.method.endswith(STREAMS)]
