"""`pdserve history`: every decision about the cluster, with its reason."""

from __future__ import annotations

import json
import textwrap
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict

import click
from rich.console import Console

from cluster.cluster_store import MAX_HISTORY, ClusterStore, Decision
from cluster.commands.wish_options import cluster_store

_ROW = "{:<19}  {:<10}  {}"
_INDENT = len(_ROW.format("", "", ""))
_LEAST_WIDTH = 40
_LOOK_EVERY_S = 2.0
"""Longest between two looks; a decision wakes the command sooner."""
_EPILOG = """\b
Examples:
  pdserve history
  pdserve history -n 5
  pdserve history --follow
  pdserve history --json          one object a line, with the figures behind each

\b
Who decides: up, apply, scale and restart are commands; autoscaler decides sizes
(scaling.mode advise or on); controller carries out, and says what it meets.
"""


@click.command(epilog=_EPILOG)
@click.option(
    "-n", "limit", type=click.IntRange(1, MAX_HISTORY), default=20, help="Show so many of the newest. Default 20."
)
@click.option("--follow", is_flag=True, help="Stay, and print each new one. Ctrl-C ends it.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line.")
def history(limit: int, follow: bool, as_json: bool) -> None:
    """Show what was decided, by whom, and why; the newest last."""
    width = Console().width

    def show(decisions: Iterable[Decision]) -> None:
        for decision in decisions:
            click.echo(json.dumps(asdict(decision)) if as_json else "\n".join(_lines(decision, width)))

    with cluster_store() as store:
        seen = store.history(limit)
        if not as_json:
            click.echo(_ROW.format("time", "by", "what, and why") if seen else "Nothing was decided yet.")
        show(reversed(seen))
        if follow:
            try:
                _follow(store, seen, show)
            except KeyboardInterrupt:
                return


def _follow(store: ClusterStore, seen: list[Decision], show: Callable[[Iterable[Decision]], None]) -> None:
    while True:
        store.wait(_LOOK_EVERY_S)
        latest = store.history()
        show(reversed(new_ones(latest, seen)))
        seen = latest


def new_ones(latest: list[Decision], seen: list[Decision]) -> list[Decision]:
    """Those that came after `seen` was read; both are newest first, and old ones may be cut off."""
    for count in range(len(latest) if seen else 0):
        common = min(len(latest) - count, len(seen))
        if latest[count : count + common] == seen[:common]:
            return latest[:count]
    return latest


def _lines(decision: Decision, width: int) -> list[str]:
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(decision.at))
    room = max(_LEAST_WIDTH, width - _INDENT)
    what, *more = textwrap.wrap(decision.what, room) or [""]
    reason = textwrap.wrap(decision.reason, room - 2)
    below = [*more, *(f"  {line}" for line in reason)]
    return [_ROW.format(when, decision.by, what), *(" " * _INDENT + line for line in below)]
