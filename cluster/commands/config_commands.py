"""`pdserve validate` and `pdserve config schema`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from cluster.config import ConfigError, json_schema, load_config
from engine.config import ModelOptions
from engine.errors import ModelError
from engine.model_source import DEMO_NAME, resolve
from engine.models.config import ModelConfig

_PATH = click.Path(path_type=Path)
_VALIDATE_EPILOG = """\b
Example:
  pdserve validate deploy/examples/cpu-demo.yaml

A model that is not on this machine, or cannot be served, is only a warning.
"""
_SCHEMA_EPILOG = """\b
Example, with the YAML language server of an editor:
  pdserve config schema > pdserve.schema.json
  then, as the first line of your YAML:
  # yaml-language-server: $schema=pdserve.schema.json
"""


@click.command(epilog=_VALIDATE_EPILOG)
@click.argument("files", nargs=-1, type=_PATH)
@click.option("-f", "--config", "more", multiple=True, type=_PATH, help="The same as FILES, as `up` takes it.")
def validate(files: tuple[Path, ...], more: tuple[Path, ...]) -> None:
    """Check YAML files without starting anything."""
    if not files and not more:
        raise click.UsageError("name at least one YAML file")
    problems = 0
    for file in (*files, *more):
        try:
            config = load_config(file)
        except ConfigError as error:
            problems += len(error.problems)
            click.echo(str(error), err=True)
        else:
            click.echo(f"{file}: fine")
            _warn_of_model(file, config.model)
    if problems:
        raise click.exceptions.Exit(1)


def _warn_of_model(file: Path, model: ModelOptions) -> None:
    """Say what `up` would refuse here; the cluster may be meant for another machine."""
    try:
        if model.path != DEMO_NAME:
            ModelConfig.load(resolve(model.path, model.load_format))
    except (ModelError, OSError) as error:
        click.echo(f"{file}: on this machine `pdserve up` would fail: {error}", err=True)


@click.group()
def config() -> None:
    """Help for writing the YAML."""


@config.command(epilog=_SCHEMA_EPILOG)
def schema() -> None:
    """Print the JSON Schema of the YAML, for editors."""
    click.echo(json.dumps(json_schema(), indent=2))
