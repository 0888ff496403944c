"""`pdserve generate`: one prompt, its answer streamed to stdout as it comes."""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import dataclass
from typing import Any

import click

from cluster.answer import Answer
from cluster.client import Client, Endpoint
from cluster.commands.client_options import client_errors, endpoint_options, sampling_options, set_field
from cluster.commands.streaming import stream_into
from cluster.waterfall import waterfall
from protos.inference_pb2 import Chat, ChatMessage, GenerateRequest, Sampling, TokenIds

_EPILOG = """\b
Examples:
  pdserve generate "Once upon a time" --max-tokens 40
  pdserve generate --chat "What is the capital of France?" --timing
  pdserve generate --tokens 504,28,338 --max-tokens 8 --json
  git log -3 | pdserve generate - --temperature 0.8 --seed 7
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Output:
    """What is printed, and when."""

    stream: bool
    """Print text as it comes, not at the end."""
    timing: bool
    """Draw the waterfall on stderr."""
    as_json: bool
    """Print one JSON object instead of text."""


@click.command(epilog=_EPILOG)
@click.argument("prompt", required=False)
@click.option("--chat", is_flag=True, help="Send the prompt as a user's message, through the model's chat template.")
@click.option("--system", metavar="TEXT", help="With --chat: a system message before it.")
@click.option("--tokens", metavar="IDS", help="Send these token ids, separated by commas, instead of a prompt.")
@sampling_options
@click.option("--logprobs", type=int, metavar="N", help="Report log-probabilities and N alternatives of each token.")
@click.option("--ignore-eos", is_flag=True, help="Go on past the model's end-of-sequence token.")
@click.option("--deadline", type=float, metavar="SECONDS", help="Give up after this long. Default: the server's.")
@click.option("--model", default="", help="Default: the served model.")
@click.option("--stream/--no-stream", default=True, help="Print text as it comes (default), or at the end.")
@click.option("--timing", is_flag=True, help="Draw where the time went, on stderr.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end: text, token ids, timing.")
@endpoint_options
@client_errors
def generate(endpoint: Endpoint, sampling: Sampling, stream: bool, timing: bool, as_json: bool, **options: Any) -> None:
    """Generate from PROMPT (- reads stdin) and stream the answer to stdout."""
    request = _make_request(sampling=sampling, **options)
    request.explain = timing or as_json
    output = Output(stream=stream and not as_json, timing=timing, as_json=as_json)
    asyncio.run(_generate(endpoint, request, output))


def _make_request(sampling: Sampling, prompt: str | None, system: str | None, **options: Any) -> GenerateRequest:
    request = GenerateRequest(model=options["model"])
    if (prompt is None) == (options["tokens"] is None):
        raise click.UsageError("give one of PROMPT, - (to read stdin) and --tokens")
    if options["tokens"] is not None and options["chat"]:
        raise click.UsageError("--chat needs a PROMPT, not --tokens")
    if system is not None and not options["chat"]:
        raise click.UsageError("--system needs --chat")
    if prompt is None:
        request.token_ids.CopyFrom(_parse_tokens(options["tokens"]))
    else:
        _add_prompt(request, prompt, chat=options["chat"], system=system)
    request.sampling.CopyFrom(sampling)
    set_field(request.sampling, "ignore_eos", options["ignore_eos"] or None)
    set_field(request.sampling, "logprobs", options["logprobs"])
    if options["deadline"] is not None:
        request.deadline_s = options["deadline"]
    return request


def _add_prompt(request: GenerateRequest, prompt: str, *, chat: bool, system: str | None) -> None:
    try:
        text = sys.stdin.buffer.read().decode() if prompt == "-" else prompt
        if chat:
            request.chat.CopyFrom(_make_chat(text, system))
        else:
            request.text = text
    except UnicodeError as error:
        raise click.UsageError(f"the prompt must be UTF-8: {error}") from error


def _make_chat(text: str, system: str | None) -> Chat:
    messages = [ChatMessage(role="user", content=text)]
    if system is not None:
        messages.insert(0, ChatMessage(role="system", content=system))
    return Chat(messages=messages)


def _parse_tokens(text: str) -> TokenIds:
    try:
        return TokenIds(ids=[int(each) for each in text.split(",") if each.strip()])
    except ValueError as error:
        raise click.UsageError(f"--tokens must be ids separated by commas, as in 1,2,3: {error}") from error


async def _generate(endpoint: Endpoint, request: GenerateRequest, output: Output) -> None:
    answer = Answer()
    async with Client(endpoint) as client:
        await stream_into(answer, client, request, echo=output.stream)
    _print_end(answer, output)


def _print_end(answer: Answer, output: Output) -> None:
    if output.as_json:
        click.echo(json.dumps(answer.as_json(), ensure_ascii=False))
    else:
        click.echo("" if output.stream else answer.text)
        for position in answer.logprobs:
            others = "".join(f"  {other.token_id}:{other.logprob:.4f}" for other in position.top)
            click.echo(f"{position.chosen.token_id}:{position.chosen.logprob:.4f}{others}", err=True)
    if output.timing and answer.finished is not None:
        click.echo(waterfall(answer.finished), err=True)
