"""What a router carries: one-token messages and short answers a second, what it adds to a token's way, memory.

    python -m benchmarks.router [--seconds 5] [--streams 64] [--connections 64] [--json]
    python -m benchmarks.router --only latency

The router is the real one, a process on a core of its own; clients and workers are real gRPC peers that do nothing
else, in a process each on the other cores. A step of a worker is one message with one token for each of its streams.

Rate: one worker has all streams, and takes its next step when the clients have read the step before the last one.
Latency: steps come at a fixed pace, and each token is timed from just before its worker's write to the client that has
read it, over both hops. What is added is that less the same from a bare gRPC server that steps and writes in the
router's place (a difference of quantiles): what the clients themselves take for a burst is in both. Once all streams
are at one worker, whose step is then a burst; once four workers share them, whose steps fall between each other's.

CPU time is of all threads of the router's process, from the first token on. What a core could carry by that is beside
what was reached, for where clients and workers have no cores of their own they are the limit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import router_decisions
from benchmarks.router_clients import ClientsSide, Listened, Load
from benchmarks.router_direct import DirectSide
from benchmarks.router_report import MESSAGES_PER_S, Delay, Latency, Rate, Report, Requests, table
from benchmarks.router_rig import Rig, cores_for, rss_bytes
from benchmarks.router_side import Mode, RouterSide, make_model
from benchmarks.router_worker import Pace, WorkersSide
from benchmarks.transfer_rig import Remote

CALL_TIMEOUT_S = 300.0
WARM_TOKENS = 100
WARM_S = 1.0
SPLIT = {"p0": "prefill", "d0": "decode"}


@dataclass(frozen=True)
class Plan:
    """What to measure with."""

    seconds: float
    """Of each load."""
    streams: int
    connections: int
    """To each router."""
    requests_at_once: int
    idle_streams: int
    messages_per_s: int
    """The rate at which latency is measured."""
    num_workers: int = 4
    """Where latency is measured, after one alone."""
    profile: str = ""


@dataclass(frozen=True)
class Scene:
    """Everything that runs for a measurement."""

    workers: Remote
    clients: Remote
    router_pids: list[int]


@contextlib.contextmanager
def scene(mode: Mode, num_routers: int = 1, num_workers: int = 1, profile: str = "") -> Iterator[Scene]:
    """Workers, routers and clients, warm."""
    roles = SPLIT if mode == "split" else {f"d{index}": "both" for index in range(num_workers)}
    router_cores, load_cores = cores_for(num_routers)
    with tempfile.TemporaryDirectory(prefix="pdserve-") as name, Rig() as rig:
        make_model(Path(name))
        reads, writes = rig.pipe()
        workers, _ = rig.begin("workers", WorkersSide, roles, reads, cores=load_cores)
        addresses = workers.call("start")
        known = {each: (roles[each], address) for each, address in addresses.items()}
        of_routers, pids = [], []
        for index, cores in enumerate(router_cores):
            made = (Path(name), f"router-{index}", mode, profile)
            router, pid = rig.begin(f"router {index}", RouterSide, *made, cores=cores)
            of_routers.append(router.call("start", known))
            pids.append(pid)
        clients, _ = rig.begin("clients", ClientsSide, of_routers, pids, writes, cores=load_cores)
        made_scene = Scene(workers, clients, pids)
        workers.call("set_pace", Pace())
        clients.call("ask", 16 * num_routers, WARM_S, 1, timeout_s=CALL_TIMEOUT_S)
        yield made_scene


@contextlib.contextmanager
def direct_scene(num_groups: int) -> Iterator[Scene]:
    """Clients, and a server that writes to them without a router."""
    server_cores, load_cores = cores_for(1)
    with Rig() as rig:
        reads, writes = rig.pipe()
        server, pid = rig.begin("server", DirectSide, num_groups, reads, cores=server_cores[0])
        address = server.call("start")
        clients, _ = rig.begin("clients", ClientsSide, [address], [pid], writes, cores=load_cores)
        yield Scene(server, clients, [pid])


def measure_rate(plan: Plan, num_routers: int) -> Rate:
    """As many messages as go through; of a bare server, where there are no routers."""
    num_tokens = max(WARM_TOKENS, int(plan.seconds * MESSAGES_PER_S / plan.streams))
    with scene("colocated", num_routers, profile=plan.profile) if num_routers else direct_scene(1) as made:
        made.workers.call("set_pace", Pace(num_streams=plan.streams))
        load = Load(plan.streams, num_tokens, plan.connections, gives_credit=True)
        listened: Listened = made.clients.call("listen", load, timeout_s=CALL_TIMEOUT_S)
    num_messages, one_share, took_s = _summed(listened)
    return Rate(num_routers, num_messages / took_s, one_share, 1e6 * sum(listened.cpu_s) / num_messages)


def measure_latency(plan: Plan, num_workers: int) -> Latency:
    """At a rate that is given, shared by so many workers."""
    with scene("colocated", num_workers=num_workers) as made:
        listened, routed = _delays(plan, made)
    with direct_scene(num_workers) as made:
        direct = _delays(plan, made)[1]
    num_messages, one_share, took_s = _summed(listened)
    return Latency(
        streams_a_step=plan.streams // num_workers,
        messages_per_s=num_messages / took_s,
        one_token_share=one_share,
        cpu_share=listened.cpu_s[0] / took_s,
        routed=routed,
        direct=direct,
    )


def _delays(plan: Plan, made: Scene) -> tuple[Listened, Delay]:
    """At a fixed pace; the first tokens are not counted."""
    step_s = plan.streams / plan.messages_per_s
    num_tokens = max(WARM_TOKENS, int(plan.seconds / step_s)) + WARM_TOKENS
    made.workers.call("set_pace", Pace(num_streams=plan.streams, step_s=step_s))
    load = Load(plan.streams, num_tokens, plan.connections)
    listened: Listened = made.clients.call("listen", load, timeout_s=CALL_TIMEOUT_S)
    sent_at = {worker: times for (worker, _), times in made.workers.call("sent_at").items()}
    taken = [
        came_at - sent_at[heard.worker][offset + index]
        for heard in listened.heard
        for offset, count, came_at in zip(heard.offsets, heard.counts, heard.came_at, strict=True)
        for index in range(count)
        if offset >= WARM_TOKENS
    ]
    return listened, Delay.of(taken)


def _summed(listened: Listened) -> tuple[int, float, float]:
    """Messages, the share of them with one token, and seconds from the first to the last."""
    counts = [count for heard in listened.heard for count in heard.counts]
    began = min(heard.came_at[0] for heard in listened.heard)
    return len(counts), counts.count(1) / len(counts), max(heard.came_at[-1] for heard in listened.heard) - began


def measure_requests(plan: Plan, mode: Mode) -> Requests:
    """Short answers, so many at the same time."""
    profile = plan.profile and f"{plan.profile}.{mode}"
    with scene(mode, profile=profile) as made:
        given = (plan.requests_at_once, plan.seconds, min(plan.connections, plan.requests_at_once))
        num, took_s, spent = made.clients.call("ask", *given, timeout_s=CALL_TIMEOUT_S)
    return Requests(mode, num / took_s, 1e6 * sum(spent) / num)


def measure_memory(plan: Plan) -> float:
    """KiB for each stream that is open and idle."""
    with scene("colocated") as made:
        made.workers.call("set_pace", Pace(hold=True))
        (pid,) = made.router_pids
        before = rss_bytes(pid)
        made.clients.call("open", plan.idle_streams, plan.connections, timeout_s=CALL_TIMEOUT_S)
        grown = rss_bytes(pid) - before
        made.clients.call("leave")
    return grown / plan.idle_streams / 1024


def measure(plan: Plan) -> Report:
    """Everything, one after the other."""
    return Report(
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        rates=[measure_rate(plan, num) for num in (0, 1, 2)],
        latencies=[measure_latency(plan, 1), measure_latency(plan, plan.num_workers)],
        requests=[measure_requests(plan, "colocated"), measure_requests(plan, "split")],
        stream_kib=measure_memory(plan),
        decision_us=max(choices.p50 for choices in router_decisions.measure(1000, 1_000_000).choices),
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each load, at the bound (default 5)")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--connections", type=int, default=64, help="of the clients to each router (default 64)")
    parser.add_argument("--at-once", type=int, default=32, help="requests, where requests are counted (default 32)")
    parser.add_argument("--idle-streams", type=int, default=1000, help="where memory is measured (default 1000)")
    parser.add_argument("--only", choices=("rate", "latency", "requests", "memory"))
    parser.add_argument("--profile", default="", help="a file for cProfile's account: of a rate; FILE.MODE of requests")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(argv)
    plan = Plan(
        given.seconds, given.streams, given.connections, given.at_once, given.idle_streams, MESSAGES_PER_S // 2,
        profile=given.profile,
    )  # fmt: skip
    if given.only:
        for found in _only(plan, given.only):
            print(json.dumps(found) if given.json else found, flush=True)
        return
    report = measure(plan)
    print(json.dumps(asdict(report)) if given.json else f"{report.cores} cores in all.\n\n{table(report)}")


def _only(plan: Plan, what: str) -> list[object]:
    match what:
        case "rate":
            return [asdict(measure_rate(plan, num)) for num in range(2)]
        case "latency":
            return [asdict(measure_latency(plan, num)) for num in (1, plan.num_workers)]
        case "requests":
            return [asdict(measure_requests(plan, "colocated")), asdict(measure_requests(plan, "split"))]
        case _:
            return [measure_memory(plan)]


if __name__ == "__main__":
    main()
