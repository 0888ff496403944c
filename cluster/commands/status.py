"""`pdserve status`: what runs, and how it is."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from cluster.health import Health, Member, Report, gather
from cluster.pairs import Pair
from cluster.run_dir import RunDir

_ROW = "{:<12} {:<8} {:>5}  {:<21} {:>13} {:>7} {:>7}  {}"
_PAIR = "{:<14} {:<20} {:<10} {:<10} {:>10} {:>7}  {}"
_EPILOG = """\b
Examples:
  pdserve status
  pdserve status --json

Exit code: 0 all is ready, 1 something is not, 3 nothing runs.
"""


@click.command(epilog=_EPILOG)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(as_json: bool) -> None:
    """Show what runs, and how it is."""
    report = gather(RunDir.default())
    if as_json:
        click.echo(json.dumps({**asdict(report), "health": report.health.name.lower()}, indent=2))
    else:
        _show(report)
    if report.health is not Health.READY:
        raise click.exceptions.Exit(report.health.value)


def _show(report: Report) -> None:
    if report.health is Health.NOT_RUNNING:
        click.echo(f"No cluster is running (run directory {report.run_dir}). Start one with `pdserve up`.")
        return
    click.echo(f"{report.health.name.lower()} ({report.phase}), mode {report.mode}, run directory {report.run_dir}")
    for name, value in (("supervisor", report.supervisor), ("valkey", report.valkey), ("ray", report.ray)):
        again = report.restarts.get("gcs_server" if name == "ray" else name, 0)
        click.echo(f"  {name:<12} {value}{f', restarted {again} times' if again else ''}")
    click.echo(
        "\n  " + _ROW.format("member", "state", "epoch", "address", "free/blocks", "running", "waiting", "metrics")
    )
    for member in report.members:
        click.echo(f"  {_row(member)}{'  paced' if member.paced else ''}")
    if any(member.paced for member in report.members):
        click.echo("\n  Paced workers take the time of other hardware: a rehearsal, not a measurement.")
    pairs = [pair for member in report.members for pair in member.pairs]
    if pairs:
        click.echo("\n  " + _PAIR.format("from", "to", "transport", "state", "latency ms", "GB/s", "").rstrip())
    for pair in pairs:
        click.echo(f"  {_pair_row(pair)}".rstrip())


def _row(member: Member) -> str:
    numbers = member.numbers
    blocks = f"{_number(numbers, 'free_blocks')}/{_number(numbers, 'num_blocks')}" if "num_blocks" in numbers else "-"
    running, waiting = _number(numbers, "num_running"), _number(numbers, "num_waiting")
    epoch = str(member.epoch) if member.epoch else "-"
    address, metrics = member.address or "-", member.metrics_address or "-"
    return _ROW.format(member.member_id, member.state, epoch, address, blocks, running, waiting, metrics)


def _pair_row(pair: Pair) -> str:
    is_measured = pair.state == "ready"
    latency, rate = (f"{pair.latency_s * 1e3:.2f}", f"{pair.bytes_per_s / 1e9:.3g}") if is_measured else ("-", "-")
    slow = "slow" if pair.is_slow else ""
    return _PAIR.format(pair.sender, pair.receiver, pair.transport or "-", pair.state, latency, rate, slow)


def _number(numbers: dict[str, float], name: str) -> str:
    return f"{numbers[name]:.0f}" if name in numbers else "-"
