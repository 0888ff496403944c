"""The options of `pdserve bench` that replay a trace instead of making prompts up."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from cluster.commands.client_options import Command, with_options
from cluster.load_trace import Sample

_PATH = click.Path(exists=True, dir_okay=False, path_type=Path)


def _sample(_context: click.Context, _parameter: click.Parameter, text: str | None) -> Sample | None:
    try:
        return None if text is None else Sample.parse(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


_OPTIONS = (
    click.option("--trace", type=_PATH, metavar="FILE", help="Replay this trace in the Mooncake format instead."),
    click.option(
        "--trace-sample",
        "sample",
        callback=_sample,
        metavar="N|SHARE",
        help="Send about N requests of the trace, or a share (0.1, 10%), whole conversations. Default: all.",
    ),
    click.option("--time-scale", type=float, default=1.0, metavar="X", help="Replay X times as fast. [1]"),
    click.option(
        "--length-scale", type=int, default=1, metavar="N", help="Divide all lengths by N, a power of 2 up to 512. [1]"
    ),
    click.option(
        "--trace-too-long",
        "too_long",
        type=click.Choice(["clip", "drop"]),
        default="clip",
        help="What becomes of requests over the model's limit. [clip]",
    ),
)
_REPLAYED = {
    "sample": "--trace-sample",
    "time_scale": "--time-scale",
    "length_scale": "--length-scale",
    "too_long": "--trace-too-long",
}
_GENERATED = {
    "rate": "--rate",
    "concurrency": "--concurrency",
    "num_requests": "--requests",
    "input_len": "--input-len",
    "output_len": "--output-len",
    "shared_prefix": "--shared-prefix",
    "num_groups": "--prefix-groups",
}
"""What says how to make a load up, and means nothing where one is replayed."""


def trace_options(command: Command) -> Command:
    """Add the options; the command gets `trace: Path | None`, and then only those of its options that fit it.

    Where a trace is replayed the options that make prompts up are left out, else those of a replay; one that was
    given all the same is a usage error.
    """

    @functools.wraps(command)
    def wrapper(*args: Any, trace: Path | None, **options: Any) -> Any:
        context = click.get_current_context()
        idle, why = (
            (_REPLAYED, "needs --trace FILE")
            if trace is None
            else (_GENERATED, "does not go with --trace, which says it itself")
        )
        for name, flag in idle.items():
            if context.get_parameter_source(name) is not ParameterSource.DEFAULT:
                raise click.UsageError(f"{flag} {why}")
            del options[name]
        return command(*args, trace=trace, **options)

    return with_options(wrapper, _OPTIONS)
