"""Pools that scale on their own, measured.

    python -m benchmarks.elastic --plot elastic.png

starts a real cluster of paced workers under a load that shifts from prompts to answers and back, and watches whether
its pools follow (benchmarks/elastic_cluster.py). It needs a quiet machine of two cores.

    python -m benchmarks.elastic --simulate --trace conversation.jsonl

simulates a split cluster of H200-like workers (the paces of deploy/examples/rehearsal.yaml) under a recorded load in
the Mooncake format, made faster, once as it is and once modulated: days in minutes. The autoscaler that decides is the
cluster's own. See benchmarks/elastic_sim.py for what is simulated and benchmarks/elastic_compare.py for the rivals.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import click

from benchmarks import elastic_cluster
from benchmarks.elastic_compare import Comparison, Result
from benchmarks.elastic_load import Curves, Load, make_load
from benchmarks.elastic_report import as_plain, plot, table
from benchmarks.elastic_sim import Plant
from benchmarks.split_vs_colocated import machine
from cluster.config import ClusterConfig, load_config
from cluster.load_trace import TraceError, read_trace
from cluster.scaling_config import PoolLimits, ScalingConfig

EXAMPLE = Path(__file__).parent.parent / "deploy" / "examples" / "rehearsal.yaml"
SKIP_S = 1800.0
"""The beginning, in which every policy finds its sizes, does not count."""
MODULATED = Curves(daily=0.6, burst=1.5, shift=0.5)
WIDE = PoolLimits(min=1, max=1000)


def simulate(trace: Path, options: dict[str, float], *, json_file: Path | None, plot_file: Path | None) -> None:
    """Compare the policies under both loads, and say what came of it."""
    config, began = load_config(EXAMPLE), time.monotonic()
    assert config.prefill.pace is not None, "the example rehearses"
    assert config.decode.pace is not None, "the example rehearses"
    lines = read_trace(trace)
    plant = _plant(config, options)
    scaling = ScalingConfig(
        mode="on",
        prefill=WIDE,
        decode=WIDE,
        itl_slo_s=plant.itl_slo_s,
        headroom=options["headroom"],
        hysteresis=options["hysteresis"],
    )
    results: dict[str, list[Result]] = {}
    loads: dict[str, Load] = {}
    for name, curves, hours in (
        ("modulated", MODULATED, options["hours"]),
        ("as recorded", Curves(), options["flat_hours"]),
    ):
        loads[name] = make_load(
            lines,
            scale=options["scale"],
            curves=curves,
            duration_s=hours * 3600 + SKIP_S,
            step_s=options["step_s"],
            pace=config.prefill.pace,
            max_tokens=config.model.max_model_len or 32768,
            slo_s=plant.ttft_slo_s,
            seed=int(options["seed"]),
        )
        click.echo(f"{name}: {loads[name].requests.sum():,.0f} requests", err=True)
        compare = Comparison(
            loads[name], plant, scaling, skip_s=SKIP_S, on_progress=lambda text: click.echo(f"  {text}", err=True)
        )
        results[name] = compare.all()
    click.echo(f"`python -m benchmarks.elastic {' '.join(sys.argv[1:])}`, {time.monotonic() - began:.0f} s\n")
    click.echo("\n\n".join(table(name, some) for name, some in results.items()))
    if json_file is not None:
        json_file.write_text(json.dumps({"options": options, "results": as_plain(results)}, indent=1))
    if plot_file is not None:
        plot(plot_file, loads["modulated"], results["modulated"])


def _plant(config: ClusterConfig, options: dict[str, float]) -> Plant:
    assert config.decode.pace is not None, "the example rehearses"
    return Plant(
        decode=config.decode.pace,
        kv_tokens=(config.cache.num_blocks or 0) * config.cache.block_size,
        max_running=config.decode.max_running,
        ttft_slo_s=options["ttft_slo_s"],
        itl_slo_s=options["itl_slo_s"],
        start_s=options["start_s"],
    )


@click.command()
@click.option("--phase", "phase_s", default=100.0, show_default=True, help="Cluster: seconds of each of three phases.")
@click.option("--budget", "max_workers", default=4, show_default=True, help="Cluster: scaling.max_workers.")
@click.option("--start-with", default="2,2", show_default=True, help="Cluster: prefill and decode workers at first.")
@click.option("--role-change/--no-role-change", default=True, help="Cluster: scaling.role_change.")
@click.option("--simulate", "simulated", is_flag=True, help="Queues of fluid instead of a cluster.")
@click.option("--trace", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Mooncake format.")
@click.option("--scale", default=100.0, show_default=True, help="How many times the trace's rate.")
@click.option("--hours", default=24.0, show_default=True, help="Simulated, of the modulated load.")
@click.option("--flat-hours", default=6.0, show_default=True, help="Simulated, of the load as it was recorded.")
@click.option("--step", "step_s", default=2.0, show_default=True, help="Seconds of a step.")
@click.option("--ttft-slo", "ttft_slo_s", default=2.0, show_default=True, help="Seconds.")
@click.option("--itl-slo", "itl_slo_s", default=0.03, show_default=True, help="Seconds.")
@click.option("--start", "start_s", default=60.0, show_default=True, help="Seconds until a new worker is ready.")
@click.option("--headroom", default=0.04, show_default=True, help="scaling.headroom")
@click.option("--hysteresis", default=0.05, show_default=True, help="scaling.hysteresis")
@click.option("--seed", default=1, show_default=True)
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures there.")
@click.option("--plot", "plot_file", type=click.Path(dir_okay=False, path_type=Path), help="Needs matplotlib.")
def main(
    phase_s: float,
    max_workers: int,
    start_with: str,
    role_change: bool,
    simulated: bool,
    trace: Path | None,
    json_file: Path | None,
    plot_file: Path | None,
    **options: float,
) -> None:
    """Measure pools that scale on their own."""
    if not simulated:
        prefill, _, decode = start_with.partition(",")
        asked = elastic_cluster.Options(
            phases=elastic_cluster.shifting(phase_s),
            max_workers=max_workers,
            start=(int(prefill), int(decode)),
            role_change=role_change,
            seed=int(options["seed"]),
        )
        sys.exit(run_cluster(asked, json_file=json_file, plot_file=plot_file))
    if trace is None:
        raise click.UsageError("--simulate needs --trace FILE")
    try:
        simulate(trace, options, json_file=json_file, plot_file=plot_file)
    except TraceError as error:
        raise click.ClickException(str(error)) from error


def run_cluster(asked: elastic_cluster.Options, *, json_file: Path | None, plot_file: Path | None) -> int:
    """Measure a real cluster; 1 if something that was promised did not hold."""
    figures = elastic_cluster.measure(asked, lambda text: click.echo(text, err=True))
    arguments = " ".join(["-m benchmarks.elastic", *sys.argv[1:]])
    click.echo(f"`python {arguments}`, {time.strftime('%Y-%m-%d %H:%M')}, {machine()}\n")
    click.echo(elastic_cluster.table(figures))
    if json_file is not None:
        json_file.write_text(elastic_cluster.to_json(figures))
    if plot_file is not None:
        elastic_cluster.plot(figures, plot_file)
    for problem in elastic_cluster.problems(figures):
        click.echo(f"NOT KEPT: {problem}")
    return 1 if elastic_cluster.problems(figures) else 0


if __name__ == "__main__":
    main()
