"""What the commands share that change what is wanted of a running cluster: their options, errors and exit codes."""

from __future__ import annotations

import contextlib
import enum
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from cluster import launch
from cluster.cluster_store import ClusterStore, ClusterStoreError, Wish
from cluster.commands.settling import Outcome, Settling
from cluster.config import ClusterConfig, ConfigError, load_config, to_plain
from cluster.connect import NotRunningError, open_store
from cluster.run_dir import RunDir
from cluster.wish_change import BusyWishError

Command = Callable[..., Any]

FILE = click.Path(dir_okay=False, path_type=Path)


class Exit(enum.IntEnum):
    """Exit codes beside 0 and click's own (1 an error, 2 a wrong use)."""

    NOT_RUNNING = 3
    DIFFERS = 4
    NEEDS_RESTART = 5
    NOT_SETTLED = 6


EXIT_CODES = """\b
Exit code: 0 done, or nothing to do; 1 an error, and nothing was changed; 3 nothing runs;
6 what was asked for is written, but had not come about when the waiting ended."""

_OPTIONS = (
    click.option("--wait/--no-wait", "waits", default=True, help="Wait until it has come about (default), or return."),
    click.option(
        "--timeout",
        "timeout_s",
        type=click.FloatRange(min=0),
        help="Longest to wait, in seconds. Default: what starts and drains may take by the YAML.",
    ),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object."),
)


def wish_options(command: Command) -> Command:
    """Add --wait/--no-wait, --timeout and --json."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


class NotThereError(click.ClickException):
    """The cluster, or its Redis, is not there now; it may be later."""


class NothingRunsError(NotThereError):
    """Nothing runs that the command could change."""

    exit_code = Exit.NOT_RUNNING.value


class RestartNeededError(click.ClickException):
    """Only a restart of the cluster could do it."""

    exit_code = Exit.NEEDS_RESTART.value


@contextlib.contextmanager
def cluster_store(config: ClusterConfig | None = None) -> Iterator[ClusterStore]:
    """The store of the cluster; what is wrong with it is one line on stderr and an exit code."""
    with translated():
        store = open_store(RunDir.default(), config)
        try:
            yield store
        finally:
            store.close()


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Turn errors that a person can mend into one line on stderr and an exit code."""
    try:
        yield
    except NotRunningError as error:
        raise NothingRunsError(f"{error}. Start one with `pdserve up`.") from error
    except ClusterStoreError as error:
        raise NotThereError(f"{error}: nothing was changed") from error
    except (BusyWishError, launch.LaunchError) as error:
        raise click.ClickException(str(error)) from error


def load_file(file: Path) -> ClusterConfig:
    """The configuration in a file; ClickException lists what is wrong with it, with lines."""
    try:
        return load_config(file)
    except ConfigError as error:
        raise click.ClickException(str(error)) from error


def settled(config: ClusterConfig, wish: Wish) -> dict[str, Any]:
    """The file's configuration as plain data that can be compared with the wish's. LaunchError."""
    return to_plain(launch.settle(config, wish.config))


def bound_of(config: dict[str, Any], members: int = 1) -> float:
    """What it may take to replace so many members one after the other, in seconds."""
    each = config["drain_s"] + config["start_timeout_s"] + config["scaling"]["place_timeout_s"]
    return float(each * max(1, members))


def see_it_through(
    store: ClusterStore, generation: int | None, said: dict[str, Any], *, waits: bool, timeout_s: float, as_json: bool
) -> None:
    """Wait for a wish that was written (None: there was nothing to do), and say how it ended. May exit."""
    outcome, began = Outcome.SETTLED, time.monotonic()
    if generation is not None and waits:
        try:
            outcome = Settling(store, generation).follow(timeout_s)
        except KeyboardInterrupt:
            outcome = Outcome.LEFT
    took_s = time.monotonic() - began
    done = outcome is Outcome.SETTLED and (waits or generation is None)
    if as_json:
        click.echo(json.dumps({**said, "generation": generation, "settled": done, "took_s": round(took_s, 2)}))
    elif generation is not None and not waits:
        click.echo("Asked for. `pdserve status --watch` shows how it comes about.")
    elif generation is not None and done:
        click.echo(f"Done ({took_s:.1f} s).")
    if outcome is not Outcome.SETTLED:
        if not as_json:
            text = f"Not done after {took_s:.0f} s; it stays asked for. `pdserve status` shows what it waits for."
            click.echo(text, err=True)
        raise click.exceptions.Exit(Exit.NOT_SETTLED)
