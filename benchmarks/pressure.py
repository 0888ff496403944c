"""A router under pressure: ten times more requests than can be served, and clients that misbehave.

Workers are paced (see engine/pace.py), so that the cluster's capacity is known and two cores have room for it, for the
router and for the clients. Each section starts a cluster of its own.

overload  finds the peak goodput with a closed loop, then offers ten times as much for --seconds: what is still answered
          whole within its deadline, how fast the others are refused, and what is left behind.
clients   32 streams are read all the time; by turns nothing else happens, and one client stops reading while 100 vanish
          (their connections are reset at random moments): what the 32 feel of it.

    python -m benchmarks.pressure
    python -m benchmarks.pressure --sections overload --seconds 60 --json
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import click

from benchmarks.pressure_clients import Asked, LoopJob, Outcome, Processes, run_loop, whole
from benchmarks.pressure_cluster import Target, paced_yaml, target_of
from benchmarks.pressure_crowd import SteadyJob, Trouble, TroubleJob, run_steady, run_trouble
from benchmarks.serve_cluster import running
from benchmarks.split_vs_colocated import machine
from cluster.load_report import Spread, percentile

SECTIONS = ("overload", "clients")
START_TIMEOUT_S = 240.0
HEAD_START_S = 1.0
SETTLE_S = 2.0
EMPTY_TIMEOUT_S = 30.0
ANSWER_GRACE_S = 60.0
QUIET_SHARE = 0.05
"""Of the overload, sent by a process that does little else: its timestamps are the honest ones."""
GOODPUT_BOUND, REFUSAL_BOUND_MS, ITL_BOUND = 0.90, 10.0, 1.05
STEADY_PROMPT, STEADY_OUTPUT = 16, 30_000


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much pressure, and on what."""

    seconds: float = 60.0
    peak_s: float = 12.0
    times: float = 10.0
    deadline_s: float = 4.0
    prompt_len: int = 32
    output_len: int = 32
    decode_workers: int = 1
    at_once: int = 16
    step_ms: float = 25.0
    max_queued: int | None = None
    streams: int = 32
    vanishing: int = 100
    phase_s: float = 15.0
    turns: int = 2
    settle_s: float = 15.0
    """Of the streams, before the first phase: a cluster that has just started is still busy with itself."""

    def router(self) -> dict[str, Any]:
        """The router's section of the YAML: its defaults, but for what was asked."""
        return {} if self.max_queued is None else {"max_queued": self.max_queued}


@dataclass(frozen=True, kw_only=True)
class Overload:
    """Figures of a section."""

    peak_per_s: float
    offered_per_s: float
    goodput_per_s: float
    goodput_of_peak: float
    outcomes: dict[str, int]
    messages: dict[str, str]
    """What the first request of each end was told."""
    goodput_by_priority: dict[int, float]
    """Share answered whole of what was sent with each priority."""
    refusal_ms: Spread | None
    """From sending to the status, all clients."""
    quiet_refusal_ms: Spread | None
    """The same, seen by the process that does little else."""
    with_retry_info: float | None
    """Share of refusals."""
    client_lag_ms_p99: tuple[float, float]
    """How late the busy process was, and the quiet one."""
    router_rss_mib: tuple[float, float, float]
    """Before, at the end of the overload, and when everything was over."""
    left_behind: list[str]


@dataclass(frozen=True, kw_only=True)
class Crowd:
    """Figures of the other."""

    alone_itl_ms: Spread
    beside_itl_ms: Spread
    ratio_p50: float
    ratio_p99: float
    phases_p99_ms: list[float]
    """Of each phase in order: alone, beside, alone, ..."""
    trouble: list[Trouble]
    client_lag_ms_p99: float
    failures: list[str]
    left_behind: list[str]


def overload(target: Target, processes: Processes, plan: Plan) -> Overload:
    """Find the peak, then offer more."""
    asked = Asked(prompt_len=plan.prompt_len, output_len=plan.output_len, deadline_s=plan.deadline_s)
    slots = plan.at_once * plan.decode_workers
    closed = _loop(target, asked, plan.peak_s, concurrency=2 * slots)
    found = processes.submit(run_loop, closed).result(plan.peak_s + ANSWER_GRACE_S).outcomes
    since, until = closed.begin_at + min(SETTLE_S, plan.peak_s / 4), closed.begin_at + plan.peak_s
    peak = len(whole(found, since, until, plan.deadline_s)) / (until - since)
    if not peak:
        raise click.ClickException(f"no request was answered whole within {plan.deadline_s:g} s: is the machine busy?")
    target.left_behind(EMPTY_TIMEOUT_S)
    before = target.router_rss_mib()
    asked = Asked(
        prompt_len=plan.prompt_len, output_len=plan.output_len, deadline_s=plan.deadline_s, priorities=(-1, 0, 0, 1)
    )
    rate = plan.times * peak
    busy = _loop(target, asked, plan.seconds, rate=rate * (1 - QUIET_SHARE), seed=1)
    still = _loop(target, asked, plan.seconds, rate=rate * QUIET_SHARE, seed=2, begin_at=busy.begin_at)
    futures = [processes.submit(run_loop, job) for job in (busy, still)]
    time.sleep(max(0.0, busy.begin_at + plan.seconds - time.monotonic()))
    during = target.router_rss_mib()
    seen = [future.result(plan.deadline_s + ANSWER_GRACE_S) for future in futures]
    left = target.left_behind(EMPTY_TIMEOUT_S)
    outcomes = [outcome for each in seen for outcome in each.outcomes]
    since, until = busy.begin_at + min(plan.deadline_s, plan.seconds / 4), busy.begin_at + plan.seconds
    good = len(whole(outcomes, since, until, plan.deadline_s)) / (until - since)
    refused = [each for each in outcomes if each.is_refusal]
    return Overload(
        peak_per_s=peak,
        offered_per_s=len(outcomes) / plan.seconds,
        goodput_per_s=good,
        goodput_of_peak=good / peak,
        outcomes=dict(Counter(each.code for each in outcomes)),
        messages={each.code: each.message for each in reversed(outcomes) if each.message},
        goodput_by_priority=_by_priority(outcomes),
        refusal_ms=_refusals_ms(outcomes),
        quiet_refusal_ms=_refusals_ms(seen[1].outcomes),
        with_retry_info=sum(each.has_retry_info for each in refused) / len(refused) if refused else None,
        client_lag_ms_p99=(_p99_ms(seen[0].lags_s), _p99_ms(seen[1].lags_s)),
        router_rss_mib=(before, during, target.router_rss_mib()),
        left_behind=left,
    )


def _loop(target: Target, asked: Asked, seconds: float, *, begin_at: float | None = None, **kind: Any) -> LoopJob:
    begin_at = begin_at or time.monotonic() + HEAD_START_S
    return LoopJob(address=target.address, asked=asked, begin_at=begin_at, seconds=seconds, **kind)


def _refusals_ms(outcomes: Iterable[Outcome]) -> Spread | None:
    return Spread.of((each.ended - each.sent) * 1e3 for each in outcomes if each.is_refusal)


def _by_priority(outcomes: Iterable[Outcome]) -> dict[int, float]:
    sent, answered = Counter[int](), Counter[int]()
    for each in outcomes:
        sent[each.priority] += 1
        answered[each.priority] += each.code == "OK"
    return {priority: answered[priority] / sent[priority] for priority in sorted(sent)}


def _p99_ms(seconds: Iterable[float]) -> float:
    return percentile(sorted(seconds), 99) * 1e3


def clients(target: Target, processes: Processes, plan: Plan) -> Crowd:
    """Phases by turns, on one set of streams."""
    total_s = plan.settle_s + 2 * plan.turns * plan.phase_s
    begin_at = time.monotonic() + HEAD_START_S
    until = begin_at + total_s
    steady = Asked(prompt_len=STEADY_PROMPT, output_len=STEADY_OUTPUT, deadline_s=total_s + ANSWER_GRACE_S)
    job = SteadyJob(address=target.address, asked=steady, streams=plan.streams, until=until)
    streams = processes.submit(run_steady, job)
    begins = [begin_at + plan.settle_s + number * plan.phase_s for number in range(2 * plan.turns)]
    trouble = []
    for number, begin in enumerate(begins[1::2]):
        beside = TroubleJob(
            address=target.address,
            asked=Asked(prompt_len=plan.prompt_len, output_len=STEADY_OUTPUT, deadline_s=total_s),
            begin_at=begin,
            seconds=plan.phase_s,
            vanishing=plan.vanishing,
            longest_stay_s=min(1.5, plan.phase_s / 2),
            seed=number,
        )
        trouble.append(processes.submit(run_trouble, beside))
    seen = streams.result(total_s + ANSWER_GRACE_S)
    did = [future.result(ANSWER_GRACE_S) for future in trouble]
    left = target.left_behind(EMPTY_TIMEOUT_S)
    phases = [gaps_ms(seen.arrivals, begin, begin + plan.phase_s) for begin in begins]
    alone, beside_ms = (Spread.of(itertools.chain(*phases[first::2])) for first in (0, 1))
    if alone is None or beside_ms is None:
        raise click.ClickException(f"no stream was read: {'; '.join(seen.failures[:3])}")
    return Crowd(
        alone_itl_ms=alone,
        beside_itl_ms=beside_ms,
        ratio_p50=beside_ms.p50 / alone.p50,
        ratio_p99=beside_ms.p99 / alone.p99,
        phases_p99_ms=[percentile(sorted(gaps), 99) for gaps in phases if gaps],
        trouble=did,
        client_lag_ms_p99=_p99_ms(seen.lags_s),
        failures=seen.failures,
        left_behind=left,
    )


def gaps_ms(arrivals: Iterable[list[float]], since: float, until: float) -> list[float]:
    """Gaps between tokens that lie within two moments."""
    return [
        (later - earlier) * 1e3
        for moments in arrivals
        for earlier, later in itertools.pairwise(moments)
        if since <= earlier and later < until
    ]


def overload_table(figures: Overload) -> str:
    """As Markdown."""
    retry = "-" if figures.with_retry_info is None else f"{figures.with_retry_info:.1%}"
    rows = [
        ("peak goodput, requests/s", f"{figures.peak_per_s:.1f}", ""),
        ("offered, requests/s", f"{figures.offered_per_s:.1f}", ""),
        ("goodput under it, requests/s", f"{figures.goodput_per_s:.1f}", ""),
        ("of peak", f"{figures.goodput_of_peak:.2f}", f"at least {GOODPUT_BOUND:.2f}"),
        ("ends", ", ".join(f"{count} {code}" for code, count in sorted(figures.outcomes.items())), ""),
        ("answered by priority", ", ".join(f"{p}: {s:.1%}" for p, s in figures.goodput_by_priority.items()), ""),
        ("refusal p50 / p99, ms", _pair(figures.refusal_ms), ""),
        ("refusal p50 / p99, ms, by a quiet client", _pair(figures.quiet_refusal_ms), f"p99 {REFUSAL_BOUND_MS:g}"),
        ("the clients' own lag p99, ms, busy / quiet", " / ".join(f"{x:.1f}" for x in figures.client_lag_ms_p99), ""),
        ("refusals with RetryInfo", retry, "100 %"),
        (
            "router's memory, MiB: before / under load / after",
            " / ".join(f"{x:.0f}" for x in figures.router_rss_mib),
            "",
        ),
        ("left behind", "; ".join(figures.left_behind) or "nothing", "nothing"),
    ]
    return _markdown(rows)


def clients_table(figures: Crowd) -> str:
    """As Markdown."""
    did = figures.trouble
    before, within = sum(x.vanished_before_tokens for x in did), sum(x.vanished_within_stream for x in did)
    rows = [
        ("ITL p50 / p99, ms, alone", _pair(figures.alone_itl_ms), ""),
        ("ITL p50 / p99, ms, beside the others", _pair(figures.beside_itl_ms), ""),
        ("ratio p50 / p99", f"{figures.ratio_p50:.3f} / {figures.ratio_p99:.3f}", f"p99 at most {ITL_BOUND:.2f}"),
        ("p99 of each phase, ms", " / ".join(f"{x:.2f}" for x in figures.phases_p99_ms), ""),
        ("vanished before their first token / within the stream", f"{before} / {within}", ""),
        ("stopped reading", str(sum(x.stopped_reading for x in did)), ""),
        ("the readers' own lag p99, ms", f"{figures.client_lag_ms_p99:.1f}", ""),
        ("steady streams that failed", "; ".join(figures.failures) or "none", "none"),
        ("left behind", "; ".join(figures.left_behind) or "nothing", "nothing"),
    ]
    return _markdown(rows)


def _pair(spread: Spread | None) -> str:
    return "-" if spread is None else f"{spread.p50:.2f} / {spread.p99:.2f}"


def _markdown(rows: list[tuple[str, str, str]]) -> str:
    lines = ["| figure | measured | bound |", "|---|---:|---|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def measure(section: str, plan: Plan) -> Overload | Crowd:
    """One section on a cluster of its own."""
    at_once = plan.at_once if section == "overload" else 2 * plan.streams
    workers = plan.decode_workers if section == "overload" else 1
    content = paced_yaml(step_ms=plan.step_ms, at_once=at_once, decode_workers=workers, router=plan.router())
    with Processes(2) as processes, running(content, _say, timeout_s=START_TIMEOUT_S, name=section) as cluster:
        return (overload if section == "overload" else clients)(target_of(cluster), processes, plan)


def _say(text: str) -> None:
    click.echo(text, err=True)


@click.command()
@click.option("--sections", default=",".join(SECTIONS), show_default=True)
@click.option("--seconds", type=float, default=60.0, show_default=True, help="Of overload.")
@click.option("--peak-s", type=float, default=12.0, show_default=True, help="Of the closed loop before it.")
@click.option("--times", type=float, default=10.0, show_default=True, help="Offered, of the peak.")
@click.option("--deadline-s", type=float, default=4.0, show_default=True)
@click.option("--prompt-len", type=int, default=32, show_default=True)
@click.option("--output-len", type=int, default=32, show_default=True)
@click.option("--decode-workers", type=int, default=1, show_default=True)
@click.option("--at-once", type=int, default=16, show_default=True, help="Streams that a decode worker takes.")
@click.option("--step-ms", type=float, default=25.0, show_default=True, help="Of a decode step.")
@click.option("--max-queued", type=int, help="Of the router. Default: the router's.")
@click.option("--streams", type=int, default=32, show_default=True, help="That are read all the time.")
@click.option("--vanishing", type=int, default=100, show_default=True, help="Clients that vanish, each turn.")
@click.option("--phase-s", type=float, default=15.0, show_default=True)
@click.option("--settle-s", type=float, default=15.0, show_default=True, help="Before the first phase.")
@click.option("--turns", type=int, default=2, show_default=True, help="Of alone and beside the others.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of Markdown.")
def main(sections: str, as_json: bool, **options: Any) -> None:
    """Put a paced cluster under pressure."""
    plan = Plan(**options)
    wanted = [name.strip() for name in sections.split(",") if name.strip()]
    if unknown := set(wanted) - set(SECTIONS):
        raise click.UsageError(f"no section is called {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    figures = {section: measure(section, plan) for section in wanted}
    date = time.strftime("%Y-%m-%d")
    if as_json:
        found = {section: asdict(each) for section, each in figures.items()}
        about = {"date": date, "machine": machine(), "paced": True, "plan": asdict(plan)}
        click.echo(json.dumps({**about, "figures": found}))
        return
    click.echo(f"`python -m benchmarks.pressure {' '.join(sys.argv[1:])}`, {date}, {machine()}; workers are paced")
    for section, each in figures.items():
        table = overload_table(each) if isinstance(each, Overload) else clients_table(each)
        click.echo(f"\n**{section}**\n\n{table}")


if __name__ == "__main__":
    main()
