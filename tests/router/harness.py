"""A router with fake workers in one event loop, and a client that checks the order of what it hears."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2

from engine.config import ModelOptions
from engine.model_source import LoadFormat
from protos import inference_pb2, inference_pb2_grpc
from router.app import RouterApp
from router.config import RouterConfig
from router.store import FleetStore, MemoryStore, Role
from tests.router.fake_worker import SECRET, Behaviour, FakeWorker

PROMPT = [41, 42, 43, 44]


def run(scenario: Coroutine[Any, Any, None], timeout_s: float = 30.0) -> None:
    """Run a scenario in a loop of its own, within a bound."""

    async def bounded() -> None:
        async with asyncio.timeout(timeout_s):
            await scenario

    asyncio.run(bounded())


async def eventually(check: Any, timeout_s: float = 5.0) -> None:
    """Wait until a condition of the test holds."""
    async with asyncio.timeout(timeout_s):
        while not check():  # noqa: ASYNC110 (conditions of several parties)
            await asyncio.sleep(0.005)


@dataclass
class Answer:
    """Everything one stream said, checked for order on the way."""

    accepted: inference_pb2.Accepted | None = None
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finished: inference_pb2.Finished | None = None
    num_messages: int = 0

    def add(self, event: inference_pb2.GenerateEvent) -> None:
        assert self.finished is None, "something came after Finished"
        kind = event.WhichOneof("event")
        assert (kind == "accepted") == (self.accepted is None), "Accepted comes first, and once"
        if kind == "accepted":
            self.accepted = event.accepted
        elif kind == "tokens":
            assert event.tokens.offset == len(self.token_ids), "a gap or a repeat"
            self.token_ids += event.tokens.token_ids
            self.text += event.tokens.text
            self.num_messages += 1
        else:
            self.finished = event.finished

    @property
    def reason(self) -> str:
        assert self.finished is not None
        return inference_pb2.FinishReason.Name(self.finished.reason).removeprefix("FINISH_REASON_")


@dataclass
class Cluster:
    """What a scenario works with."""

    app: RouterApp
    stub: inference_pb2_grpc.InferenceStub
    channel: grpc.aio.Channel
    store: FleetStore
    workers: dict[str, FakeWorker]
    peers: dict[str, FakeWorker]

    async def ask(
        self, request: inference_pb2.GenerateRequest | None = None, *, tenant: str = "", **fields: Any
    ) -> Answer:
        """Send a request and hear its whole stream."""
        answer = Answer()
        metadata = (("pdserve-tenant", tenant),) if tenant else ()
        async for event in self.stub.Generate(request or ask(**fields), metadata=metadata):
            answer.add(event)
        return answer

    async def refused(self, request: inference_pb2.GenerateRequest, *, tenant: str = "") -> Refusal:
        """Send a request that ends in a status."""
        call = self.stub.Generate(request, metadata=(("pdserve-tenant", tenant),) if tenant else ())
        try:
            async for _ in call:
                pass
        except grpc.aio.AioRpcError as error:
            return Refusal.of(error)
        raise AssertionError("the request was served")

    async def add_worker(
        self, worker_id: str, role: Role, behaviour: Behaviour | None = None, **fields: Any
    ) -> FakeWorker:
        worker = FakeWorker(worker_id, role, self.store, self.peers, replace(behaviour or Behaviour()), **fields)
        await worker.start()
        self.workers[worker_id] = worker
        return worker

    async def ready(self, num: int) -> None:
        await eventually(lambda: self.app.stats().workers.get("ready", 0) == num)

    async def idle(self) -> None:
        """Wait until nothing runs anywhere, then see that nothing is left."""
        await eventually(lambda: not self.app.stats().in_flight)
        await eventually(lambda: all(not worker.running for worker in self.workers.values()))
        self.app.check_integrity()


@dataclass
class Refusal:
    """A status with its google.rpc details."""

    code: grpc.StatusCode
    message: str
    field: str | None = None
    retry_after_s: float | None = None

    @classmethod
    def of(cls, error: grpc.aio.AioRpcError) -> Refusal:
        refusal = cls(error.code(), error.details() or "")
        for name, value in error.trailing_metadata() or ():
            if name == "grpc-status-details-bin":
                for detail in status_pb2.Status.FromString(value).details:
                    bad, retry = error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
                    if detail.Unpack(bad):
                        refusal.field = bad.field_violations[0].field
                    elif detail.Unpack(retry):
                        refusal.retry_after_s = retry.retry_delay.ToMilliseconds() / 1000
        return refusal


def ask(
    request_id: str = "", num: int = 8, prompt: list[int] | None = None, **sampling: Any
) -> inference_pb2.GenerateRequest:
    """A request with token ids."""
    ids = inference_pb2.TokenIds(ids=PROMPT if prompt is None else prompt)
    return inference_pb2.GenerateRequest(
        request_id=request_id, token_ids=ids, sampling=inference_pb2.Sampling(max_tokens=num, **sampling)
    )


@contextlib.asynccontextmanager
async def cluster(
    model: Path,
    *,
    prefill: int = 1,
    decode: int = 1,
    split: bool = True,
    behaviour: Behaviour | None = None,
    store: FleetStore | None = None,
    load_format: LoadFormat = "auto",
    **config: Any,
) -> AsyncIterator[Cluster]:
    """A running router with READY workers; `behaviour` is shared by all of them."""
    own = store or MemoryStore(refresh_s=0.1)
    settings = {"port": 0, "no_worker_grace_s": 0.3, "reconnect_max_s": 0.2, **config}
    app = RouterApp(
        config=RouterConfig(**settings),
        model=ModelOptions(path=str(model), load_format=load_format),
        mode="split" if split else "colocated",
        store=own,
        secret=SECRET,
        router_id="router-0",
    )
    address = await app.start()
    channel = grpc.aio.insecure_channel(address)
    stub = inference_pb2_grpc.InferenceStub(channel)
    made = Cluster(app, stub, channel, own, {}, {})
    for index in range(prefill if split else 0):
        await made.add_worker(f"p{index}", "prefill", behaviour)
    for index in range(decode):
        await made.add_worker(f"d{index}", "decode", behaviour)
    try:
        await made.ready(len(made.workers))
        yield made
    finally:
        await channel.close()
        await app.stop()
        for worker in made.workers.values():
            await worker.stop()


__all__ = ["Answer", "Behaviour", "Cluster", "Refusal", "ask", "cluster", "eventually", "run"]
