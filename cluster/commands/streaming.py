"""Prints an answer while it comes."""

from __future__ import annotations

from contextlib import aclosing

import click

from cluster.answer import Answer
from cluster.client import Client
from protos.inference_pb2 import GenerateRequest


async def stream_into(answer: Answer, client: Client, request: GenerateRequest, *, echo: bool) -> None:
    """Run the request to its end; `answer` takes in what came, even where it ends early. `echo` prints the text."""
    try:
        async with aclosing(client.generate(request)) as events:
            async for event in events:
                text = answer.add(event)
                if echo and text:
                    click.echo(text, nl=False)
    except BaseException:
        if echo and answer.text:
            click.echo()  # the message that follows starts a line of its own
        raise
