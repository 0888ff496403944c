"""Options that every client command shares, gathered into what the command wants: an Endpoint, a Sampling.

Each decorator here adds options and hands their values to the command as one keyword argument.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from google.protobuf.message import Message

from cluster.client import ClientError, find_endpoint
from protos.inference_pb2 import Sampling

Command = Callable[..., Any]

_PATH = click.Path(exists=True, dir_okay=False, path_type=Path)
_ENDPOINT_OPTIONS = (
    click.option("--address", metavar="HOST:PORT", envvar="PDSERVE_ADDRESS", help="Default: the running cluster's."),
    click.option("--api-key-file", type=_PATH, envvar="PDSERVE_API_KEY_FILE", help="A file that holds the key."),
    click.option("--tls-ca", type=_PATH, envvar="PDSERVE_TLS_CA", help="Use TLS; trust this PEM file's authorities."),
)
_SAMPLING_OPTIONS = (
    click.option("--max-tokens", type=int, help="Most tokens to generate. Default: the server's."),
    click.option("--temperature", type=float, help="0 is greedy. Default 0."),
    click.option("--top-p", type=float, help="Keep the likeliest tokens up to this probability. Default 1: off."),
    click.option("--top-k", type=int, help="Keep this many of the likeliest tokens. Default 0: off."),
    click.option("--min-p", type=float, help="Keep tokens this likely beside the likeliest. Default 0: off."),
    click.option("--repetition-penalty", type=float, help="Divide the logits of tokens seen. Default 1: off."),
    click.option("--seed", type=int, help="Same seed, same prompt, same tokens. Default: drawn by the server."),
    click.option("--stop", multiple=True, metavar="TEXT", help="End where this text would begin. May be repeated."),
)
_SAMPLING_FIELDS = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stop")


def endpoint_options(command: Command) -> Command:
    """Add --address, --api-key-file and --tls-ca; the command gets `endpoint: Endpoint`."""

    @functools.wraps(command)
    def wrapper(*args: Any, address: str | None, api_key_file: Path | None, tls_ca: Path | None, **rest: Any) -> Any:
        key = api_key_file.read_text().strip() if api_key_file else None
        try:
            endpoint = find_endpoint(address, api_key=key, tls_ca=tls_ca)
        except ValueError as error:
            raise click.UsageError(str(error)) from error
        except ClientError as error:
            raise click.ClickException(str(error)) from error
        return command(*args, endpoint=endpoint, **rest)

    return with_options(wrapper, _ENDPOINT_OPTIONS)


def sampling_options(command: Command) -> Command:
    """Add the sampling options; the command gets `sampling: Sampling` with the fields that were given."""

    @functools.wraps(command)
    def wrapper(*args: Any, **options: Any) -> Any:
        given = {name: options.pop(name) for name in _SAMPLING_FIELDS}
        sampling = Sampling(stop=given.pop("stop"))
        for name, value in given.items():
            set_field(sampling, name, value)
        return command(*args, sampling=sampling, **options)

    return with_options(wrapper, _SAMPLING_OPTIONS)


def client_errors(command: Command) -> Command:
    """Turn a ClientError into one line on stderr and exit code 1, and Ctrl-C into exit code 130."""

    @functools.wraps(command)
    def wrapper(*args: Any, **options: Any) -> Any:
        try:
            return command(*args, **options)
        except ClientError as error:
            raise click.ClickException(str(error)) from error
        except KeyboardInterrupt:
            click.echo("Cancelled.", err=True)
            raise click.exceptions.Exit(130) from None

    return wrapper


def set_field(message: Message, name: str, value: object) -> None:
    """Set an optional field unless the value is None; a usage error where it does not fit the field's type."""
    try:
        if value is not None:
            setattr(message, name, value)
    except ValueError as error:
        raise click.UsageError(f"--{name.replace('_', '-')} is out of range, got {value}") from error


def with_options(command: Command, options: tuple[Command, ...]) -> Command:
    """Add options, shown in their order by --help."""
    for option in reversed(options):
        command = option(command)
    return command
