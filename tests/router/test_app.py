"""A whole router as others see it: health, reflection, keys, TLS, ports, drain, status, and a storm."""

from __future__ import annotations

import asyncio
import datetime
import json
import random
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from engine.config import ModelOptions
from engine.errors import ModelNotFoundError
from protos import inference_pb2, inference_pb2_grpc
from router.app import RouterApp
from router.config import RouterConfig
from router.errors import RouterStartError
from router.store import MemoryStore
from tests.router.fake_worker import Behaviour, expected_answer
from tests.router.harness import PROMPT, Answer, Cluster, ask, cluster, eventually, run


def make_app(model: Path | str, **config: object) -> RouterApp:
    return RouterApp(
        config=RouterConfig(**config),  # type: ignore[arg-type]
        model=ModelOptions(path=str(model), name="named"),
        mode="split",
        store=MemoryStore(),
        secret=b"s",
        router_id="r",
    )


async def health(channel: grpc.aio.Channel, service: str = "pdserve.v1.Inference") -> str:
    reply = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service))
    return health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)


def test_health_follows_the_workers(model: Path) -> None:
    async def scenario() -> None:
        async with cluster(model) as made:
            for service in ("", "pdserve.v1.Inference"):
                assert await health(made.channel, service) == "SERVING"
            await made.workers["p0"].stop()
            await eventually(lambda: made.app.stats().workers.get("ready") == 1)
            await asyncio.sleep(0.05)
            assert await health(made.channel) == "NOT_SERVING"
            await made.add_worker("p1", "prefill")
            await made.ready(2)
            await asyncio.sleep(0.05)
            assert await health(made.channel) == "SERVING"

    run(scenario())


def test_reflection_lists_and_describes_the_service(model: Path) -> None:
    async def scenario() -> None:
        async with cluster(model) as made:
            stub = reflection_pb2_grpc.ServerReflectionStub(made.channel)
            asked = [
                reflection_pb2.ServerReflectionRequest(list_services=""),
                reflection_pb2.ServerReflectionRequest(file_containing_symbol="pdserve.v1.Inference"),
            ]
            replies = [reply async for reply in stub.ServerReflectionInfo(iter(asked))]
            names = {service.name for service in replies[0].list_services_response.service}
            assert {"pdserve.v1.Inference", "grpc.health.v1.Health"} <= names
            assert b"GenerateRequest" in replies[1].file_descriptor_response.file_descriptor_proto[0]

    run(scenario())


def test_api_keys_guard_everything_but_health(model: Path, tmp_path: Path) -> None:
    async def scenario() -> None:
        keys = tmp_path / "keys"
        keys.write_text("first-key\n\nsecond-key\n")
        async with cluster(model, api_keys_file=str(keys)) as made:
            models = inference_pb2.ListModelsRequest()
            wrong = [None, (("authorization", "Bearer nope"),), (("authorization", "first-key"),)]
            for metadata in wrong:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await made.stub.ListModels(models, metadata=metadata)
                assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            refusal = await made.refused(ask())
            assert refusal.code is grpc.StatusCode.UNAUTHENTICATED
            assert await health(made.channel) == "SERVING"
            reply = await made.stub.ListModels(models, metadata=(("authorization", "Bearer second-key"),))
            assert reply.models[0] == inference_pb2.Model(
                name=model.name, max_model_len=512, vocab_size=300, architecture="LlamaForCausalLM"
            )
            call = made.stub.Generate(ask(), metadata=(("authorization", "Bearer first-key"),))
            assert [event async for event in call][-1].HasField("finished")

    run(scenario())


@pytest.mark.parametrize("content", [None, "", "\n \n"])
def test_keys_file_without_keys_stops_the_start(model: Path, tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "keys"
    if content is not None:
        path.write_text(content)
    app = make_app(model, port=0, api_keys_file=str(path))

    async def scenario() -> None:
        with pytest.raises(RouterStartError, match="api_keys_file"):
            await app.start()

    run(scenario())


def certificate(directory: Path) -> tuple[Path, Path]:
    """A self-signed pair for localhost, made with openssl."""
    cert, key = directory / "cert.pem", directory / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(cert)]
    subprocess.run(command, check=True, capture_output=True)
    return cert, key


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command to make a certificate")
def test_tls(model: Path, tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)

    async def scenario() -> None:
        app = make_app(model, port=0, host="localhost", tls_cert=str(cert), tls_key=str(key))
        address = await app.start()
        trusted = grpc.ssl_channel_credentials(cert.read_bytes())
        async with grpc.aio.secure_channel(address, trusted) as channel:
            reply = await inference_pb2_grpc.InferenceStub(channel).ListModels(inference_pb2.ListModelsRequest())
            assert reply.models[0].name == "named"
        async with grpc.aio.insecure_channel(address) as channel:
            with pytest.raises(grpc.aio.AioRpcError):
                await inference_pb2_grpc.InferenceStub(channel).ListModels(inference_pb2.ListModelsRequest())
        await app.stop()

    run(scenario())


def test_broken_start_says_why(model: Path, tmp_path: Path) -> None:
    async def scenario() -> None:
        with pytest.raises(RouterStartError, match="TLS files cannot be read"):
            await make_app(model, port=0, tls_cert="/nowhere/c", tls_key="/nowhere/k").start()
        with pytest.raises(ModelNotFoundError):
            await make_app(tmp_path / "nothing").start()
        app = make_app(model, port=0)
        port = int((await app.start()).rpartition(":")[2])
        with pytest.raises(RouterStartError, match=f"cannot listen on 127.0.0.1:{port}: the port is in use"):
            await make_app(model, port=port).start()
        await app.stop()

    run(scenario())


def test_drain_finishes_what_runs_and_takes_nothing_new(model: Path) -> None:
    async def scenario() -> None:
        async with cluster(model, behaviour=Behaviour(step_s=0.01)) as made:
            running = asyncio.create_task(made.ask(ask("r1", num=40)))
            await eventually(lambda: made.workers["d0"].running)
            assert not await made.app.drain(0.01)
            refusal = await made.refused(ask("r2"))
            assert (refusal.code, refusal.retry_after_s) == (grpc.StatusCode.UNAVAILABLE, 1.0)
            assert await health(made.channel) == "NOT_SERVING"
            assert await made.app.drain(10.0)
            await made.app.stop()
            assert await made.app.drain(10.0), "whoever asks again hears the same"
            assert (await running).token_ids == expected_answer(PROMPT, 40)

    run(scenario())


def test_stop_tells_clients_and_workers(model: Path) -> None:
    async def scenario() -> None:
        async with cluster(model, behaviour=Behaviour(step_s=0.01)) as made:
            running = asyncio.create_task(made.refused(ask("r1", num=400)))
            await eventually(lambda: made.workers["d0"].running)
            await made.app.stop()
            refusal = await running
            assert (refusal.code, refusal.retry_after_s) == (grpc.StatusCode.UNAVAILABLE, 1.0)
            await eventually(lambda: not made.workers["d0"].running)
            await made.app.stop()

    run(scenario())


@pytest.mark.parametrize("resumable", [False, True])
def test_a_router_whose_process_is_about_to_end_refuses_until_then(model: Path, resumable: bool) -> None:
    """A server that stops would end what comes in its last round trip with CANCELLED."""

    async def scenario() -> None:
        async with cluster(model, behaviour=Behaviour(step_s=0.01)) as made:
            running = asyncio.create_task(made.refused(ask("r1", num=400)))
            await eventually(lambda: made.workers["d0"].running)
            await made.app.stop(closes_port=False)
            assert (await running).code is grpc.StatusCode.UNAVAILABLE
            request = ask("r2")
            request.resumable = resumable
            refusal = await made.refused(request)
            assert (refusal.code, refusal.retry_after_s) == (grpc.StatusCode.UNAVAILABLE, 1.0)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for _ in made.stub.Resume(inference_pb2.ResumeRequest(request_id="r1")):
                    pass
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert await health(made.channel) == "NOT_SERVING"
            await made.app._server.stop(1.0)

    run(scenario())


def test_draining_worker_finishes_and_gets_nothing_new(model: Path) -> None:
    async def scenario() -> None:
        async with cluster(model, decode=2, policy="round_robin", behaviour=Behaviour(step_s=0.01)) as made:
            running = asyncio.create_task(made.ask(ask("r1", num=40)))
            await eventually(lambda: any(worker.running for worker in made.workers.values()))
            busy = next(worker for worker in made.workers.values() if worker.running)
            busy.drain()
            await eventually(lambda: made.app.stats().workers.get("draining") == 1)
            for number in range(4):
                await made.ask(ask(f"later{number}", num=2))
            assert busy.reserved == ["r1"]
            assert (await running).token_ids == expected_answer(PROMPT, 40)

    run(scenario())


def test_worker_with_another_secret_or_name_never_becomes_ready(model: Path) -> None:
    async def scenario() -> None:
        app = make_app(model, port=0)
        await app.start()
        async with cluster(model) as made:
            await app._store.register((await made.store.workers())[0], 60.0)
            await eventually(lambda: app.stats().workers == {"starting": 1})
            await asyncio.sleep(0.3)
            assert app.stats().workers == {"starting": 1}
            assert app.status()["workers"][0]["state"] == "starting"
        await app.stop()

    run(scenario())


def test_status_is_plain_data_and_the_router_is_listed(model: Path) -> None:
    async def scenario() -> None:
        async with cluster(model) as made:
            await made.ask(ask("r1"))
            status = json.loads(json.dumps(made.app.status()))
            assert status["outcomes"] == {"length": 1}
            assert [worker["worker_id"] for worker in status["workers"]] == ["d0", "p0"]
            stats = made.app.stats()
            assert (stats.prompt_tokens, stats.generated_tokens) == (4, 8)
            assert stats.ttft_s.num == stats.total_s.num == 1
            assert sum(stats.itl_s.counts) == stats.itl_s.num > 0
            listed = await made.store.routers()
            assert [router.address for router in listed] == [made.app.address]
            assert listed[0].started_at <= datetime.datetime.now().timestamp()
        assert await made.store.routers() == []

    run(scenario())


async def storm_request(made: Cluster, number: int, rng: random.Random) -> str:
    """One of many requests, perhaps ended by its client at a random token; gives how it ended."""
    prompt = [40 + number % 200] * rng.randint(1, 40)
    num = rng.randint(1, 40)
    how = ["stay", "stay", "cancel", "stay", "stay", "go"][number % 6]
    moment = rng.choice([0, 0, 1, 2, 5, 15])
    call = made.stub.Generate(ask(f"s{number}", num=num, prompt=prompt))
    answer = Answer()
    cancels = []
    try:
        async for event in call:
            answer.add(event)
            if how == "go" and len(answer.token_ids) >= moment:
                call.cancel()
            elif how == "cancel" and len(answer.token_ids) >= moment and not cancels:
                request = inference_pb2.CancelRequest(request_id=f"s{number}")
                cancels.append(asyncio.ensure_future(made.stub.Cancel(request)))
        ending = answer.reason
    except asyncio.CancelledError:
        ending = "GONE"
    await asyncio.gather(*cancels)
    assert answer.token_ids == expected_answer(prompt, num)[: len(answer.token_ids)]
    assert ending != "LENGTH" or len(answer.token_ids) == num
    return ending


@pytest.mark.parametrize("split", [True, False])
def test_storm_of_requests_ends_each_exactly_once(model: Path, split: bool) -> None:
    async def scenario() -> None:
        rng = random.Random(7)
        behaviour = Behaviour(capacity=6, step_s=0.004, prefill_s=0.003)
        async with cluster(model, split=split, prefill=2, decode=2, behaviour=behaviour) as made:
            storm = [asyncio.create_task(storm_request(made, number, rng)) for number in range(200)]
            await eventually(lambda: made.app.stats().queued > 0)
            victim = made.workers["d1"]
            await asyncio.sleep(0.1)
            await victim.kill()
            endings = Counter(await asyncio.gather(*storm))
            assert set(endings) <= {"LENGTH", "CANCELLED", "GONE"}, endings
            assert endings["LENGTH"] > 100
            await made.idle()
            counted = made.app.stats().outcomes
            assert counted["cancelled"] == endings["CANCELLED"] > 10
            assert 10 < counted["client_gone"] <= endings["GONE"]
            assert sum(counted.values()) == 200
            assert all(not worker.prefilling for worker in made.workers.values())

    run(scenario(), timeout_s=60.0)
