"""What a router carries: one-token messages and short answers a second, what it adds to a token's way, memory.

    python -m benchmarks.router [--seconds 5] [--streams 64] [--connections 64] [--json]
    python -m benchmarks.router --only latency

The router is the real one, a process on a core of its own; clients and workers are real gRPC peers that do nothing
else, in a process each on the other cores. A step of a worker is one message with one token for each of its streams.

Rate: one worker has all streams, and takes its next step when the clients have read the step before the last one.
Latency: steps come at a fixed pace, and each token is timed from just before its worker's write to the client that has
read it, over both hops, with nothing taken off; once with all streams at one worker, whose step is then a burst, and
once shared by four whose steps fall between each other's. CPU time is of all threads of the router's process, from the
first token on; what a core could carry by that is beside what was reached, for where clients and workers have no cores
of their own they are the limit.
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
from benchmarks.router_rig import Rig, cores_for, rss_bytes
from benchmarks.router_side import Mode, RouterSide, make_model
from benchmarks.router_worker import Pace, WorkersSide
from benchmarks.transfer_rig import Remote

MESSAGES_PER_S = 20_000
"""The bound for one router on one core; latency is measured at half of it."""
P50_MS, P99_MS = 1.0, 5.0
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
class Rate:
    """Tokens of long streams."""

    routers: int
    messages_per_s: float
    one_token_share: float
    """Of all messages."""
    cpu_us: float
    """Of the routers, for each message."""

    @property
    def per_core_s(self) -> float:
        """Messages that a second of one core carries."""
        return 1e6 / self.cpu_us


@dataclass(frozen=True)
class Latency:
    """From a worker's write to the client's read, milliseconds."""

    streams_a_step: int
    messages_per_s: float
    p50_ms: float
    p99_ms: float
    one_token_share: float
    cpu_share: float
    """Of the router's core that was used."""


@dataclass(frozen=True)
class Requests:
    """Answers of two tokens."""

    mode: str
    requests_per_s: float
    cpu_us: float
    """Of the router, for each request."""


@dataclass(frozen=True)
class Report:
    """Everything that was measured."""

    cores: int
    rates: list[Rate]
    latencies: list[Latency]
    requests: list[Requests]
    stream_kib: float
    """Resident memory of the router for each open stream."""
    decision_us: float
    """The median, with all kinds of prompts of 1,000 workers; the worst of the kinds."""


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


def measure_rate(plan: Plan, num_routers: int) -> Rate:
    """As many messages as go through."""
    num_tokens = max(WARM_TOKENS, int(plan.seconds * MESSAGES_PER_S / plan.streams))
    with scene("colocated", num_routers, profile=plan.profile) as made:
        made.workers.call("set_pace", Pace(num_streams=plan.streams))
        load = Load(plan.streams, num_tokens, plan.connections, gives_credit=True)
        listened: Listened = made.clients.call("listen", load, timeout_s=CALL_TIMEOUT_S)
    num_messages, one_share, took_s = _summed(listened)
    return Rate(num_routers, num_messages / took_s, one_share, 1e6 * sum(listened.cpu_s) / num_messages)


def measure_latency(plan: Plan, num_workers: int) -> Latency:
    """At a rate that is given, shared by so many workers."""
    step_s = plan.streams / plan.messages_per_s
    num_tokens = max(WARM_TOKENS, int(plan.seconds / step_s)) + WARM_TOKENS
    with scene("colocated", num_workers=num_workers) as made:
        made.workers.call("set_pace", Pace(num_streams=plan.streams, step_s=step_s))
        load = Load(plan.streams, num_tokens, plan.connections)
        listened: Listened = made.clients.call("listen", load, timeout_s=CALL_TIMEOUT_S)
        sent_at = {worker: times for (worker, _), times in made.workers.call("sent_at").items()}
    num_messages, one_share, took_s = _summed(listened)
    taken = sorted(
        came_at - sent_at[heard.worker][offset + index]
        for heard in listened.heard
        for offset, count, came_at in zip(heard.offsets, heard.counts, heard.came_at, strict=True)
        for index in range(count)
        if offset >= WARM_TOKENS
    )
    p50, p99 = (1e3 * taken[int(share * len(taken))] for share in (0.5, 0.99))
    streams_a_step = plan.streams // num_workers
    return Latency(streams_a_step, num_messages / took_s, p50, p99, one_share, listened.cpu_s[0] / took_s)


def _summed(listened: Listened) -> tuple[int, float, float]:
    """Messages, the share of them with one token, and seconds from the first to the last."""
    counts = [count for heard in listened.heard for count in heard.counts]
    began = min(heard.came_at[0] for heard in listened.heard)
    return len(counts), counts.count(1) / len(counts), max(heard.came_at[-1] for heard in listened.heard) - began


def measure_requests(plan: Plan, mode: Mode) -> Requests:
    """Short answers, so many at the same time."""
    with scene(mode) as made:
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
        rates=[measure_rate(plan, 1), measure_rate(plan, 2)],
        latencies=[measure_latency(plan, 1), measure_latency(plan, plan.num_workers)],
        requests=[measure_requests(plan, "colocated"), measure_requests(plan, "split")],
        stream_kib=measure_memory(plan),
        decision_us=max(choices.p50 for choices in router_decisions.measure(1000, 1_000_000).choices),
    )


def table(report: Report) -> str:
    """Markdown."""
    lines = [
        "| measured | reached | router's CPU | by that, per core-second | bound |",
        "|---|---:|---:|---:|---:|",
    ]
    for rate in report.rates:
        which = "1 router" if rate.routers == 1 else f"{rate.routers} routers at once"
        lines.append(
            f"| messages/s, {which}, {rate.one_token_share:.1%} of one token | {rate.messages_per_s:,.0f} "
            f"| {rate.cpu_us:.1f} µs each | {rate.per_core_s:,.0f} | {rate.routers * MESSAGES_PER_S:,} |"
        )
    for late in report.latencies:
        pace = f"{late.messages_per_s:,.0f} messages/s, {late.streams_a_step} a step"
        for name, value, bound in (("p50", late.p50_ms, P50_MS), ("p99", late.p99_ms, P99_MS)):
            share = f"{late.cpu_share:.0%} of a core"
            lines.append(
                f"| worker's write to client's read, {pace}: {name} | {value:.2f} ms | {share} | | {bound:g} ms |"
            )
    for requests in report.requests:
        lines.append(
            f"| requests/s of 2 tokens, {requests.mode} | {requests.requests_per_s:,.0f} "
            f"| {requests.cpu_us:,.0f} µs each | {1e6 / requests.cpu_us:,.0f} | |"
        )
    lines.append(f"| memory for each open stream | {report.stream_kib:.0f} KiB | | | |")
    bound = f"{router_decisions.TARGET_US:.0f} µs"
    lines.append(f"| a choice among 1,000 workers, p50 | {report.decision_us:.0f} µs | | | {bound} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each load, at the bound (default 5)")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--connections", type=int, default=64, help="of the clients to each router (default 64)")
    parser.add_argument("--at-once", type=int, default=32, help="requests, where requests are counted (default 32)")
    parser.add_argument("--idle-streams", type=int, default=1000, help="where memory is measured (default 1000)")
    parser.add_argument("--only", choices=("rate", "latency", "requests", "memory"))
    parser.add_argument("--profile", default="", help="a file for cProfile's account of the rate of one router")
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
            return [asdict(measure_rate(plan, 1))]
        case "latency":
            return [asdict(measure_latency(plan, num)) for num in (1, plan.num_workers)]
        case "requests":
            return [asdict(measure_requests(plan, "colocated")), asdict(measure_requests(plan, "split"))]
        case _:
            return [measure_memory(plan)]


if __name__ == "__main__":
    main()
