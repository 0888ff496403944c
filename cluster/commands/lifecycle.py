"""`pdserve up` and `pdserve down`."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import click

from cluster import launch
from cluster.commands.load_bars import LoadBars
from cluster.config import ClusterConfig, ConfigError, load_config
from cluster.run_dir import RunDir

_FILE = click.Path(dir_okay=False, path_type=Path)
_UP_EPILOG = """\b
Examples:
  pdserve up
  pdserve up -f deploy/examples/cpu-demo.yaml
  pdserve up -f my.yaml --foreground

The run directory is $PDSERVE_RUN_DIR, by default ~/.local/state/pdserve/default;
one cluster runs from each.
"""
_HINTS = """
  pdserve chat     talk with it
  pdserve status   see how it is
  pdserve down     stop it"""
_DOWN_EPILOG = """\b
Examples:
  pdserve down
  pdserve down --timeout 5
"""


@click.command(epilog=_UP_EPILOG)
@click.option(
    "-f", "--config", "file", type=_FILE, help="The cluster's YAML. Default: ./pdserve.yaml, else the demo's."
)
@click.option("--foreground/--detach", default=False, help="Stay until Ctrl-C, or return once it is ready (default).")
@click.option(
    "--keep",
    is_flag=True,
    help="With --foreground and ray.address: SIGTERM ends this command alone; workers and routers go on, and the next "
    "`up` finds them. For pods; Ctrl-C and `pdserve down` still end everything.",
)
@click.option("--hints/--no-hints", default=True, hidden=True)
@click.option("--actors", default="cluster.actors", hidden=True)
def up(file: Path | None, foreground: bool, keep: bool, hints: bool, actors: str) -> None:
    """Start the cluster that a YAML describes."""
    run_dir = RunDir.default()
    config = _load(file or launch.default_config_file())
    try:
        if keep and (not foreground or config.ray.address is None):
            raise click.UsageError("--keep needs --foreground, and a ray.address in the YAML: a Ray that outlives this")
        config = launch.check(config, run_dir)
        launched = launch.start(config, run_dir, actors=actors, attached=foreground, keep=keep)
        if foreground:
            signal.signal(signal.SIGTERM, lambda number, _frame: launched.process.send_signal(number))
    except (launch.LaunchError, PermissionError) as error:
        raise click.ClickException(str(error)) from error
    try:
        routers = _follow(launched, run_dir)
        _summary(config, routers, run_dir)
        if hints:
            click.echo(_HINTS)
        if foreground:
            click.echo("Ctrl-C stops it.")
            launched.process.wait()
    except KeyboardInterrupt:
        click.echo("\nStopping.")
        launched.process.send_signal(signal.SIGTERM)
        launched.process.wait(timeout=config.drain_s + launch.STOP_MARGIN_S)
        sys.exit(130)
    if not foreground:
        launched.process.returncode = 0  # it stays, and is nobody's child once this process ends


def _load(file: Path) -> ClusterConfig:
    try:
        return load_config(file)
    except ConfigError as error:
        raise click.ClickException(str(error)) from error


def _follow(launched: launch.Launched, run_dir: RunDir) -> list[str]:
    """Show progress to the end; the routers' addresses, or ClickException with the cause."""
    with LoadBars() as bars:
        for event in launched.events:
            match event["event"]:
                case "begin":
                    bars.line(f"  ... {event['what']}")
                case "load":
                    bars.show(event["engine"], event["done_bytes"], event["total_bytes"])
                case "done":
                    bars.line(f"  ok  {event['what']} ({event['seconds']:.1f} s)")
                case "ready":
                    return list(event["routers"])
                case "failed":
                    launched.process.wait(timeout=launch.STOP_MARGIN_S)
                    raise click.ClickException(f"{event['message']}\nLogs: {run_dir.logs}")
    raise click.ClickException(f"the supervisor said nothing more; see {run_dir.logs}")


def _summary(config: ClusterConfig, routers: list[str], run_dir: RunDir) -> None:
    if config.mode == "colocated":
        pools = f"{config.decode.workers} worker(s), each doing both jobs"
    else:
        pools = f"{config.prefill.workers} prefill, {config.decode.workers} decode worker(s)"
    lines = {"Router": ", ".join(routers), "Pools": pools, "Run directory": str(run_dir.path)}
    started = [("prefill", config.prefill), ("decode", config.decode)][config.mode == "colocated" :]
    paced = [name for name, pool in started if pool.pace is not None]
    if paced:
        lines["Rehearsal"] = f"{' and '.join(paced)} workers are paced: they take the time of other hardware"
    click.echo("Ready.")
    for name, value in lines.items():
        click.echo(f"  {name:<14} {value}")


@click.command(epilog=_DOWN_EPILOG)
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0),
    help="Seconds to wait for running requests. Default: drain_s of the YAML.",
)
def down(timeout_s: float | None) -> None:
    """Drain and stop the cluster; fine where none runs."""
    run_dir = RunDir.default()
    if run_dir.read_state() is None:
        click.echo("No cluster is running.")
        return
    drain_s: Any = timeout_s
    if drain_s is None:
        drain_s = launch.drain_bound(run_dir)
    click.echo(f"Stopping the cluster (running requests may take {drain_s:g} s more).")
    launch.stop(run_dir, drain_s + launch.STOP_MARGIN_S if timeout_s is None else drain_s)
    click.echo("Stopped.")
