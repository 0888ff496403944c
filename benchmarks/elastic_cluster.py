"""A load that shifts, on a cluster whose pools follow it: paced workers, the real controller, a full budget.

First long prompts with short answers, then short prompts with long answers, and back. What clients saw is told in
windows beside what the pools were, counted twice: by the controller's own book and by the engine processes that ran.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.footprint import name
from benchmarks.pressure_cluster import MODEL
from benchmarks.serve_cluster import Cluster, Say, running
from cluster.client import Client, Endpoint
from cluster.cluster_store import ClusterStore, ClusterStoreError, Decision
from cluster.connect import open_store
from cluster.load import Length, LoadProfile, Planned, RequestRecord, make_plan, run_plan, served_model
from cluster.members import Phase
from cluster.run_dir import ProcessRef, session_members

FIXED_MS, PROMPT_TOKEN_US, TOKEN_US = 10.0, 250.0, 1500.0
"""A slow GPU: 4,000 prompt tokens a second, steps of 10 ms and 1.5 ms more for each stream. Two cores keep up with
it."""
MAX_RUNNING = 48
DECODE_STEP_TOKENS = 256
"""Of a prompt that a decode worker computes itself: a stream that joins waits for no more than that."""
LOOK_EVERY_S = 0.25
WINDOW_S = 5.0
CALM_S = 30.0
"""The end of each phase, in which all must be well again."""
REST_S = 60.0
"""What the last requests may take behind the last phase."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadPhase:
    """One kind of load."""

    name: str
    seconds: float
    rate: float
    prompt: int
    answer: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What is asked of a run."""

    phases: Sequence[LoadPhase]
    max_workers: int
    start: tuple[int, int] = (2, 2)
    """Prefill and decode workers at the beginning."""
    role_change: bool = True
    ttft_slo_s: float = 2.0
    itl_slo_s: float = 0.1
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Look:
    """What the cluster was made of at a moment."""

    at_s: float
    prefill: int
    decode: int
    """Workers that serve in each pool."""
    members: int
    """Workers that are not gone, whatever they do: what counts against the budget."""
    processes: int
    """Engine processes that run."""


@dataclass(frozen=True, slots=True)
class Window:
    """What clients saw in a few seconds; None where nothing happened."""

    at_s: float
    ttft_p99_s: float | None
    itl_p99_s: float | None


@dataclass(slots=True)
class Figures:
    """A whole run."""

    options: Options
    requests: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    gaps: int = 0
    """Answers that do not have as many tokens as were asked for."""
    windows: list[Window] = field(default_factory=list)
    looks: list[Look] = field(default_factory=list)
    decisions: list[tuple[float, Decision]] = field(default_factory=list)
    """With seconds since the load began."""


def shifting(phase_s: float) -> list[LoadPhase]:
    """The default load: three of four workers are needed on one side, then on the other, then on the first again."""
    long = LoadPhase(name="long prompts, short answers", seconds=phase_s, rate=4.2, prompt=2000, answer=32)
    short = LoadPhase(name="short prompts, long answers", seconds=phase_s, rate=4.0, prompt=200, answer=300)
    return [long, short, long]


def cluster_yaml(options: Options) -> dict[str, Any]:
    """The cluster's YAML."""
    pace = {"fixed_ms": FIXED_MS, "prompt_token_us": PROMPT_TOKEN_US, "token_us": TOKEN_US}
    pool = {"device": "cpu", "num_cpus": 0.25, "max_step_tokens": 512, "max_running": MAX_RUNNING, "pace": pace}
    return {
        "mode": "split",
        "model": {"path": str(MODEL), "load_format": "dummy"},
        "cache": {"block_size": 16, "num_blocks": 4096},
        "prefill": {**pool, "workers": options.start[0]},
        "decode": {**pool, "workers": options.start[1], "max_step_tokens": DECODE_STEP_TOKENS},
        "router": {"port": 0},
        "scaling": {
            "mode": "on",
            "interval_s": 2.0,
            "ttft_slo_s": options.ttft_slo_s,
            "itl_slo_s": options.itl_slo_s,
            "max_workers": options.max_workers,
            "grow_pause_s": 5.0,
            "shrink_pause_s": 15.0,
            "role_change": options.role_change,
        },
        "drain_s": 20.0,
        "move_after_s": 5.0,
    }


def measure(options: Options, say: Say, *, start_timeout_s: float = 120.0) -> Figures:
    """Bring the cluster up, load it through all phases, and watch."""
    with running(cluster_yaml(options), say, timeout_s=start_timeout_s, name="elastic") as cluster:
        return asyncio.run(_measure(options, cluster, say))


async def _measure(options: Options, cluster: Cluster, say: Say) -> Figures:
    figures = Figures(options)
    store = open_store(cluster.run_dir)
    async with Client(Endpoint(address=cluster.address)) as client:
        model = await served_model(client)
        plan = planned(options, model.vocab_size)
        begin_at, begin = asyncio.get_running_loop().time() + 1.0, time.time() + 1.0
        watching = asyncio.create_task(_watch(store, cluster, begin_at, figures))
        telling = asyncio.create_task(_tell(options, begin_at, say))
        total_s = sum(phase.seconds for phase in options.phases)
        result = await run_plan(client, plan, limit_s=total_s + REST_S, model=model.name, begin_at=begin_at)
        telling.cancel()
        watching.cancel()
    _account(figures, result.records, [request.request.sampling.max_tokens for request in plan])
    figures.decisions = [(entry.at - begin, entry) for entry in reversed(store.history()) if entry.at >= begin]
    store.close()
    return figures


def planned(options: Options, vocab_size: int) -> list[Planned]:
    """All requests of all phases, when they are due."""
    plan, begin_s = [], 0.0
    for number, phase in enumerate(options.phases):
        profile = LoadProfile(
            rate=phase.rate,
            duration_s=phase.seconds,
            input_len=Length(mean=phase.prompt, spread=phase.prompt // 4),
            output_len=Length(mean=phase.answer, spread=phase.answer // 4),
            seed=options.seed + number,
        )
        plan += [Planned(begin_s + each.due_s, each.request) for each in make_plan(profile, vocab_size)]
        begin_s += phase.seconds
    return plan


async def _watch(store: ClusterStore, cluster: Cluster, begin_at: float, figures: Figures) -> None:
    loop = asyncio.get_running_loop()
    while True:
        look = await asyncio.to_thread(_look, store, cluster, loop.time() - begin_at)
        if look is not None:
            figures.looks.append(look)
        await asyncio.sleep(LOOK_EVERY_S)


def _look(store: ClusterStore, cluster: Cluster, at_s: float) -> Look | None:
    try:
        workers = [member for member in store.members().values() if member.kind == "worker"]
    except ClusterStoreError:
        return None
    serving = [member.pool for member in workers if member.phase is Phase.READY]
    processes = sum(
        name(member.pid).startswith("ray::EngineActo") for member in session_members(ProcessRef.of(cluster.process.pid))
    )
    return Look(at_s, serving.count("prefill"), serving.count("decode"), len(workers), processes)


async def _tell(options: Options, begin_at: float, say: Say) -> None:
    loop, begin_s = asyncio.get_running_loop(), 0.0
    for phase in options.phases:
        await asyncio.sleep(max(0.0, begin_at + begin_s - loop.time()))
        say(f"{begin_s:.0f} s: {phase.name}, {phase.rate:g}/s, {phase.prompt} -> {phase.answer} tokens")
        begin_s += phase.seconds


def _account(figures: Figures, records: Sequence[RequestRecord], wanted: Sequence[int]) -> None:
    figures.requests = len(wanted)
    for record, num_tokens in zip(records, wanted, strict=True):
        if record.failure is not None:
            figures.failures[record.failure] = figures.failures.get(record.failure, 0) + 1
        elif record.num_tokens != num_tokens:
            figures.gaps += 1
    end_s = sum(phase.seconds for phase in figures.options.phases)
    ttfts: dict[int, list[float]] = {}
    itls: dict[int, list[float]] = {}
    for record in records:
        if (ttft_s := record.ttft_s) is not None:
            ttfts.setdefault(int(record.due_s / WINDOW_S), []).append(ttft_s)
        last_s: float | None = None
        for at_s, count in record.arrivals:
            if last_s is not None:
                itls.setdefault(int(at_s / WINDOW_S), []).extend([at_s - last_s, *[0.0] * (count - 1)])
            last_s = at_s
    figures.windows = [
        Window(number * WINDOW_S, p99(ttfts.get(number, [])), p99(itls.get(number, [])))
        for number in range(int(end_s / WINDOW_S))
    ]


def p99(values: Sequence[float]) -> float | None:
    """Their 99th percentile; None of none."""
    if not values:
        return None
    return statistics.quantiles(values, n=100, method="inclusive")[98] if len(values) > 1 else values[0]


@dataclass(frozen=True, slots=True)
class PhaseFigures:
    """One phase in short."""

    name: str
    worst_ttft_s: float
    worst_itl_s: float
    recovered_s: float | None
    """From its beginning until all later windows keep both SLOs; None if the last one does not."""
    calm_ttft_s: float
    calm_itl_s: float
    """The worst p99 of a window in its last `CALM_S`."""
    sizes: str
    """Pools at its end."""


def by_phase(figures: Figures) -> list[PhaseFigures]:
    """A line for each phase."""
    found, begin_s = [], 0.0
    for phase in figures.options.phases:
        end_s = begin_s + phase.seconds
        windows = [window for window in figures.windows if begin_s <= window.at_s < end_s]
        calm = [window for window in windows if window.at_s >= end_s - CALM_S]
        bad = [window for window in windows if not keeps(window, figures.options)]
        last = next((look for look in reversed(figures.looks) if look.at_s < end_s), None)
        recovered_s = bad[-1].at_s + WINDOW_S - begin_s if bad else 0.0
        found.append(
            PhaseFigures(
                phase.name,
                max((window.ttft_p99_s or 0.0 for window in windows), default=0.0),
                max((window.itl_p99_s or 0.0 for window in windows), default=0.0),
                None if recovered_s >= phase.seconds else recovered_s,
                max((window.ttft_p99_s or 0.0 for window in calm), default=0.0),
                max((window.itl_p99_s or 0.0 for window in calm), default=0.0),
                f"{last.prefill}P {last.decode}D" if last else "?",
            )
        )
        begin_s = end_s
    return found


def keeps(window: Window, options: Options) -> bool:
    """Whether both SLOs were kept."""
    return (window.ttft_p99_s or 0.0) <= options.ttft_slo_s and (window.itl_p99_s or 0.0) <= options.itl_slo_s


def problems(figures: Figures) -> list[str]:
    """What was promised and did not hold; empty if all did."""
    options, found = figures.options, []
    if figures.failures or figures.gaps:
        found.append(f"{figures.failures or 'no'} failures, {figures.gaps} answers of another length than asked")
    for what, most in (
        ("members", max((look.members for look in figures.looks), default=0)),
        ("engine processes", max((look.processes for look in figures.looks), default=0)),
    ):
        if most > options.max_workers:
            found.append(f"{most} {what} at once, over the budget of {options.max_workers}")
    found += [
        f"{phase.name}: at the end p99 TTFT {phase.calm_ttft_s:.2f} s, ITL {phase.calm_itl_s * 1e3:.0f} ms: over an SLO"
        for phase in by_phase(figures)
        if phase.calm_ttft_s > options.ttft_slo_s or phase.calm_itl_s > options.itl_slo_s
    ]
    return found


def table(figures: Figures) -> str:
    """As Markdown."""
    options = figures.options
    lines = [
        f"SLOs: p99 TTFT {options.ttft_slo_s:g} s, ITL {options.itl_slo_s * 1e3:g} ms, in windows of {WINDOW_S:g} s; "
        f"budget {options.max_workers} workers, role change {'on' if options.role_change else 'off'}.",
        "",
        "| phase | worst p99 TTFT, s | worst p99 ITL, ms | both kept again after, s | last 30 s: TTFT / ITL | pools |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for phase in by_phase(figures):
        again = "not" if phase.recovered_s is None else f"{phase.recovered_s:.0f}"
        calm = f"{phase.calm_ttft_s:.2f} s / {phase.calm_itl_s * 1e3:.0f} ms"
        worst = f"{phase.worst_ttft_s:.2f} | {phase.worst_itl_s * 1e3:.0f}"
        lines.append(f"| {phase.name} | {worst} | {again} | {calm} | {phase.sizes} |")
    members = max((look.members for look in figures.looks), default=0)
    processes = max((look.processes for look in figures.looks), default=0)
    lines += [
        "",
        f"{figures.requests} requests, {sum(figures.failures.values())} failed, {figures.gaps} of another length than "
        f"asked. At most {members} workers by the controller's book and {processes} engine processes at once.",
        "",
        *(f"- {at_s:.1f} s, {entry.by}: {entry.what}" for at_s, entry in figures.decisions),
    ]
    return "\n".join(lines)


def to_json(figures: Figures) -> str:
    """All of it."""
    return json.dumps(asdict(figures), indent=1)


def plot(figures: Figures, file: Path) -> None:
    """Pools, TTFT and ITL over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    canvas, (pools, ttft, itl) = pyplot.subplots(3, 1, sharex=True, figsize=(10, 8))
    times = [look.at_s for look in figures.looks]
    pools.step(times, [look.prefill for look in figures.looks], where="post", label="prefill workers")
    pools.step(times, [look.decode for look in figures.looks], where="post", label="decode workers")
    members = [look.members for look in figures.looks]
    pools.step(times, members, where="post", label="all, those that start or stop too", linestyle=":", color="grey")
    pools.axhline(figures.options.max_workers, color="red", linewidth=0.8, label="budget")
    moments = [window.at_s + WINDOW_S / 2 for window in figures.windows]
    ttft.plot(moments, [window.ttft_p99_s for window in figures.windows], marker=".", label="p99 TTFT, s")
    ttft.axhline(figures.options.ttft_slo_s, color="red", linewidth=0.8, label="SLO")
    itl.plot(
        moments,
        [None if window.itl_p99_s is None else window.itl_p99_s * 1e3 for window in figures.windows],
        marker=".",
        label="p99 ITL, ms",
    )
    itl.axhline(figures.options.itl_slo_s * 1e3, color="red", linewidth=0.8, label="SLO")
    begin_s = 0.0
    for phase in figures.options.phases:
        for axes in (pools, ttft, itl):
            axes.axvline(begin_s, color="black", linewidth=0.5)
        pools.text(begin_s + 1, figures.options.max_workers + 0.25, phase.name, fontsize=8)
        begin_s += phase.seconds
    pools.set_ylim(0, figures.options.max_workers + 1)
    for axes in (pools, ttft, itl):
        axes.legend(fontsize=8, loc="lower right")
        axes.grid(alpha=0.3)
    itl.set_xlabel("seconds")
    canvas.suptitle("Pools that follow a load that shifts (paced workers: a rehearsal, not a measurement of hardware)")
    canvas.tight_layout()
    canvas.savefig(file, dpi=110)
