"""`pdserve model`: fetch the demo model, and show what a model is."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from engine.errors import ModelError
from engine.model_source import DEMO_BYTES, fetch_demo, fingerprint, resolve
from engine.models.config import ModelConfig
from engine.tokenizer import Tokenizer

_FETCH_EPILOG = """\b
Example:
  pdserve model fetch demo
"""
_SHOW_EPILOG = """\b
Examples:
  pdserve model show demo
  pdserve model show ~/models/Qwen3-0.6B --json
  pdserve model show model.gguf
"""


@click.group()
def model() -> None:
    """Fetch and inspect models."""


@model.command(epilog=_FETCH_EPILOG)
@click.argument("name", type=click.Choice(["demo"]))
def fetch(name: str) -> None:
    """Put the demo model (SmolLM2-135M-Instruct, 98 MB) into the user's cache, once, and print its path."""
    with model_errors():
        click.echo(fetch_with_progress())


@model.command(epilog=_SHOW_EPILOG)
@click.argument("path")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def show(path: str, as_json: bool) -> None:
    """Show the model at PATH: `demo`, a .gguf file or a Hugging Face directory."""
    with model_errors():
        facts = describe(path)
    if as_json:
        click.echo(json.dumps(facts))
        return
    for name, value in facts.items():
        click.echo(f"{name.replace('_', ' ') + ':':<18} {_shown(value)}")


def _shown(value: object) -> str:
    match value:
        case bool():
            return "yes" if value else "no"
        case int() if value >= 1_000_000:
            return f"{value / 1e6:,.1f} million"
    return str(value)


def fetch_with_progress() -> Path:
    """The demo model's path; fetches it with a progress bar on stderr where it is not there yet."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("demo model", total=DEMO_BYTES)
        return fetch_demo(lambda done, total: progress.update(task, completed=done, total=total))


@contextlib.contextmanager
def model_errors() -> Iterator[None]:
    """Turn what is wrong with a model into one line on stderr and exit code 1."""
    try:
        yield
    except (ModelError, OSError) as error:
        raise click.ClickException(str(error)) from error


def describe(path: str) -> dict[str, Any]:
    """What `show` shows, as plain values. Raises ModelError."""
    source = resolve(path)
    config = ModelConfig.load(source)
    return {
        "path": str(source.path),
        "name": source.name,
        "format": source.kind.value,
        "architecture": config.architecture,
        "parameters": num_parameters(config),
        **{name: value for name, value in asdict(config).items() if name in _SHOWN},
        "chat_template": Tokenizer.load(source).has_chat_template,
        "model_hash": fingerprint(source),
    }


_SHOWN = {
    "num_layers",
    "hidden_size",
    "intermediate_size",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "vocab_size",
    "max_model_len",
    "tied_embeddings",
    "dtype",
}


def num_parameters(config: ModelConfig) -> int:
    """Weights of a model of this shape; tied ones count once."""
    hidden, middle = config.hidden_size, config.intermediate_size
    query, key_value = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention = hidden * (query + 2 * key_value) + query * hidden
    attention += (query + 2 * key_value) * config.attention_bias + hidden * config.output_bias
    attention += 2 * config.head_dim * config.qk_norm
    mlp = 3 * hidden * middle + (2 * middle + hidden) * config.mlp_bias
    norms = 2 * hidden
    embeddings = config.vocab_size * hidden * (1 if config.tied_embeddings else 2)
    return config.num_layers * (attention + mlp + norms) + embeddings + hidden
