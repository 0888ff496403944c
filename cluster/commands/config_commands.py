"""`pdserve validate` and `pdserve config schema`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from cluster.config import ConfigError, json_schema, load_config

_VALIDATE_EPILOG = """\b
Example:
  pdserve validate deploy/examples/cpu-demo.yaml
"""
_SCHEMA_EPILOG = """\b
Example, with the YAML language server of an editor:
  pdserve config schema > pdserve.schema.json
  then, as the first line of your YAML:
  # yaml-language-server: $schema=pdserve.schema.json
"""


@click.command(epilog=_VALIDATE_EPILOG)
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
def validate(files: tuple[Path, ...]) -> None:
    """Check YAML files without starting anything."""
    problems = 0
    for file in files:
        try:
            load_config(file)
        except ConfigError as error:
            problems += len(error.problems)
            click.echo(str(error), err=True)
        else:
            click.echo(f"{file}: fine")
    if problems:
        raise click.exceptions.Exit(1)


@click.group()
def config() -> None:
    """Help for writing the YAML."""


@config.command(epilog=_SCHEMA_EPILOG)
def schema() -> None:
    """Print the JSON Schema of the YAML, for editors."""
    click.echo(json.dumps(json_schema(), indent=2))
