"""What a router's stream stands for: while it lasts its work goes on, and with it all of that ends."""

import asyncio
from contextlib import asynccontextmanager

import grpc
import pytest

from decode_pool import service
from engine import wire
from engine.config import ModelOptions
from engine.link import EngineLink
from protos import worker_pb2 as pb
from protos import worker_pb2_grpc
from protos.auth import WORKER_METADATA_KEY, worker_key
from router.info import WorkerInfo
from router.prefix_index import PrefixIndex
from tests.mini_cluster import SECRET, MiniCluster, MiniWorker, Shape
from tests.session_pair import make_request

METADATA = ((WORKER_METADATA_KEY, worker_key(SECRET)),)
Stub = worker_pb2_grpc.DecodeWorkerStub


def run(tiny_llama, tmp_path, scenario) -> None:
    """Play the router of one worker."""

    async def main() -> None:
        cluster = MiniCluster(Shape(model=ModelOptions(path=str(tiny_llama))), tmp_path)
        async with alone(cluster) as (worker, stub), asyncio.timeout(30):
            await scenario(worker, stub)

    asyncio.run(main())


@asynccontextmanager
async def alone(cluster: MiniCluster):
    """One decode worker without any router."""
    try:
        worker = await cluster.add_worker("d", "decode")
        async with grpc.aio.insecure_channel(worker.front.address) as channel:
            yield worker, Stub(channel)
    finally:
        await cluster.__aexit__(None, None, None)


async def attach(stub: Stub):
    """A stream whose description has come."""
    call = stub.Attach(metadata=METADATA)
    await call.write(pb.AttachRequest(hello=pb.AttachHello(router_id="r")))
    assert (await call.read()).HasField("description")
    return call


async def reserve(worker: MiniWorker, stub: Stub, name: str, **options) -> None:
    """Ask for blocks as router "r"."""
    request = wire.request_to_wire(make_request(name, [5] * 40, max_tokens=200))
    await stub.Reserve(
        pb.ReserveRequest(router_id="r", request=request, epoch=worker.front.link.epoch, **options), metadata=METADATA
    )


async def until_reserved(worker: MiniWorker, count: int) -> None:
    """Ask the engine, which checks its books each time, until so many reservations are left."""
    while True:
        reply = await worker.front.link.call(pb.EngineCommand(check=pb.CheckIntegrity()), 10.0)
        assert reply.WhichOneof("result") == "stats", reply.error.message
        if reply.stats.num_reserved == count:
            return


async def until_ended(call) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


def test_a_router_that_attaches_anew_leaves_nothing_behind(tiny_llama, tmp_path):
    async def scenario(worker: MiniWorker, stub: Stub) -> None:
        first = await attach(stub)
        await reserve(worker, stub, "old")
        await until_reserved(worker, 1)
        second = await attach(stub)
        await until_ended(first)
        await reserve(worker, stub, "new")
        await until_reserved(worker, 1)
        second.cancel()

    run(tiny_llama, tmp_path, scenario)


def test_a_silent_router_is_gone(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(service, "ROUTER_SILENCE_S", 0.2)

    async def scenario(worker: MiniWorker, stub: Stub) -> None:
        call = await attach(stub)
        await reserve(worker, stub, "orphan")
        await until_ended(call)
        await until_reserved(worker, 0)
        with pytest.raises(grpc.aio.AioRpcError, match="router r is not attached"):
            await reserve(worker, stub, "late")

    run(tiny_llama, tmp_path, scenario)


def test_a_router_over_its_cap_is_detached_at_once(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(service, "MAX_QUEUED_EVENTS", 0)

    async def scenario(worker: MiniWorker, stub: Stub) -> None:
        call = await attach(stub)
        await reserve(worker, stub, "long", local_prefill=True)
        await until_ended(call)
        await until_reserved(worker, 0)
        assert not worker.host.engine.scheduler.sequences()

    run(tiny_llama, tmp_path, scenario)


def test_a_drain_sees_what_was_asked_for_a_moment_ago(tiny_llama, tmp_path):
    async def scenario(worker: MiniWorker, stub: Stub) -> None:
        call = await attach(stub)
        await reserve(worker, stub, "last")
        assert not await worker.front.drain(0.3)
        with pytest.raises(grpc.aio.AioRpcError, match="this worker is draining"):
            await reserve(worker, stub, "late")
        call.cancel()
        assert await worker.front.drain(10.0)

    run(tiny_llama, tmp_path, scenario)


def test_a_router_hears_at_once_of_a_new_role_and_of_a_drain(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(service, "STATS_PERIOD_S", 60.0)

    async def scenario(worker: MiniWorker, stub: Stub) -> None:
        call = await attach(stub)
        await worker.front.set_role("prefill", 10.0)
        while (event := await call.read()).role != "prefill":
            assert event.role in ("", "decode")
        assert not event.draining
        late = stub.Attach(metadata=METADATA)
        await late.write(pb.AttachRequest(hello=pb.AttachHello(router_id="late")))
        assert (await late.read()).description.role == "prefill"
        draining = asyncio.create_task(worker.front.drain(10.0))
        while not (await call.read()).draining:
            pass
        assert await draining
        call.cancel()
        late.cancel()

    run(tiny_llama, tmp_path, scenario)


def test_a_router_hears_soon_what_another_ones_tokens_changed(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(service, "STATS_PERIOD_S", 60.0)

    async def scenario(worker, stub):
        call = await attach(stub)
        other = stub.Attach(metadata=METADATA)
        await other.write(pb.AttachRequest(hello=pb.AttachHello(router_id="other")))
        assert (await other.read()).stats.generated_tokens == 0
        await reserve(worker, stub, "mine", local_prefill=True)
        heard = 0
        while (event := await other.read()).stats.generated_tokens < 150:
            assert not event.outputs
            heard += 1
        assert heard < 150, "not for each step"
        call.cancel()
        other.cancel()

    run(tiny_llama, tmp_path, scenario)


def test_block_events_add_up_and_are_told_anew_on_request(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(service, "STATS_PERIOD_S", 0.2)

    async def scenario(worker, stub):
        call = stub.Attach(metadata=METADATA)
        await call.write(pb.AttachRequest(hello=pb.AttachHello(router_id="r")))
        first = await call.read()
        assert first.blocks.is_snapshot
        assert not first.blocks.stored
        check = await worker.front.link.call(pb.EngineCommand(check=pb.CheckIntegrity()), 30)
        assert check.WhichOneof("result") == "stats"
        index, info = PrefixIndex(), WorkerInfo("d", 1, "decode", "x:1")
        assert index.apply(info, first.blocks)
        await reserve(worker, stub, "mine", local_prefill=True)
        ended = False
        while not ended or index.num_held(info) < 14:  # of 40 tokens and an answer of 200
            event = await call.read()
            if event.HasField("blocks"):
                assert not event.blocks.is_snapshot
                assert index.apply(info, event.blocks)
            ended = ended or any(output.finish for output in event.outputs)
        held = index.num_held(info)
        await call.write(pb.AttachRequest(heartbeat=pb.Heartbeat(wants_blocks=True)))
        while not (event := await call.read()).blocks.is_snapshot:
            pass
        assert len(event.blocks.stored) == held
        call.cancel()

    run(tiny_llama, tmp_path, scenario)


def test_little_is_kept_for_a_router_that_does_not_read(monkeypatch):
    """Neither statistics nor block events pile up, and what it reads at last is right."""
    monkeypatch.setattr(service, "STATS_LAG_S", 0.0)
    monkeypatch.setattr(service, "MIN_KEPT_KEYS", 10)

    async def scenario():
        made = service.DecodeService(EngineLink(socket_path="", worker_id="d", next_epoch=None, on_step=None))
        router = made._attached["r"] = service._Attached("r")
        made.on_step(pb.StepEvent(blocks=pb.BlockEvents(number=1, is_snapshot=True)))
        for number in range(1, 1000):
            events = pb.BlockEvents(after=number, number=number + 1, stored=[number], evicted=[number - 1])
            made.on_step(pb.StepEvent(blocks=events))
            await asyncio.sleep(0)
            assert router.queue.qsize() <= 1
            assert len(router.blocks) <= 12
        index, info = PrefixIndex(), WorkerInfo("d", 1, "decode", "x:1")
        assert index.apply(info, router.queue.get_nowait().blocks)
        assert index.apply(info, router.blocks.take())
        assert index.num_held(info) == 1
        assert index.find([999], 1).tokens_at(info) == 1

    asyncio.run(scenario())
