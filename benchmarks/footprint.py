"""What an idle cluster costs: memory (summed PSS) and CPU, beside a Ray that runs nothing.

    python -m benchmarks.footprint [-f deploy/examples/cpu-demo.yaml] [--seconds 30] [--json]

Starts first Ray alone, then the whole cluster (one request warms it), each in a run directory of its own,
and reads /proc of every process of the session before and after a quiet time. The machine should be idle.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster import launch
from cluster.children import Children
from cluster.client import Client, Endpoint
from cluster.config import load_config
from cluster.ray_node import RayNode, RayWish, package_environment, ray_environment
from cluster.run_dir import ProcessRef, RunDir, session_members
from cluster.valkey import Valkey, free_port
from protos.inference_pb2 import GenerateRequest, Sampling

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
RAY_PROCESSES = ("gcs_server", "raylet", "ray::DashboardA", "ray::RuntimeEnv")
SETTLE_S = 15.0


@dataclass(frozen=True)
class Cost:
    """Of all processes of one name."""

    processes: int
    pss_mib: float
    cpu_percent: float
    """Of one core."""


def measure(leader: ProcessRef, seconds: float) -> dict[str, Cost]:
    """Cost by process name, of a session without what measures it."""
    members = [member for member in session_members(leader) if member.pid != os.getpid()]
    before = {member: cpu_ticks(member.pid) for member in members}
    began = time.monotonic()
    time.sleep(seconds)
    elapsed = time.monotonic() - began
    parts: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for member, ticks in before.items():
        if member.is_alive():
            percent = 100.0 * (cpu_ticks(member.pid) - ticks) / TICKS_PER_S / elapsed
            parts[name(member.pid)].append((pss_mib(member.pid), percent))
    return {
        key: Cost(len(values), round(sum(pss for pss, _ in values), 1), round(sum(cpu for _, cpu in values), 2))
        for key, values in sorted(parts.items())
    }


def cpu_ticks(pid: int) -> int:
    """User and system time, in clock ticks."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def pss_mib(pid: int) -> float:
    """Proportional set size: shared pages count by share, so that the sum is what the cluster takes."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def name(pid: int) -> str:
    """The process's own name; what is set by Ray is cut at 15 characters by the kernel."""
    return Path(f"/proc/{pid}/comm").read_text().strip()


async def ray_alone(run_dir: RunDir, seconds: float) -> dict[str, Cost]:
    """Ray as we start it, with nothing in it; its Valkey is left out of the answer."""
    run_dir.create()
    children = Children()
    children.start()
    valkey = Valkey(run_dir, children)
    await valkey.start()
    wish = RayWish(
        run_id="footprint",
        redis_url=valkey.url,
        port=free_port(),
        num_cpus=3,
        num_gpus=None,
        object_store_bytes=80 * 1024 * 1024,
        sockets=str(run_dir.make_socket_dir()),
    )
    env = {**os.environ, **package_environment(), **ray_environment(run_dir, wish.run_id)}
    ray = RayNode(run_dir, children, wish, env)
    try:
        await ray.start(sys.executable)
        await asyncio.sleep(SETTLE_S)
        found = await asyncio.to_thread(measure, ProcessRef.of(os.getsid(0)), seconds)
    finally:
        await ray.stop()
        await valkey.stop()
        children.close()
        shutil.rmtree(wish.sockets)
    return {key: cost for key, cost in found.items() if key in RAY_PROCESSES}


def whole_cluster(run_dir: RunDir, file: Path, seconds: float) -> dict[str, Cost]:
    """The cluster of a YAML, after one request."""
    config = load_config(file)
    config = dataclasses.replace(config, router=dataclasses.replace(config.router, port=0))
    launched = launch.start(launch.check(config, run_dir), run_dir)
    try:
        for event in launched.events:
            if event["event"] == "failed":
                raise SystemExit(event["message"])
            if event["event"] == "ready":
                asyncio.run(one_request(event["routers"][0]))
        time.sleep(SETTLE_S)
        return measure(ProcessRef.of(launched.process.pid), seconds)
    finally:
        launch.stop(run_dir, config.drain_s + launch.STOP_MARGIN_S)
        launched.process.wait()


async def one_request(address: str) -> None:
    """Touch what a request touches."""
    request = GenerateRequest(text="The capital of France is", sampling=Sampling(max_tokens=16), deadline_s=60.0)
    async with Client(Endpoint(address=address, api_key=None, tls_ca=None)) as client:
        async for _ in client.generate(request):
            pass


def total(costs: dict[str, Cost]) -> Cost:
    """Of all processes."""
    values = list(costs.values())
    return Cost(
        sum(cost.processes for cost in values),
        round(sum(cost.pss_mib for cost in values), 1),
        round(sum(cost.cpu_percent for cost in values), 2),
    )


def show(title: str, costs: dict[str, Cost]) -> None:
    """One table."""
    print(f"{title:<24} {'processes':>9} {'PSS MiB':>9} {'CPU %':>7}")
    for key, cost in {**costs, "total": total(costs)}.items():
        print(f"  {key:<22} {cost.processes:>9} {cost.pss_mib:>9.1f} {cost.cpu_percent:>7.2f}")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(prog="benchmarks.footprint", description=__doc__.splitlines()[0])
    parser.add_argument("-f", "--config", type=Path, default=launch.default_config_file())
    parser.add_argument("--seconds", type=float, default=30.0, help="quiet time that is measured (default 30)")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if os.getsid(0) != os.getpid():
        os.execvp("setsid", ["setsid", "--wait", sys.executable, "-m", "benchmarks.footprint", *sys.argv[1:]])
    with tempfile.TemporaryDirectory(prefix="pdserve-") as folder:
        alone = asyncio.run(ray_alone(RunDir(Path(folder) / "ray"), given.seconds))
        try:
            whole = whole_cluster(RunDir(Path(folder) / "whole"), given.config, given.seconds)
        except launch.LaunchError as error:
            raise SystemExit(str(error)) from error
    more = round(total(whole).cpu_percent - total(alone).cpu_percent, 2)
    if given.json:
        parts = {"ray_alone": alone, "cluster": whole}
        plain = {part: {key: asdict(cost) for key, cost in costs.items()} for part, costs in parts.items()}
        print(json.dumps({**plain, "pss_mib": total(whole).pss_mib, "cpu_percent_over_ray": more}))
        return
    show("Ray alone", alone)
    show("Cluster, idle", whole)
    print(f"Memory of the whole cluster: {total(whole).pss_mib / 1024:.2f} GiB.")
    print(f"Idle, over Ray alone: {more:.2f} % of a core.")


if __name__ == "__main__":
    main()
