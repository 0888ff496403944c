"""`pdserve bench`: loads a running cluster and reports latency, throughput and goodput."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from cluster.client import Client, ClientError, Endpoint
from cluster.commands.client_options import client_errors, endpoint_options
from cluster.commands.trace_options import trace_options
from cluster.load import Length, LoadProfile, LoadResult, OnProgress, RequestRecord, run_load
from cluster.load_report import LoadReport, Slo, rows, summarise
from cluster.load_trace import (
    Selection,
    TraceError,
    TraceFigures,
    TraceProfile,
    read_trace,
    run_trace,
    select,
    trace_rows,
)

_DEFAULT_REQUESTS = 100
_EPILOG = """\b
Examples:
  pdserve bench --concurrency 8 --requests 200
  pdserve bench --rate 4 --duration 60 --slo-ttft-ms 500 --slo-itl-ms 50
  pdserve bench --rate 2 --input-len 512,128 --output-len 64 --shared-prefix 0.5
  pdserve bench --concurrency 4 --json > result.json
  pdserve bench --trace conversation.jsonl --duration 60 --trace-sample 10% --length-scale 64
\b
TTFT counts from when a request was due, so a server that falls behind shows it.
A request is good when its TTFT, and 99 % of its ITLs, keep the SLO.
\b
A trace is a file in the Mooncake format: a JSON object a line with timestamp (ms),
input_length, output_length and hash_ids, one id for each 512 tokens of the prompt.
Requests are sent at its own times, open loop; equal ids become equal tokens.
"""


def _length(_context: click.Context, _parameter: click.Parameter, text: str) -> Length:
    try:
        return Length.parse(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


@click.command(epilog=_EPILOG)
@click.option("--rate", type=float, metavar="PER_S", help="Open loop: Poisson arrivals at this mean rate.")
@click.option("--concurrency", type=int, help="Closed loop: keep this many requests in flight. Default: 4.")
@click.option("--requests", "num_requests", type=int, help=f"Send this many. Default: {_DEFAULT_REQUESTS}.")
@click.option("--duration", "duration_s", type=float, metavar="SECONDS", help="Send for this long instead.")
@click.option("--input-len", callback=_length, default="128", metavar="MEAN[,SPREAD]", help="Prompt tokens. [128]")
@click.option("--output-len", callback=_length, default="32", metavar="MEAN[,SPREAD]", help="Answer tokens. [32]")
@click.option("--shared-prefix", type=float, default=0.0, metavar="SHARE", help="Prompt share equal in a group. [0]")
@click.option("--prefix-groups", "num_groups", type=int, default=1, help="Groups with a prefix of their own. [1]")
@click.option("--warmup", "num_warmup", type=int, default=2, help="Requests before the measurement. [2]")
@click.option("--deadline", "deadline_s", type=float, metavar="SECONDS", help="Of each request. Default: the server's.")
@click.option("--seed", type=int, default=0, help="Decides prompts, lengths and arrivals. [0]")
@click.option("--slo-ttft-ms", type=float, help="A good answer's first token comes within this.")
@click.option("--slo-itl-ms", type=float, help="99 % of a good answer's tokens follow within this.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object: profile and figures, in seconds.")
@trace_options
@endpoint_options
@client_errors
def bench(
    endpoint: Endpoint,
    trace: Path | None,
    slo_ttft_ms: float | None,
    slo_itl_ms: float | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Load the cluster with generated prompts, or with a trace, and report latency and throughput."""
    try:
        load = _load(trace, options)
        slo = Slo(ttft_s=_seconds(slo_ttft_ms), itl_s=_seconds(slo_itl_ms))
    except TraceError as error:
        raise click.ClickException(str(error)) from error
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    report = summarise(asyncio.run(_measure(endpoint, load)), slo)
    if as_json:
        click.echo(json.dumps({"address": endpoint.address, **load.as_json(), **report.as_json()}))
    else:
        print_report(report, load.rows())
    for message in report.failure_messages.values():
        click.echo(f"first failure of its kind: {message}", err=True)
    if report.num_completed == 0:
        raise click.ClickException("no request was answered")


class _Generated:
    """A load that is made up."""

    def __init__(self, profile: LoadProfile) -> None:
        self._profile = profile
        self.num_requests = profile.num_requests

    async def run(self, client: Client, on_progress: OnProgress) -> LoadResult:
        return await run_load(client, self._profile, on_progress)

    def as_json(self) -> dict[str, Any]:
        return {"profile": asdict(self._profile)}

    def rows(self) -> list[tuple[str, str]]:
        return []


class _Traced:
    """A load that is replayed."""

    def __init__(self, file: Path, profile: TraceProfile) -> None:
        self._file = file
        self._profile = profile
        self._selection: Selection = select(read_trace(file), profile)
        self._figures: TraceFigures | None = None
        self.num_requests = len(self._selection.lines)

    async def run(self, client: Client, on_progress: OnProgress) -> LoadResult:
        try:
            result, self._figures = await run_trace(client, self._selection, self._profile, on_progress)
        except TraceError as error:
            raise ClientError(str(error)) from error
        return result

    def as_json(self) -> dict[str, Any]:
        assert self._figures is not None
        return {"trace": {"file": str(self._file), **asdict(self._figures)}, "profile": asdict(self._profile)}

    def rows(self) -> list[tuple[str, str]]:
        assert self._figures is not None
        return trace_rows(self._figures, self._profile)


def _load(trace: Path | None, options: dict[str, Any]) -> _Generated | _Traced:
    """What the options ask for; raises ValueError where they contradict each other."""
    if trace is not None:
        return _Traced(trace, TraceProfile(**options))
    if options["rate"] is None and options["concurrency"] is None:
        options["concurrency"] = 4
    if options["num_requests"] is None and options["duration_s"] is None:
        options["num_requests"] = _DEFAULT_REQUESTS
    return _Generated(LoadProfile(**options))


def print_report(report: LoadReport, more: Sequence[tuple[str, str]] = ()) -> None:
    """A table at a terminal, `name<TAB>figure` lines elsewhere; `more` are rows behind the report's own."""
    if not sys.stdout.isatty():
        for name, text in [*rows(report), *more]:
            click.echo(f"{name}\t{text}")
        return
    table = Table("figure", "value", title=f"{report.model}: what {report.num_requests} requests met")
    for name, text in [*rows(report), *more]:
        table.add_row(name, text)
    Console().print(table)


async def _measure(endpoint: Endpoint, load: _Generated | _Traced) -> LoadResult:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("requests", total=load.num_requests)
        failed = 0

        def count(record: RequestRecord) -> None:
            nonlocal failed
            failed += record.failure is not None
            progress.update(task, advance=1, description=f"requests ({failed} failed)" if failed else "requests")

        async with Client(endpoint) as client:
            return await load.run(client, count)


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1e3
