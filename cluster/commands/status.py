"""`pdserve status`: what runs, and how it is."""

from __future__ import annotations

import json
import threading
from dataclasses import asdict

import click
from rich.console import Console
from rich.live import Live
from rich.text import Text

from cluster.commands.status_text import lines_of
from cluster.health import Health, Report, gather
from cluster.run_dir import RunDir

_DEFAULT_PAUSE_S = 2.0
_EPILOG = """\b
Examples:
  pdserve status
  pdserve status --json
  pdserve status --watch       shown anew every 2 s, until Ctrl-C
  pdserve status --watch 0.5

\b
State of a member:
  ready                        it serves
  placing, starting            a new one that waits for a node, or starts
  draining, stopping           an old one that ends its requests, or ends
  starting, missing, silent    it should be ready: its engine starts again, it
                               is not in the registry, it does not answer

\b
Exit code: 0 all is ready, 1 something is not, 3 nothing runs. A cluster that
scales is ready as long as nothing that should be ready is not.
"""


@click.command(epilog=_EPILOG)
@click.option("--json", "as_json", is_flag=True, help="Print JSON; with --watch one object a line.")
@click.option(
    "--watch",
    "pause_s",
    is_flag=False,
    flag_value=_DEFAULT_PAUSE_S,
    type=click.FloatRange(min=0.1),
    metavar="[SECONDS]",
    help="Show it anew again and again, until Ctrl-C.",
)
def status(as_json: bool, pause_s: float | None) -> None:
    """Show what runs, and how it is."""
    run_dir = RunDir.default()
    if pause_s is not None:
        _watch(run_dir, pause_s, as_json=as_json)
        return
    report = gather(run_dir)
    click.echo(as_json_text(report, indent=2) if as_json else "\n".join(lines_of(report)))
    if report.health is not Health.READY:
        raise click.exceptions.Exit(report.health.value)


def as_json_text(report: Report, indent: int | None = None) -> str:
    """The report for programs."""
    return json.dumps({**asdict(report), "health": report.health.name.lower()}, indent=indent)


def _watch(run_dir: RunDir, pause_s: float, *, as_json: bool) -> None:
    never = threading.Event()
    console = Console()
    try:
        if as_json or not console.is_terminal:
            while True:
                report = gather(run_dir)
                click.echo(as_json_text(report) if as_json else "\n".join([*lines_of(report), ""]))
                never.wait(pause_s)
        with Live(console=console, auto_refresh=False) as live:
            while True:
                live.update(Text("\n".join(lines_of(gather(run_dir))), no_wrap=True, overflow="ellipsis"), refresh=True)
                never.wait(pause_s)
    except KeyboardInterrupt:
        return
