"""`pdserve plan-diff`: what applying a YAML would change, and what that needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from cluster.change_plan import Plan, is_refused, meaning, notes, plan, public, shown
from cluster.cluster_store import Wish
from cluster.commands.wish_options import FILE, Exit, cluster_store, load_file, settled
from cluster.config_diff import Change
from cluster.connect import read_wish

_MAX_VALUE = 28
_EPILOG = """\b
Examples:
  pdserve plan-diff -f cluster.yaml
  pdserve plan-diff -f cluster.yaml --json

\b
What a change needs:
  hot      it counts at once; no process is replaced
  drain    processes are replaced one after another: each drains, stops, and
           one with the new settings takes its place
  restart  the whole cluster: `pdserve down`, `pdserve up`

Paths in the file count from the directory of this command, as they do for `up`.

\b
Exit code: 0 nothing to do, 1 an error, 3 nothing runs,
4 `pdserve apply` would change something, 5 it needs a restart.
"""


@click.command("plan-diff", epilog=_EPILOG)
@click.option("-f", "--config", "file", type=FILE, required=True, help="The cluster's YAML.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def plan_diff(file: Path, as_json: bool) -> None:
    """Show what `pdserve apply` would change, and what that needs."""
    config = load_file(file)
    with cluster_store(config) as store:
        wish = read_wish(store)
        made = plan(wish, settled(config, wish))
    if as_json:
        click.echo(json.dumps({"generation": wish.generation, **as_plain(made, wish)}, indent=2))
    else:
        click.echo("\n".join(as_text(made, wish, str(file))))
    if made.changes:
        raise click.exceptions.Exit(Exit.NEEDS_RESTART if made.needs == "restart" else Exit.DIFFERS)


def as_plain(made: Plan, wish: Wish) -> dict[str, Any]:
    """The plan for programs."""
    return {
        "needs": made.needs,
        "changes": [
            {
                "key": change.path,
                "now": change.old,
                "then": change.new,
                "needs": change.needs,
                "touches": change.touches,
                "means": meaning(change, made),
            }
            for change in public(made.changes)
        ],
        "sizes": {
            pool: {"now": size.now, "then": size.then, "file": size.file, "running_config": size.running}
            for pool, size in made.sizes.items()
        },
        "notes": notes(made),
        "refused": is_refused(made),
    }


def as_text(made: Plan, wish: Wish, file: str) -> list[str]:
    """The plan for people, line by line."""
    said = [f"  Note: {note}." for note in notes(made)]
    if not made.changes:
        return [f"{file}: nothing to do, this is what runs (generation {wish.generation}).", *said]
    return [f"{file}, against what runs (generation {wish.generation}, by {wish.by}):", "", *table(made), *_gap(said)]


def table(made: Plan) -> list[str]:
    """The changes, a line each."""
    rows = [("key", "now", "then", "needs", "what it means")]
    rows += [
        (change.path, _short(change.old), _short(change.new), _needs(change), meaning(change, made))
        for change in public(made.changes)
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return [
        "  " + "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]])
        for row in rows
    ]


def _gap(lines: list[str]) -> list[str]:
    return ["", *lines] if lines else []


def _needs(change: Change) -> str:
    return f"drain: {', '.join(change.touches)}" if change.needs == "drain" else change.needs


def _short(value: Any) -> str:
    text = shown(value)
    return text if len(text) <= _MAX_VALUE else f"...{text[3 - _MAX_VALUE :]}"
