"""What the manifests in deploy/kuberay promise, with processes in place of pods: a Ray that we did not start, its nodes
joining late, leaving as a pod does, and its head starting again.

Each node has an address of loopback of its own and a run directory of its own, and only the driver has the model's
YAML: what a node needs comes with Ray, from the mounted secrets and from the model's directory.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import psutil
import pytest

from protos import inference_pb2 as pb
from protos import inference_pb2_grpc
from router.store import RedisStore, RouterRecord, WorkerRecord
from tests.e2e.test_mini_cluster import prompt_of, request_of
from tests.mini_cluster import Answer
from tests.real_valkey import RealValkey, free_port

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

UP_S = 240
DRAIN_S = 10
GRACE_S = DRAIN_S + 45
"""terminationGracePeriodSeconds: the drain, and what the end of a raylet takes."""
HEAD = "127.0.7.1"
YAML = """
mode: split
model: {{path: {model}}}
cache: {{block_size: 16, num_blocks: 256}}
prefill: {{workers: 2, max_step_tokens: 64, max_running: 32, host: node, resources: {{prefill_node: 1}}}}
decode: {{workers: 2, max_step_tokens: 64, max_running: 32, host: node, resources: {{decode_node: 1}}}}
transfer: {{host: node}}
router: {{port: {port}, host: node, replicas: 2, same_port: true, resources: {{router_node: 1}}}}
observability: {{metrics_host: node}}
redis: {{url: "redis://127.0.0.1:{redis_port}/1", password_file: {secrets}/redis}}
ray: {{address: "{head}:{gcs_port}"}}
drain_s: {drain_s}
move_after_s: 2
"""


class Pod:
    """`ray start --block`, as KubeRay runs it in a pod: one process that everything of a node hangs from."""

    def __init__(self, pods: Pods, name: str, address: str, arguments: list[str]) -> None:
        self.name, self.address = name, address
        self.node_dir = pods.directory / name
        self._pods = pods
        self._arguments = arguments
        self.start()

    def start(self) -> None:
        command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--node-ip-address", self.address]
        self.env = {**self._pods.env, "PDSERVE_NODE_DIR": str(self.node_dir)}
        with (self._pods.directory / f"{self.name}.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "--object-store-memory", "80000000", *self._arguments],
                env=self.env,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def delete(self) -> float:
        """End it as a kubelet does: preStop hook, SIGTERM to the first process, SIGKILL to what is left; seconds."""
        began = time.monotonic()
        hook = [sys.executable, "-m", "cluster.leave_node"]
        ended = subprocess.run(hook, env=self.env, capture_output=True, text=True, timeout=GRACE_S)
        assert ended.returncode == 0, ended.stderr
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(GRACE_S - (time.monotonic() - began))
        took = time.monotonic() - began
        self.kill()
        return took

    def kill(self) -> None:
        """End every process of the node at once."""
        for process in self.members():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(30)

    def members(self) -> list[psutil.Process]:
        """Every process of the node: they have its directory in their environment."""
        return [process for process in psutil.process_iter() if self._has(process)]

    def _has(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get("PDSERVE_NODE_DIR") == str(self.node_dir)
        except psutil.Error:
            return False


class Pods:
    """A Ray cluster with token authentication and its state in Redis, and the sidecar that starts pdserve on it."""

    def __init__(self, directory: Path, model: Path, valkey: RealValkey) -> None:
        self.directory, self.valkey = directory, valkey
        mounted = directory / "mounted"
        mounted.mkdir()
        (mounted / "cluster").write_text(secrets.token_hex(32) + "\n")
        (mounted / "redis").write_text("sesame\n")
        self.gcs_port, self.port = free_port(), free_port()
        self.yaml = directory / "pdserve.yaml"
        self.yaml.write_text(
            YAML.format(
                model=model,
                port=self.port,
                redis_port=valkey.port,
                secrets=mounted,
                head=HEAD,
                gcs_port=self.gcs_port,
                drain_s=DRAIN_S,
            )
        )
        self.env = {
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "PDSERVE_RUN_DIR": str(directory / "run"),
            "PDSERVE_SECRETS_DIR": str(mounted),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_external_storage_namespace": "pods",
            "RAY_REDIS_ADDRESS": f"127.0.0.1:{valkey.port}",
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "15",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_enable_metrics_collection": "0",
            "RAY_num_workers_soft_limit": "0",
            # addresses of loopback are not taken for the nodes of a laptop
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",
            "OMP_NUM_THREADS": "1",
        }
        self.pods: list[Pod] = []
        self.sidecar: subprocess.Popen[str] | None = None

    def head(self) -> Pod:
        flags = ["--head", "--port", str(self.gcs_port), "--num-cpus", "0", "--include-dashboard", "false"]
        return self._add("head", HEAD, [*flags, "--redis-password", "sesame"])

    def worker(self, group: str, number: int) -> Pod:
        """One pod of a worker group: room for one router, or for one worker."""
        flags = ["--address", f"{HEAD}:{self.gcs_port}", "--num-cpus", "2"]
        address = f"127.0.7.{10 * ('router', 'prefill', 'decode').index(group) + 10 + number}"
        return self._add(f"{group}-{number}", address, [*flags, "--resources", json.dumps({f"{group}_node": 1})])

    def _add(self, name: str, address: str, arguments: list[str]) -> Pod:
        pod = Pod(self, name, address, arguments)
        self.pods.append(pod)
        return pod

    def run_sidecar(self) -> None:
        """What the head pod's sidecar runs."""
        command = [str(Path(sys.executable).with_name("pdserve")), "up", "-f", str(self.yaml), "--foreground", "--keep"]
        self._log = (self.directory / "sidecar.log").open("a")
        self.sidecar = subprocess.Popen(command, env=self.env, stdout=self._log, stderr=self._log, text=True)

    def sidecar_says(self) -> str:
        return (self.directory / "sidecar.log").read_text()

    def wait_ready(self, timeout_s: float = UP_S) -> None:
        def is_ready() -> bool:
            assert self.sidecar is not None
            assert self.sidecar.poll() is None, self.sidecar_says()
            return "Ready." in self.sidecar_says()

        until(is_ready, timeout_s, lambda: f"not ready: {self.sidecar_says()}")

    def end_sidecar(self) -> None:
        assert self.sidecar is not None
        self.sidecar.send_signal(signal.SIGTERM)
        assert self.sidecar.wait(60) == 0, self.sidecar_says()
        self._log.close()
        (self.directory / "sidecar.log").unlink()

    def close(self) -> None:
        if self.sidecar is not None and self.sidecar.poll() is None:
            self.sidecar.kill()
            self.sidecar.wait(30)
        for pod in reversed(self.pods):
            pod.kill()

    def registered(self) -> dict[str, WorkerRecord | RouterRecord]:
        """The registry's workers and routers by id."""

        async def ask() -> dict[str, WorkerRecord | RouterRecord]:
            store = RedisStore(f"redis://:sesame@127.0.0.1:{self.valkey.port}/1", timeout_s=5.0)
            try:
                workers, routers = await store.workers(), await store.routers()
            finally:
                await store.close()
            return {**{one.worker_id: one for one in workers}, **{one.router_id: one for one in routers}}

        return asyncio.run(ask())

    def pod_at(self, address: str) -> Pod:
        """The pod in which what listens at host:port runs."""
        host = address.rpartition(":")[0]
        return next(pod for pod in self.pods if pod.address == host and pod.process.poll() is None)


def until(condition: Callable[[], bool], timeout_s: float, say: Callable[[], str]) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, say()
        time.sleep(0.2)


class Load:
    """Clients that ask one request after the other of any of the routers that are registered, on a thread."""

    NUM_CLIENTS = 6

    def __init__(self, pods: Pods) -> None:
        self._pods = pods
        self._over = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="load")
        self.answers: list[Answer] = []
        self.errors: list[str] = []

    def __enter__(self) -> Load:
        self._addresses = [one.address for one in self._pods.registered().values() if isinstance(one, RouterRecord)]
        self._thread.start()
        self.wait_for(Load.NUM_CLIENTS)
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(120)
        assert not self._thread.is_alive()

    def wait_for(self, more: int, timeout_s: float = 60.0) -> None:
        """Until so many more answers have ended well."""
        wanted = len(self.answers) + more
        until(lambda: len(self.answers) >= wanted or bool(self.errors), timeout_s, lambda: f"{len(self.answers)} ended")
        assert not self.errors, self.errors

    async def _run(self) -> None:
        await asyncio.gather(*(self._client(number) for number in range(Load.NUM_CLIENTS)))

    async def _client(self, number: int) -> None:
        turn = number
        while not self._over.is_set():
            turn += 1
            request = request_of(prompt_of(60, seed=1000 * number + turn), max_tokens=80)
            try:
                self.answers.append(await self._ask(request, turn))
            except (grpc.aio.AioRpcError, AssertionError) as error:
                self.errors.append(f"{error!r:.400}")
                return

    async def _ask(self, request: pb.GenerateRequest, turn: int) -> Answer:
        """One request; a router that takes nothing new is left for the next one, as a Service does by readiness."""
        for attempt in range(20):
            address = self._addresses[(turn + attempt) % len(self._addresses)]
            answer = Answer()
            try:
                async with grpc.aio.insecure_channel(address) as channel:
                    async for event in inference_pb2_grpc.InferenceStub(channel).Generate(request, timeout=120):
                        answer.take(event)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE or answer.token_ids:
                    raise
                await asyncio.sleep(0.1)
                continue
            assert answer.finished is not None
            assert len(answer.token_ids) == request.sampling.max_tokens
            return answer
        raise AssertionError("no router took the request")


@pytest.fixture
def pods(tmp_path: Path, tiny_llama: Path, valkey: RealValkey) -> Iterator[Pods]:
    made = Pods(tmp_path, tiny_llama, valkey)
    yield made
    made.close()


@pytest.fixture
def running(pods: Pods) -> Pods:
    """Head, two routers, two prefill and two decode nodes, a node to spare for each pool, and pdserve on it."""
    pods.head()
    for number in range(3):
        for group in ("decode", "router", "prefill"):
            if number < 2 or group != "router":
                pods.worker(group, number)
    pods.run_sidecar()
    pods.wait_ready()
    return pods


def ask_once(address: str) -> Answer:
    async def ask() -> Answer:
        answer = Answer()
        async with grpc.aio.insecure_channel(address) as channel:
            async for event in inference_pb2_grpc.InferenceStub(channel).Generate(
                request_of(prompt_of(40), max_tokens=8), timeout=60
            ):
                answer.take(event)
        return answer

    return asyncio.run(ask())
