"""The inbox of one attempt."""

from __future__ import annotations

import asyncio

from protos import worker_pb2
from router.inbox import Inbox
from tests.router.harness import run


def test_inbox_gives_everything_at_once_and_drops_other_attempts() -> None:
    async def scenario() -> None:
        overflows: list[bool] = []
        inbox = Inbox("r", 1, 3, lambda: overflows.append(True))
        taking = asyncio.create_task(inbox.take())
        await asyncio.sleep(0)
        old = worker_pb2.TokenOutput(attempt=0, token_ids=[9])
        new = [worker_pb2.TokenOutput(attempt=1, offset=index, token_ids=[index]) for index in range(3)]
        for output in [old, *new]:
            inbox.put_output(output)
        assert await taking == new
        assert not overflows
        for index in range(4):
            inbox.put_output(worker_pb2.TokenOutput(attempt=1, offset=index, token_ids=[index]))
        assert overflows == [True]

    run(scenario())
