"""Two engine hosts joined by real KV transfer, driven by commands as their fronts would send them."""

from __future__ import annotations

import itertools
import queue
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from cluster.engine_host import EngineHost
from decode_pool.config import DecodeOptions
from engine import wire
from engine.api import GenerateRequest, SamplingParams
from engine.config import CacheOptions, EngineOptions, ModelOptions
from engine.engine import Engine
from kv_transfer.config import TransferConfig
from protos import worker_pb2 as pb

TIMEOUT_S = 60.0
ROUTER = "router-0"


class Peer:
    """One worker's engine process, spoken to through its session."""

    def __init__(
        self,
        name: str,
        model: Path,
        directory: Path,
        *,
        num_blocks: int = 128,
        max_step_tokens: int = 64,
        transfer: TransferConfig | None = None,
        engine: Engine | None = None,
    ) -> None:
        if engine is None:
            cache = CacheOptions(block_size=16, num_blocks=num_blocks)
            engine = Engine(ModelOptions(path=str(model)), cache, EngineOptions(max_step_tokens=max_step_tokens))
        self.engine = engine
        self.host = EngineHost(
            engine,
            role="both",
            model_name="tiny",
            max_running=16,
            decode=DecodeOptions(),
            transfer=transfer or TransferConfig(),
            secret=b"secret",
            socket_path=str(directory / f"{name}.sock"),
        )
        self.outputs: queue.Queue[pb.TokenOutput] = queue.Queue()
        self.told = pb.WorkerStats()
        """The statistics that came last by themselves."""
        self.told_draining = False
        self._replies: dict[int, queue.Queue[pb.EngineReply]] = {}
        self._ids = itertools.count(1)
        self.host.start()
        self.session = self.host.open_session(self._take)
        self.description = self.call(
            pb.EngineCommand(start=pb.StartEngine(identity=pb.WorkerIdentity(worker_id=name, epoch=1)))
        ).description

    def __enter__(self) -> Peer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.session.close()
        self.host.stop()

    def send(self, command: pb.EngineCommand) -> queue.Queue[pb.EngineReply]:
        """Give a command; its reply will be in the queue."""
        command.call_id = next(self._ids)
        replies = self._replies[command.call_id] = queue.Queue()
        self.session.handle(command)
        return replies

    def call(self, command: pb.EngineCommand) -> pb.EngineReply:
        """Give a command and wait for its reply."""
        return self.send(command).get(timeout=TIMEOUT_S)

    def stream(self, request_id: str) -> list[int]:
        """All tokens of one request until it finishes."""
        tokens: list[int] = []
        while True:
            output = self.outputs.get(timeout=TIMEOUT_S)
            if output.request_id == request_id:
                tokens += output.token_ids
                if output.finish:
                    return tokens

    def check(self) -> pb.WorkerStats:
        """Have the engine check its books."""
        reply = self.call(pb.EngineCommand(check=pb.CheckIntegrity()))
        assert reply.WhichOneof("result") == "stats", reply.error.message
        return reply.stats

    def _take(self, event: pb.EngineEvent) -> None:
        if event.WhichOneof("event") == "reply":
            self._replies.pop(event.reply.call_id).put(event.reply)
        else:
            self.told = event.step.stats
            self.told_draining = event.step.draining
            for router in event.step.outputs:
                for output in router.outputs:
                    self.outputs.put(output)


def reserve(peer: Peer, request: GenerateRequest, *, local_prefill: bool = False) -> pb.EngineReply:
    """Ask for a ticket."""
    message = pb.ReserveRequest(
        router_id=ROUTER, request=wire.request_to_wire(request), epoch=1, local_prefill=local_prefill
    )
    return peer.call(pb.EngineCommand(reserve=message))


def start_prefill(peer: Peer, request: GenerateRequest, ticket: pb.KVTicket) -> queue.Queue[pb.EngineReply]:
    """Have a prompt computed for a ticket."""
    message = pb.PrefillRequest(router_id=ROUTER, request=wire.request_to_wire(request), epoch=1, ticket=ticket)
    return peer.send(pb.EngineCommand(prefill=message))


def split_generate(prefill: Peer, decode: Peer, request: GenerateRequest) -> list[int]:
    """One request the whole way: reserve, prefill, transfer, decode."""
    reserved = reserve(decode, request)
    assert reserved.WhichOneof("result") == "reserve", reserved.error.message
    reply = start_prefill(prefill, request, reserved.reserve.ticket).get(timeout=TIMEOUT_S)
    assert reply.WhichOneof("result") == "prefill", reply.error.message
    first = reply.prefill.first
    if first.finish:
        return list(first.token_ids)
    return [*first.token_ids, *decode.stream(request.request_id)]


def make_request(name: str, prompt: Sequence[int], **params: object) -> GenerateRequest:
    settings: dict[str, object] = {"max_tokens": 12, "ignore_eos": True} | params
    return GenerateRequest(
        request_id=name,
        prompt_token_ids=tuple(prompt),
        params=SamplingParams(**settings),  # type: ignore[arg-type]
    )
