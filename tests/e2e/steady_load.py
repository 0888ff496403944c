"""A steady load on the real cluster beside which a test does things: every answer must be the one that is known."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType

import grpc
import grpc.aio

from protos import inference_pb2 as pb
from protos import inference_pb2_grpc
from tests.mini_cluster import Answer

PAUSE_S = 0.1
"""Before a client that was refused by all routers tries again."""
PATIENCE_S = 30.0
"""How long a client tries."""


@dataclass(frozen=True)
class Known:
    """A request, and what must come of it."""

    request: pb.GenerateRequest
    token_ids: list[int]


@dataclass
class Seen:
    """What became of the load."""

    answered: int = 0
    wrong: list[str] = field(default_factory=list)
    """Answers that were not the known ones, or had a gap or a repeat, and requests that failed."""
    went_on: int = 0
    """Requests that a router refused before their first token, and another one took."""


class SteadyLoad:
    """So many clients, each of which asks the next request when its last is answered, of one router after another."""

    def __init__(self, addresses: Sequence[str], known: Sequence[Known], num_clients: int) -> None:
        self.seen = Seen()
        self._addresses = addresses
        self._known = known
        self._num_clients = num_clients
        self._over = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="steady load")

    def __enter__(self) -> SteadyLoad:
        self._thread.start()
        self.until_answered(self._num_clients)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        self._thread.join(120.0)
        assert not self._thread.is_alive(), "the load did not end"
        if error is None:
            assert not self.seen.wrong, self.seen.wrong[:3]

    def until_answered(self, more: int, timeout_s: float = 60.0) -> None:
        """Wait until so many more requests are answered."""
        goal, until = self.seen.answered + more, time.monotonic() + timeout_s
        while self.seen.answered < goal and not self.seen.wrong:
            assert time.monotonic() < until, f"{goal - self.seen.answered} answers are missing after {timeout_s} s"
            time.sleep(0.05)

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(self._num_clients):
                group.create_task(self._client(number))

    async def _client(self, number: int) -> None:
        channels = [grpc.aio.insecure_channel(address) for address in self._addresses]
        stubs = [inference_pb2_grpc.InferenceStub(channel) for channel in channels]
        try:
            while not self._over.is_set():
                known = self._known[number % len(self._known)]
                await self._ask(stubs[number % len(stubs) :] + stubs[: number % len(stubs)], known)
                number += self._num_clients + 1
        finally:
            for channel in channels:
                await channel.close()

    async def _ask(self, stubs: Sequence[inference_pb2_grpc.InferenceStub], known: Known) -> None:
        until, why = time.monotonic() + PATIENCE_S, ""
        while time.monotonic() < until:
            for stub in stubs:
                answer = Answer()
                try:
                    async for event in stub.Generate(known.request, timeout=90):
                        answer.take(event)
                except grpc.aio.AioRpcError as error:
                    why = f"{error.code().name}: {error.details()}"
                    if error.code() is grpc.StatusCode.UNAVAILABLE and not answer.token_ids:
                        self.seen.went_on += 1
                        continue
                    self.seen.wrong.append(f"failed after {len(answer.token_ids)} tokens: {why}")
                    return
                except AssertionError as error:
                    self.seen.wrong.append(f"a broken stream: {error}")
                    return
                if answer.token_ids != known.token_ids:
                    self.seen.wrong.append(f"other tokens: {answer.token_ids[:8]}, not {known.token_ids[:8]}")
                self.seen.answered += 1
                return
            await asyncio.sleep(PAUSE_S)
        self.seen.wrong.append(f"no router took it for {PATIENCE_S:g} s: {why}")
