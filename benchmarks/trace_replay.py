"""A recorded trace on one cluster, policy by policy: what is computed, how soon it answers.

Starts a cluster of two prefill and two decode workers for each policy in turn (in a run directory of its own), and
replays the same requests of a trace in the Mooncake format against it, at the trace's own times. What was computed is
told by the workers' own counters; beside it stands what a cache that forgets nothing would leave to compute.

    python -m benchmarks.trace_replay conversation.jsonl
    python -m benchmarks.trace_replay conversation.jsonl --model DIRECTORY --duration 60 --trace-sample 10% --json
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import yaml

from benchmarks.multi_turn import POLICIES, computed_tokens
from benchmarks.split_vs_colocated import EXAMPLE, Running, machine, running
from cluster.client import Client
from cluster.load_report import LoadReport, Slo, Spread, summarise
from cluster.load_trace import Sample, Selection, TraceFigures, TraceProfile, read_trace, run_trace, select, trace_rows


@dataclass(frozen=True)
class Figures:
    """Of one policy."""

    trace: TraceFigures
    report: LoadReport
    computed_tokens: int
    """Of prompts, by all workers."""
    local_tokens: int
    """Of these, by decode workers."""


async def measure(cluster: Running, selection: Selection, profile: TraceProfile) -> Figures:
    """Replay the selection, and read the counters before and behind."""
    before = await asyncio.to_thread(computed_tokens, cluster.run_dir)
    async with Client(cluster.endpoint) as client:
        result, trace = await run_trace(client, selection, profile)
    after = await asyncio.to_thread(computed_tokens, cluster.run_dir)
    computed = {pool: after[pool] - before[pool] for pool in after}
    return Figures(trace, summarise(result, Slo()), sum(computed.values()), computed["decode"])


def table(figures: dict[str, Figures]) -> str:
    """As Markdown; latencies in ms."""
    lines = ["| policy | answered | prompt tokens | computed | by decode workers | TTFT p50 / p99 | ITL p50 / p99 |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|")
    for name, one in figures.items():
        report = one.report
        answered = f"{report.num_completed} of {report.num_requests}"
        counts = f"{report.prompt_tokens:,} | {one.computed_tokens:,} | {one.local_tokens:,}"
        lines.append(f"| {name} | {answered} | {counts} | {_ms(report.ttft_s)} | {_ms(report.itl_s)} |")
    for trace in [one.trace for one in figures.values()][:1]:
        best = round(trace.prompt_tokens * (1 - trace.best_cached_share))
        lines.append(f"| a cache that forgets nothing | – | {trace.prompt_tokens:,} | {best:,} | – | – | – |")
    return "\n".join(lines)


def _ms(spread: Spread | None) -> str:
    return "–" if spread is None else f"{spread.p50 * 1e3:.1f} / {spread.p99 * 1e3:.1f}"


@click.command()
@click.argument("trace", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("-f", "--config", type=click.Path(exists=True, path_type=Path), default=EXAMPLE)
@click.option("--model", help="Another model than the YAML's; of a config.json alone weights are made up.")
@click.option("--policies", default="kv_aware,round_robin", show_default=True, help="Some of: " + "; ".join(POLICIES))
@click.option("--duration", "duration_s", type=float, default=60.0, show_default=True, help="Seconds, after scaling.")
@click.option("--trace-sample", "sample", default="100%", show_default=True, help="Requests, or a share.")
@click.option("--time-scale", type=float, default=1.0, show_default=True)
@click.option("--length-scale", type=int, default=64, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of Markdown.")
def main(
    trace: Path, config: Path, model: str | None, policies: str, sample: str, as_json: bool, **scaling: Any
) -> None:
    """Measure each policy under the same requests of TRACE."""
    try:
        profile = TraceProfile(sample=Sample.parse(sample), **scaling)
        selection = select(read_trace(trace), profile)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    base = yaml.safe_load(config.read_text())
    base["prefill"]["workers"] = base["decode"]["workers"] = 2
    if model is not None:
        base["model"] = {"path": model, "load_format": "dummy", "dtype": "float32"}
    figures: dict[str, Figures] = {}
    for name in (each.strip() for each in policies.split(",") if each.strip()):
        with running({**base, "router": {"port": 0, **POLICIES[name]}}) as cluster:
            click.echo(f"{name}: replaying at {cluster.endpoint.address}", err=True)
            figures[name] = asyncio.run(measure(cluster, selection, profile))
    _print(figures, profile, as_json)


def _print(figures: dict[str, Figures], profile: TraceProfile, as_json: bool) -> None:
    date = time.strftime("%Y-%m-%d")
    if as_json:
        reports = {name: asdict(one) for name, one in figures.items()}
        click.echo(json.dumps({"date": date, "machine": machine(), "profile": asdict(profile), "figures": reports}))
        return
    click.echo(f"`python -m benchmarks.trace_replay {' '.join(sys.argv[1:])}`, {date}, {machine()}\n")
    for one in list(figures.values())[:1]:
        click.echo("; ".join(f"{name}: {text}" for name, text in trace_rows(one.trace, profile)) + "\n")
    click.echo(table(figures))


if __name__ == "__main__":
    main()
