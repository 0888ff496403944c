"""What `pdserve status` prints for people, line by line."""

from __future__ import annotations

import textwrap

from cluster.health import Health, Member, Report
from cluster.pairs import Pair
from cluster.scaling_view import Pool, Scaling, Used

_ROW = "{:<12} {:<8} {:<8} {:>5}  {:<21} {:>13} {:>7} {:>7}  {}"
_PAIR = "{:<14} {:<20} {:<10} {:<10} {:>10} {:>7}  {}"
_POOL = "{:<12} {:>6} {:>6} {:>9} {:>9} {:>8}  {}"
_WIDTH = 116
"""Of sentences; rows are as long as they are."""


def lines_of(report: Report) -> list[str]:
    """All that there is to say."""
    if report.health is Health.NOT_RUNNING:
        return [f"No cluster is running (run directory {report.run_dir}). Start one with `pdserve up`."]
    changing = ", changing" if report.scaling and not report.scaling.settled and report.controller != "silent" else ""
    how = f"{report.health.name.lower()}{changing}"
    said = [f"{how} ({report.phase}), mode {report.mode}, run directory {report.run_dir}"]
    for name, value in (("supervisor", report.supervisor), ("valkey", report.valkey), ("ray", report.ray)):
        again = report.restarts.get("gcs_server" if name == "ray" else name, 0)
        said.append(f"  {name:<12} {value}{f', restarted {again} times' if again else ''}")
    if report.scaling:
        said += _scaling_lines(report.scaling, report.controller)
    said += ["", "  " + _ROW.format(*_HEADS)]
    said += [f"  {_row(member)}" for member in report.members]
    if any(member.paced for member in report.members):
        said += ["", "  Paced workers take the time of other hardware: a rehearsal, not a measurement."]
    pairs = [pair for member in report.members for pair in member.pairs]
    if pairs:
        said += ["", "  " + _PAIR.format("from", "to", "transport", "state", "latency ms", "GB/s", "").rstrip()]
        said += [f"  {_pair_row(pair)}".rstrip() for pair in pairs]
    return said


def _scaling_lines(scaling: Scaling, controller: str) -> list[str]:
    wanted = f"generation {scaling.generation} by {scaling.by}"
    how = "all as wanted" if scaling.settled else "not there yet"
    if controller == "silent":
        how = "nobody carries it out until the controller is back; what serves goes on serving"
    said = [f"  {'controller':<12} {controller}; wanted is {wanted}: {how}"]
    said += [f"  {'waiting' if not index else '':<12} {text}" for index, text in enumerate(scaling.waiting)]
    said += ["", "  " + _POOL.format("pool", "wanted", "ready", "starting", "draining", "missing", "advice").rstrip()]
    said += [f"  {_pool_row(pool)}".rstrip() for pool in scaling.pools]
    reason = scaling.reason or ("" if scaling.mode == "off" else "no advice yet")
    scaled = f"scaling {scaling.mode}{f': {reason}' if reason else ''}"
    said += textwrap.wrap(scaled, _WIDTH, initial_indent="  ", subsequent_indent="    ")
    budget = ", ".join(_budget(name, used) for name, used in scaling.budget.items() if used.limit is not None)
    return [*said, f"  budget: {budget}"] if budget else said


def _pool_row(pool: Pool) -> str:
    advice = "" if pool.advice is None else str(pool.advice)
    return _POOL.format(pool.name, pool.wanted, pool.ready, pool.starting, pool.draining, pool.missing, advice)


def _budget(name: str, used: Used) -> str:
    there = "at most" if used.used is None else f"{used.used:g} of"
    return f"{there} {used.limit:g} {'GPUs' if name == 'gpus' else name}"


_HEADS = ("member", "pool", "state", "epoch", "address", "free/blocks", "running", "waiting", "metrics")


def _row(member: Member) -> str:
    numbers = member.numbers
    blocks = f"{_number(numbers, 'free_blocks')}/{_number(numbers, 'num_blocks')}" if "num_blocks" in numbers else "-"
    running, waiting = _number(numbers, "num_running"), _number(numbers, "num_waiting")
    epoch = str(member.epoch) if member.epoch else "-"
    address, metrics = member.address or "-", member.metrics_address or "-"
    pool = "both" if member.role == "both" else member.pool or "-"
    row = _ROW.format(member.member_id, pool, member.state, epoch, address, blocks, running, waiting, metrics)
    marks = [f"born in {member.born}"] if member.born and member.born != member.pool else []
    marks += [member.why] if member.why else []
    marks += ["paced"] if member.paced else []
    return "  ".join([row, *marks])


def _pair_row(pair: Pair) -> str:
    is_measured = pair.state == "ready"
    latency, rate = (f"{pair.latency_s * 1e3:.2f}", f"{pair.bytes_per_s / 1e9:.3g}") if is_measured else ("-", "-")
    slow = "slow" if pair.is_slow else ""
    return _PAIR.format(pair.sender, pair.receiver, pair.transport or "-", pair.state, latency, rate, slow)


def _number(numbers: dict[str, float], name: str) -> str:
    return f"{numbers[name]:.0f}" if name in numbers else "-"
