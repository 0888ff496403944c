"""The console command `pdserve`: a group whose commands are imported only when they are called.

`pdserve generate --help` must not pay for Ray, nor `pdserve validate` for torch.
"""

from __future__ import annotations

import importlib

import click

COMMANDS = {
    "up": "cluster.commands.lifecycle:up",
    "down": "cluster.commands.lifecycle:down",
    "status": "cluster.commands.status:status",
    "plan-diff": "cluster.commands.plan_diff:plan_diff",
    "apply": "cluster.commands.apply:apply",
    "scale": "cluster.commands.scale:scale",
    "restart": "cluster.commands.scale:restart",
    "history": "cluster.commands.history:history",
    "validate": "cluster.commands.config_commands:validate",
    "config": "cluster.commands.config_commands:config",
    "generate": "cluster.commands.generate:generate",
    "chat": "cluster.commands.chat:chat",
    "bench": "cluster.commands.bench:bench",
    "demo": "cluster.commands.demo:demo",
    "model": "cluster.commands.model:model",
}
"""Command name -> `module:attribute` of its click command, in the order of `pdserve --help`."""


class LazyGroup(click.Group):
    """A click group that imports a command's module when that command is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of COMMANDS."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, or None where there is none."""
        target = COMMANDS.get(cmd_name)
        if target is None:
            return None
        module, _, attribute = target.partition(":")
        command = getattr(importlib.import_module(module), attribute)
        if not isinstance(command, click.Command):
            raise TypeError(f"{target} must be a click command, got {type(command).__name__}")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands with their one-line help, without importing any of them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, SUMMARIES[name]) for name in COMMANDS])


SUMMARIES = {
    "up": "Start the cluster that a YAML describes.",
    "down": "Drain and stop the cluster.",
    "status": "Show what runs, and how it is.",
    "plan-diff": "Show what applying a YAML would change, and what that needs.",
    "apply": "Make the cluster that runs what a YAML says.",
    "scale": "Set how many workers a pool has.",
    "restart": "Replace processes one after another.",
    "history": "Show what was decided, by whom, and why.",
    "validate": "Check a YAML without starting anything.",
    "config": "Help for writing the YAML.",
    "generate": "Generate from one prompt and stream the answer.",
    "chat": "Chat with the model.",
    "bench": "Load the cluster and report latency and throughput.",
    "demo": "Start a small cluster, ask it one question, show the timing.",
    "model": "Fetch and inspect models.",
}


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="pdserve", prog_name="pdserve")
def main() -> None:
    """Serve a large language model with prefill and decode in separate pools."""
