"""The same load on a split cluster and on colocated ones, side by side.

Starts each cluster in turn from one YAML (in a run directory of its own, so that no other cluster is
disturbed), sends it the same prompts through `cluster.load`, and prints a Markdown table. "Hidden" is the
share of the KV transfer's time that prefill covered. A colocated cluster of one worker has half the
processes of 1 prefill + 1 decode; the one of two workers has the same number.

    python -m benchmarks.split_vs_colocated
    python -m benchmarks.split_vs_colocated --rate 1 --requests 60 --input-len 512,128 --json
"""

from __future__ import annotations

import asyncio
import copy
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import yaml

from cluster.client import Client, Endpoint
from cluster.load import Length, LoadProfile, run_load
from cluster.load_report import LoadReport, Slo, markdown_table, summarise
from cluster.run_dir import RunDir

EXAMPLE = Path(__file__).parents[1] / "deploy" / "examples" / "cpu-demo.yaml"
UP_TIMEOUT_S = 300.0
DOWN_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Variant:
    """One cluster to measure: what of the YAML is changed."""

    name: str
    mode: str
    prefill_workers: int
    decode_workers: int

    def config(self, base: dict[str, Any]) -> dict[str, Any]:
        """The YAML's content with this variant's pools, on free ports."""
        config = copy.deepcopy(base)
        config["mode"] = self.mode
        config.setdefault("prefill", {})["workers"] = self.prefill_workers
        config.setdefault("decode", {})["workers"] = self.decode_workers
        config.setdefault("router", {})["port"] = 0
        return config


VARIANTS = (
    Variant("split 1P1D", "split", 1, 1),
    Variant("colocated, 1 worker", "colocated", 1, 1),
    Variant("colocated, 2 workers", "colocated", 1, 2),
)


@dataclass(frozen=True)
class Running:
    """A cluster that is up."""

    endpoint: Endpoint
    run_dir: RunDir


@contextmanager
def running(config: dict[str, Any]) -> Iterator[Running]:
    """A cluster of that configuration, for as long as the context lasts."""
    with tempfile.TemporaryDirectory(prefix="pdserve-bench-") as folder:
        file, run_dir = Path(folder) / "cluster.yaml", Path(folder) / "run"
        file.write_text(yaml.safe_dump(config))
        environment = {**os.environ, "PDSERVE_RUN_DIR": str(run_dir)}
        try:
            pdserve(["up", "-f", str(file)], environment, UP_TIMEOUT_S)
            state = RunDir(run_dir).running()
            assert state is not None, "`pdserve up` succeeded, so a cluster runs"
            yield Running(Endpoint(address=state.routers[0]), RunDir(run_dir))
        finally:
            pdserve(["down"], environment, DOWN_TIMEOUT_S)


def pdserve(arguments: list[str], environment: dict[str, str], timeout_s: float) -> None:
    """Run the console command; its output goes to stderr."""
    command = [sys.executable, "-c", "from cluster.cli import main; main()", *arguments]
    subprocess.run(command, env=environment, check=True, timeout=timeout_s, stdout=sys.stderr)


async def measure(endpoint: Endpoint, profile: LoadProfile, slo: Slo) -> LoadReport:
    async with Client(endpoint) as client:
        return summarise(await run_load(client, profile), slo)


def machine() -> str:
    """The machine in words, for the record beside the figures."""
    model = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return f"{len(os.sched_getaffinity(0))} cores of {model}, Python {platform.python_version()}"


@click.command()
@click.option("-f", "--config", type=click.Path(exists=True, path_type=Path), default=EXAMPLE)
@click.option("--concurrency", type=int, help="Closed loop. [4]")
@click.option("--rate", type=float, help="Open loop: arrivals per second, instead of --concurrency.")
@click.option("--requests", "num_requests", type=int, default=60, show_default=True)
@click.option("--input-len", default="256,128", show_default=True)
@click.option("--output-len", default="32,16", show_default=True)
@click.option("--shared-prefix", type=float, default=0.0, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--slo-ttft-ms", type=float, default=2000.0, show_default=True)
@click.option("--slo-itl-ms", type=float, default=200.0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of Markdown.")
def main(config: Path, slo_ttft_ms: float, slo_itl_ms: float, as_json: bool, **options: Any) -> None:
    """Measure split and colocated clusters under the same load."""
    if options["rate"] is None and options["concurrency"] is None:
        options["concurrency"] = 4
    for name in ("input_len", "output_len"):
        options[name] = Length.parse(options[name])
    profile = LoadProfile(**options)
    slo = Slo(ttft_s=slo_ttft_ms / 1e3, itl_s=slo_itl_ms / 1e3)
    base = yaml.safe_load(config.read_text())
    reports: dict[str, LoadReport] = {}
    for variant in VARIANTS:
        with running(variant.config(base)) as cluster:
            click.echo(f"{variant.name}: measuring at {cluster.endpoint.address}", err=True)
            report = reports[variant.name] = asyncio.run(measure(cluster.endpoint, profile, slo))
            for message in report.failure_messages.values():
                click.echo(f"first failure of its kind: {message}", err=True)
    date = time.strftime("%Y-%m-%d")
    if as_json:
        figures = {name: report.as_json() for name, report in reports.items()}
        click.echo(json.dumps({"date": date, "machine": machine(), "profile": asdict(profile), "reports": figures}))
        return
    arguments = " ".join(["-m benchmarks.split_vs_colocated", *sys.argv[1:]])
    click.echo(f"`python {arguments}`, {date}, {machine()}\n\n{markdown_table(reports)}")


if __name__ == "__main__":
    main()
