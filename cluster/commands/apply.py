"""`pdserve apply`: make the cluster that runs what a YAML says, once or whenever the file changes."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from typing import Any

import click

from cluster.change_plan import Plan, is_refused, notes, plan, summary
from cluster.cluster_store import ClusterStore, Decision, Wish
from cluster.commands.file_watch import FileWatch
from cluster.commands.plan_diff import as_plain, table
from cluster.commands.settling import Outcome, Settling
from cluster.commands.wish_options import (
    EXIT_CODES,
    FILE,
    NotThereError,
    RestartNeededError,
    bound_of,
    cluster_store,
    load_file,
    see_it_through,
    settled,
    wish_options,
)
from cluster.config import ClusterConfig
from cluster.wish_change import Proposal, write

_EPILOG = f"""\b
Examples:
  pdserve plan-diff -f cluster.yaml     first see what would change
  pdserve apply -f cluster.yaml
  pdserve apply -f cluster.yaml --watch

A file with an error is refused with its line, and so is a change that needs a
restart; what runs stays as it is. A pool's size follows `workers` only where
that number was changed in the file: a size that the autoscaler or `pdserve
scale` set is kept when something else is applied.

With --watch the command stays and applies each change of the file, also one
that a Kubernetes ConfigMap brings. Ctrl-C or SIGTERM ends it; the cluster runs on.

{EXIT_CODES}
Beside these 5: it needs a restart of the cluster, and nothing was changed.
"""


class _Apply:
    """One application of a file: what it found, and what it decided."""

    def __init__(self, file: Path, config: ClusterConfig) -> None:
        self._file = file
        self._config = config
        self.plan: Plan | None = None
        self.wish: Wish | None = None

    def write(self, store: ClusterStore) -> int | None:
        """Check and write it; the new generation, or None if there is nothing to do. Raises what says why not."""
        return write(store, self._decide)

    def _decide(self, wish: Wish) -> Proposal | None:
        made = plan(wish, settled(self._config, wish))
        self.plan, self.wish = made, wish
        if made.needs == "restart":
            raise RestartNeededError("\n".join([f"{self._file}: {is_refused(made)}", *table(made)]))
        if not made.changes:
            return None
        if problem := is_refused(made):
            raise click.ClickException(f"{self._file}: {problem}")
        sizes = made.sizes_then if any(size.now != size.then for size in made.sizes.values()) else None
        details: dict[str, Any] = {"changes": as_plain(made, wish)["changes"]}
        decision = Decision(
            at=time.time(), by="apply", what=summary(made), reason=f"{self._file} was applied", details=details
        )
        return Proposal(decision=decision, config=made.config, sizes=sizes and {**wish.sizes, **sizes})

    def bound_s(self) -> float:
        """What it may take, by the new configuration: of each kind that is touched one after the other."""
        assert self.plan is not None
        touched = {kind for change in self.plan.changes for kind in change.touches}
        counts = {**self.plan.sizes_then, "router": self.plan.config["router"]["replicas"]}
        return bound_of(self.plan.config, max((counts.get(kind, 0) for kind in touched), default=1))

    def say(self) -> None:
        """What is about to change, for people."""
        assert self.plan is not None
        if not self.plan.changes:
            click.echo(f"{self._file}: nothing to do, this is what runs.")
        for line in table(self.plan) if self.plan.changes else []:
            click.echo(line)
        for note in notes(self.plan):
            click.echo(f"  Note: {note}.")


@click.command(epilog=_EPILOG)
@click.option("-f", "--config", "file", type=FILE, required=True, help="The cluster's YAML.")
@wish_options
@click.option("--watch", is_flag=True, help="Stay, and apply each change of the file.")
def apply(file: Path, waits: bool, timeout_s: float | None, as_json: bool, watch: bool) -> None:
    """Make the cluster that runs what a YAML says."""
    if watch:
        if as_json:
            raise click.UsageError("--json does not go with --watch: its output has no end")
        _watch(file, waits=waits, timeout_s=timeout_s)
        return
    config = load_file(file)
    with cluster_store(config) as store:
        one = _Apply(file, config)
        generation = one.write(store)
        assert one.plan is not None
        assert one.wish is not None
        if not as_json:
            one.say()
        see_it_through(
            store,
            generation,
            as_plain(one.plan, one.wish),
            waits=waits,
            timeout_s=one.bound_s() if timeout_s is None else timeout_s,
            as_json=as_json,
        )


def _watch(file: Path, *, waits: bool, timeout_s: float | None) -> None:
    """Apply the file as it is, then each change of it, until Ctrl-C or SIGTERM."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    seen = FileWatch(file)
    never = threading.Event()
    click.echo(f"{_clock()} watching {file}; Ctrl-C ends it, and the cluster runs on")
    try:
        todo, last_error = True, ""
        while True:
            if todo or seen.has_changed():
                seen.note()
                last_error, todo = _apply_watched(file, seen, last_error, waits=waits, timeout_s=timeout_s)
            never.wait(FileWatch.LOOK_EVERY_S)
    except KeyboardInterrupt:
        click.echo(f"{_clock()} stopped watching")
    finally:
        signal.signal(signal.SIGTERM, before)


def _apply_watched(
    file: Path, seen: FileWatch, last_error: str, *, waits: bool, timeout_s: float | None
) -> tuple[str, bool]:
    """Apply it once; what went wrong (said only where it is new), and whether it is to be tried again as it is."""
    try:
        one = _Apply(file, config := load_file(file))
        with cluster_store(config) as store:
            generation = one.write(store)
            click.echo(f"{_clock()} {'applying' if generation is not None else 'read'}")
            one.say()
            if generation is not None and waits:
                bound = one.bound_s() if timeout_s is None else timeout_s
                outcome = Settling(store, generation).follow(bound, leave=seen.has_changed)
                click.echo(f"{_clock()} {_ENDS[outcome]}")
    except click.ClickException as error:
        told = error.format_message()
        if told != last_error:
            click.echo(f"{_clock()} not applied, what ran before stands: {told}", err=True)
        return told, isinstance(error, NotThereError)
    return "", False


_ENDS = {
    Outcome.SETTLED: "done",
    Outcome.TIMED_OUT: "not done in time; it stays asked for",
    Outcome.LEFT: "the file has changed again",
}


def _clock() -> str:
    return time.strftime("%H:%M:%S")
