"""A whole router: the server for clients, the fleet behind it, and what others may ask about it.

States: NEW -> SERVING (`start`) -> DRAINING (`drain`: nothing new, running streams go on) -> STOPPED (`stop`).
Health says SERVING while every role that is needed has a worker in READY; clients' load balancers go by that.
"""

from __future__ import annotations

import asyncio
import copy
import enum
import logging
import time
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from engine.config import ModelOptions
from protos import inference_pb2, inference_pb2_grpc
from protos.auth import worker_key
from router.admission import Line
from router.background import Background
from router.config import RouterConfig
from router.dispatcher import Dispatcher
from router.errors import RouterStartError, StoreUnavailableError, UnavailableError
from router.fleet import Fleet
from router.info import WorkerInfo
from router.interceptors import ApiKeys, StrictParsing
from router.introductions import Introductions
from router.model import ServedModel
from router.runs import Runs
from router.service import InferenceService
from router.session import Desk
from router.stats import RouterStats
from router.store import FleetStore, RouterRecord
from router.tenants import Tenants
from router.wakeup import Signal

logger = logging.getLogger(__name__)

SERVICE = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
STATUS_GRACE_S = 1.0
"""How long interrupted streams may take to tell their clients."""


class AppState(enum.Enum):
    """Where a router is in its life."""

    NEW = "new"
    SERVING = "serving"
    DRAINING = "draining"
    STOPPED = "stopped"


class RouterApp:
    """One router; all methods belong to the event loop that called `start`."""

    def __init__(
        self,
        *,
        config: RouterConfig,
        model: ModelOptions,
        mode: Literal["split", "colocated"],
        store: FleetStore,
        secret: bytes,
        router_id: str,
    ) -> None:
        """The store is the caller's: it is used, and not closed."""
        self.state = AppState.NEW
        self._config = config
        self._model_options = model
        self._split = mode == "split"
        self._store = store
        self._router_id = router_id
        self._background = Background()
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._line = Line(config)
        self._fleet = Fleet(store, config, router_id=router_id, worker_key=worker_key(secret), on_room=self._line.news)
        self._dispatcher = Dispatcher(self._fleet, self._line, config, router_id=router_id, split=self._split)

    async def start(self, metrics_address: str = "") -> str:
        """Load the tokenizer, bind the port, meet the workers; gives host:port.

        `metrics_address` (host:port of this router's metrics page) is only told to the store.

        RouterStartError if the port or a file cannot be had, engine.errors.ModelError if the model cannot.
        """
        model = await asyncio.to_thread(ServedModel.load, self._model_options)
        tenants = Tenants.load(self._config.api_keys_file)
        self._desk = Desk(
            config=self._config,
            model=model,
            fleet=self._fleet,
            line=self._line,
            dispatcher=self._dispatcher,
            stats=RouterStats(),
            running={},
            ended=Signal(),
            split=self._split,
            tenants=tenants,
        )
        self._runs = Runs(self._desk, self._store.requests, self._router_id)
        self._server = self._make_server()
        self.address = _joined(self._config.host, self._bind())
        await self._publish_health()
        await self._server.start()
        await self._fleet.start()
        self.state = AppState.SERVING
        self._background.spawn(self._follow_health(), "router: follow the fleet's health")
        if self._split:
            self._background.spawn(Introductions(self._fleet).follow(), "router: introduce workers")
        record = RouterRecord(
            router_id=self._router_id, address=self.address, metrics_address=metrics_address, started_at=time.time()
        )
        self._background.spawn(self._renew_lease(record), "router: renew its lease")
        logger.info("router listens", extra={"address": self.address, "model": model.name})
        return self.address

    async def drain(self, timeout_s: float) -> bool:
        """Take nothing new and wait for what runs; False if something still ran after `timeout_s`."""
        if self.state is AppState.STOPPED:
            return True
        self.state = AppState.DRAINING
        self._desk.draining = True
        await self._publish_health()
        give_up_at = time.monotonic() + timeout_s
        while self._desk.running:
            seen = self._desk.ended.version
            left_s = give_up_at - time.monotonic()
            if left_s <= 0 or not await self._desk.ended.wait(seen, timeout_s=left_s):
                return not self._desk.running
        return True

    async def stop(self, *, closes_port: bool = True) -> None:
        """End everything: running requests get UNAVAILABLE, workers are told, the port is given back.

        Where the process is about to end, let that close the port (`closes_port=False`; until then every call is
        refused). A gRPC server that stops ends the calls of its last round trip with CANCELLED; what was sent to a
        process that is gone ends with UNAVAILABLE, upon which clients ask another router.
        """
        if self.state in (AppState.NEW, AppState.STOPPED):
            self.state = AppState.STOPPED
            return
        self._desk.draining = True
        self._runs.leave()
        stopping = UnavailableError("this router stops; ask another one", retry_after_s=self._config.retry_after_s)
        for scope in list(self._desk.running.values()):
            scope.interrupt(stopping)
        await self.drain(STATUS_GRACE_S)
        await self._background.cancel()
        if closes_port:
            await self._server.stop(STATUS_GRACE_S)
        await self._runs.close()
        await self._dispatcher.aborts.settle(self._config.abort_timeout_s)
        await self._fleet.stop()
        try:
            await self._store.deregister_router(self._router_id)
        except StoreUnavailableError as error:
            logger.warning("the router's lease is left to run out: %s", error)
        if not closes_port:
            await asyncio.sleep(STATUS_GRACE_S)
        self.state = AppState.STOPPED

    def stats(self) -> RouterStats:
        """A copy of the counters, with the gauges of this moment."""
        stats = copy.deepcopy(self._desk.stats)
        routed = self._dispatcher.routed
        stats.routed_prompts = routed.prompts
        stats.routed_prompt_tokens = routed.prompt_tokens
        stats.routed_missing_tokens = routed.missing_tokens
        stats.routed_missing_squares = routed.missing_squares
        stats.local_prompt_tokens = routed.local_tokens
        stats.spilled_prompt_tokens = routed.spilled_tokens
        stats.given_back = self._dispatcher.num_given_back
        stats.moved = self._dispatcher.num_moved
        stats.in_flight = len(self._desk.running)
        stats.queued = len(self._line)
        stats.queued_tokens = self._line.num_tokens()
        stats.refused = dict(self._line.refused)
        stats.workers = dict(Counter(info.state.value for info in self._fleet.workers()))
        return stats

    def status(self) -> dict[str, Any]:
        """The same for people, with each worker."""
        stats = self.stats()
        return {
            "router_id": self._router_id,
            "address": self.address,
            "state": self.state.value,
            "model": self._desk.model.name,
            "mode": "split" if self._split else "colocated",
            "in_flight": stats.in_flight,
            "queued": stats.queued,
            "outcomes": stats.outcomes,
            "workers": [_described(info) for info in sorted(self._fleet.workers(), key=lambda info: info.worker_id)],
        }

    def check_integrity(self) -> None:
        """When idle: no request, no place, no load may be left behind. AssertionError names what is."""
        assert not self._desk.running, f"requests left: {list(self._desk.running)}"
        assert not len(self._line), f"{len(self._line)} places left in the line"
        for info in self._fleet.workers():
            assert info.num_decoding == 0, f"{info.label} still counts {info.num_decoding} requests"
            assert info.prefill_tokens == 0, f"{info.label} still counts {info.prefill_tokens} prompt tokens"
            assert self._fleet.link(info).num_inboxes == 0, f"{info.label} still has inboxes"

    def _make_server(self) -> grpc.aio.Server:
        interceptors = [ApiKeys(self._desk.tenants)] if self._config.api_keys_file is not None else []
        options = (
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", self._config.max_request_bytes),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.keepalive_time_ms", 20_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
        )
        server = grpc.aio.server(interceptors=interceptors, options=options)
        service = InferenceService(self._desk, self._runs)
        inference_pb2_grpc.add_InferenceServicer_to_server(service, StrictParsing(server))  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        return server

    def _bind(self) -> int:
        address = _joined(self._config.host, self._config.port)
        try:
            if self._config.tls_cert is None or self._config.tls_key is None:
                port = self._server.add_insecure_port(address)
            else:
                pair = (Path(self._config.tls_key).read_bytes(), Path(self._config.tls_cert).read_bytes())
                port = self._server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
        except OSError as error:
            raise RouterStartError(f"the TLS files cannot be read: {error}") from error
        except RuntimeError as error:
            port = 0
            cause: Exception | None = error
        else:
            cause = None
        if port == 0:
            raise RouterStartError(
                f"the router cannot listen on {address}: the port is in use, the address is not this machine's, "
                "or the TLS files do not fit together; choose another router.port, or 0 for any free one"
            ) from cause
        return port

    async def _publish_health(self) -> None:
        serving = not self._desk.draining and self._fleet.serves(split=self._split)
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in ("", SERVICE):
            await self._health.set(service, status)

    async def _follow_health(self) -> None:
        while True:
            seen = self._fleet.changed.version
            await self._publish_health()
            await self._fleet.changed.wait(seen, timeout_s=self._config.lease_ttl_s)

    async def _renew_lease(self, record: RouterRecord) -> None:
        while True:
            try:
                await self._store.register_router(record, self._config.lease_ttl_s)
            except StoreUnavailableError as error:
                logger.warning("the router's lease could not be renewed: %s", error)
            await asyncio.sleep(self._config.lease_ttl_s / 3)


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _described(info: WorkerInfo) -> dict[str, Any]:
    stats = {field.name: value for field, value in info.stats.ListFields()}
    return {
        "worker_id": info.worker_id,
        "epoch": info.epoch,
        "role": info.role,
        "pool": info.pool,
        "address": info.address,
        "state": info.state.value,
        "in_flight": info.num_decoding,
        "num_blocks": info.description.num_blocks,
        "paced": info.description.paced,
        "stats": stats,
    }
