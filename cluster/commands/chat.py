"""`pdserve chat`: a conversation with the model, at a terminal or over a pipe.

The whole conversation goes with every question; the server's chat template makes the prompt of it.
At a terminal, Ctrl-C while an answer comes cancels that answer and keeps the part that came.
With piped stdin each line is a question of the same conversation, and only answers are printed.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import click

from cluster.answer import Answer
from cluster.client import Client, ClientError, Endpoint
from cluster.commands.client_options import client_errors, endpoint_options, sampling_options
from cluster.commands.streaming import stream_into
from cluster.waterfall import waterfall
from protos.inference_pb2 import Chat, ChatMessage, FinishReason, GenerateRequest, Sampling

_HELP = "/reset forgets the conversation, /system TEXT starts a new one under a system message, /timing on|off, /quit"
_EPILOG = """\b
Examples:
  pdserve chat
  pdserve chat -m "What is the capital of France?"
  printf 'Name a planet.\\nAnother one.\\n' | pdserve chat
  pdserve chat --system "Answer in one word." --temperature 0.7 --seed 1
\b
At the prompt: /reset forgets the conversation, /system TEXT starts a new one
under a system message, /timing on|off shows where the time went, /quit ends.
"""


@dataclass(slots=True)
class Conversation:
    """The messages so far; a question enters with its answer, so that a failed one leaves no trace."""

    sampling: Sampling
    system: str | None = None
    turns: list[ChatMessage] = field(default_factory=list)

    def request(self, question: str) -> GenerateRequest:
        """The request that asks this question next."""
        system = [ChatMessage(role="system", content=self.system)] if self.system is not None else []
        asked = ChatMessage(role="user", content=question)
        return GenerateRequest(chat=Chat(messages=[*system, *self.turns, asked]), sampling=self.sampling)

    def record(self, question: str, answer: str) -> None:
        """Make the question and its answer part of the conversation."""
        self.turns.append(ChatMessage(role="user", content=question))
        self.turns.append(ChatMessage(role="assistant", content=answer))

    def reset(self) -> None:
        """Forget all turns; the system message stays."""
        self.turns.clear()


@click.command(epilog=_EPILOG)
@click.option("-m", "--message", metavar="TEXT", help="Ask this one question and end.")
@click.option("--system", metavar="TEXT", help="A system message before the conversation.")
@sampling_options
@click.option("--timing/--no-timing", default=None, help="Draw where the time went. Default: at a terminal.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line instead of each answer.")
@endpoint_options
@client_errors
def chat(
    endpoint: Endpoint,
    sampling: Sampling,
    message: str | None,
    system: str | None,
    timing: bool | None,
    as_json: bool,
) -> None:
    """Chat with the model: greedy unless the options say otherwise."""
    session = Session(
        Conversation(sampling=sampling, system=system),
        timing=sys.stdout.isatty() and not as_json if timing is None else timing,
        as_json=as_json,
    )
    with asyncio.Runner() as runner:
        client = runner.run(_connect(endpoint))
        try:
            if message is not None:
                session.ask(runner, client, message)
            elif sys.stdin.isatty() and sys.stdout.isatty():
                session.talk(runner, client)
            else:
                session.answer_all(runner, client, _piped_lines())
        finally:
            runner.run(client.close())


async def _connect(endpoint: Endpoint) -> Client:
    return Client(endpoint)


def _piped_lines() -> Iterator[str]:
    try:
        for line in sys.stdin:
            if line.strip():
                yield line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise click.UsageError(f"the questions must be UTF-8: {error}") from error


class _QuitError(Exception):
    """The user has asked to end."""


@dataclass(slots=True)
class Session:
    """A conversation and how it is shown."""

    conversation: Conversation
    timing: bool
    as_json: bool

    def talk(self, runner: asyncio.Runner, client: Client) -> None:
        """Ask at the terminal until /quit or the end of input."""
        import readline  # noqa: F401  line editing and history for input()

        click.echo(_HELP, err=True)
        while True:
            try:
                question = input("> ")
            except KeyboardInterrupt:
                click.echo()
                continue
            except EOFError:
                click.echo()
                return
            try:
                if question.strip() and not self.obey(question.strip()):
                    self.ask(runner, client, question)
            except _QuitError:
                return
            except ClientError as error:
                click.echo(f"Error: {error}", err=True)
            except click.ClickException as error:
                error.show()

    def answer_all(self, runner: asyncio.Runner, client: Client, questions: Iterator[str]) -> None:
        """Answer one question after another; the first that fails ends it."""
        for question in questions:
            try:
                if not self.obey(question.strip()):
                    self.ask(runner, client, question)
            except _QuitError:
                return

    def obey(self, line: str) -> bool:
        """Carry out a line that is a command; False where it is none."""
        if not line.startswith("/"):
            return False
        command, _, argument = line.partition(" ")
        match command, argument.strip():
            case "/quit" | "/exit", "":
                raise _QuitError
            case "/help", "":
                click.echo(_HELP, err=True)
            case "/reset", "":
                self.conversation.reset()
            case "/system", text:
                self.conversation.reset()
                self.conversation.system = text or None
            case "/timing", "on" | "off" as state:
                self.timing = state == "on"
            case _:
                raise click.ClickException(f"unknown command {line!r}: {_HELP}")
        return True

    def ask(self, runner: asyncio.Runner, client: Client, question: str) -> None:
        """Stream the answer to a question; Ctrl-C at a terminal cancels it and keeps what came."""
        answer = Answer()
        try:
            request = self.conversation.request(question)
            runner.run(stream_into(answer, client, request, echo=not self.as_json))
        except UnicodeError as error:
            raise click.UsageError(f"the question must be UTF-8: {error}") from error
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            click.echo("(cancelled)", err=True)
            if answer.text:
                self.conversation.record(question, answer.text)
            return
        self.conversation.record(question, answer.text)
        self._print_end(question, answer)

    def _print_end(self, question: str, answer: Answer) -> None:
        click.echo(json.dumps({"question": question, **answer.as_json()}, ensure_ascii=False) if self.as_json else "")
        if answer.finished is None:
            return
        if answer.finished.reason == FinishReason.FINISH_REASON_LENGTH and sys.stdout.isatty():
            click.echo("(cut off at the most tokens allowed: --max-tokens)", err=True)
        if self.timing:
            click.echo(waterfall(answer.finished), err=True)
