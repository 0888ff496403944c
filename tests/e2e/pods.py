"""Processes in place of the pods of deploy/kuberay: a Ray that we did not start, and the sidecar that starts pdserve.

Each node has an address of loopback of its own and a run directory of its own, and only the driver has the model's
YAML: what a node needs comes with Ray, from the mounted secrets and from the model's directory.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import psutil

from protos import inference_pb2 as pb
from protos import inference_pb2_grpc
from router.store import RedisStore, RouterRecord, WorkerRecord
from tests.e2e.test_mini_cluster import prompt_of, request_of
from tests.mini_cluster import Answer
from tests.real_valkey import RealValkey, free_port

UP_S = 240
DRAIN_S = 10
GRACE_S = DRAIN_S + 45
"""terminationGracePeriodSeconds: the drain, and what the end of a raylet takes."""
RECOVERY_S = 90.0
JOIN_S = 240.0
PAUSE_S = 0.1
"""Between two requests of a client: Ray gives a node 15 s to start, on a machine with few cores too."""
HEAD = "127.0.7.1"
MEMBERS = ["decode-0", "decode-1", "prefill-0", "prefill-1", "router-0", "router-1"]
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
        self.log = pods.directory / f"{name}.log"
        self._pods = pods
        self._arguments = arguments
        self.start()

    def start(self) -> None:
        command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--object-store-memory", "80000000"]
        command += ["--node-ip-address", self.address]
        self.env = {**self._pods.env, "PDSERVE_NODE_DIR": str(self.node_dir)}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "--temp-dir", str(self._pods.short / self.name), *self._arguments],
                env=self.env,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def says(self) -> str:
        return self.log.read_text()

    def has_joined(self) -> bool:
        """Whether Ray runs; a pod that failed before that is made again, as KubeRay does."""
        if self.process.poll() is not None and "Ray runtime started" not in self.says():
            self.start()
        return "Ray runtime started" in self.says()

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
        self.short = Path(tempfile.mkdtemp(prefix="pods-"))
        """For Ray's sockets, whose paths must be short."""
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
            "RAY_gcs_rpc_server_reconnect_timeout_s": "600",  # as KubeRay has it with GCS fault tolerance
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_enable_metrics_collection": "0",
            "RAY_num_workers_soft_limit": "0",
            # addresses of loopback are not taken for the nodes of a laptop
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",
            "OMP_NUM_THREADS": "1",
        }
        self.pods: list[Pod] = []
        self.sidecar: subprocess.Popen[bytes] | None = None

    def head(self) -> Pod:
        flags = ["--head", "--port", str(self.gcs_port), "--num-cpus", "0", "--include-dashboard", "false"]
        return self._add("head", HEAD, [*flags, "--redis-password", "sesame"])

    def worker(self, group: str) -> Pod:
        """One more pod of a worker group: room for one router, or for one worker."""
        number = sum(pod.name.startswith(group) for pod in self.pods)
        flags = ["--address", f"{HEAD}:{self.gcs_port}", "--num-cpus", "2"]
        address = f"127.0.7.{10 * ('router', 'prefill', 'decode').index(group) + 10 + number}"
        return self._add(f"{group}-{number}", address, [*flags, "--resources", json.dumps({f"{group}_node": 1})])

    def _add(self, name: str, address: str, arguments: list[str]) -> Pod:
        pod = Pod(self, name, address, arguments)
        self.pods.append(pod)
        return pod

    def wait_joined(self) -> None:
        """Until every node that was started has joined."""
        for pod in self.pods:
            until(pod.has_joined, JOIN_S, pod.says)

    def run_sidecar(self) -> None:
        """What the head pod's sidecar runs."""
        command = [str(Path(sys.executable).with_name("pdserve")), "up", "-f", str(self.yaml), "--foreground", "--keep"]
        with (self.directory / "sidecar.log").open("w") as log:
            self.sidecar = subprocess.Popen(command, env=self.env, stdout=log, stderr=log)

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

    def kill_sidecar(self) -> None:
        if self.sidecar is not None and self.sidecar.poll() is None:
            for process in [*psutil.Process(self.sidecar.pid).children(recursive=True), self.sidecar]:
                process.kill()
            self.sidecar.wait(30)

    def close(self) -> None:
        self.kill_sidecar()
        for pod in reversed(self.pods):
            pod.kill()
        shutil.rmtree(self.short, ignore_errors=True)

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

    def __init__(self, pods: Pods, num_clients: int = 6) -> None:
        self.num_clients = num_clients
        self._pods = pods
        self._over = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="load")
        self.answers: list[Answer] = []
        self.errors: list[str] = []

    def __enter__(self) -> Load:
        self._addresses = [one.address for one in self._pods.registered().values() if isinstance(one, RouterRecord)]
        self._thread.start()
        self.wait_for(self.num_clients)
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
        await asyncio.gather(*(self._client(number) for number in range(self.num_clients)))

    async def _client(self, number: int) -> None:
        turn = number
        while not self._over.is_set():
            turn += 1
            request = request_of(prompt_of(60, seed=1000 * number + turn), max_tokens=80)
            try:
                self.answers.append(await self._ask(request, turn))
                await asyncio.sleep(PAUSE_S)
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


@contextlib.contextmanager
def new_pods(directory: Path, model: Path) -> Iterator[Pods]:
    (directory / "valkey").mkdir()
    valkey = RealValkey(directory / "valkey")
    pods = Pods(directory, model, valkey)
    try:
        yield pods
    finally:
        pods.close()
        valkey.kill()
