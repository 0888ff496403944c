"""A server in the router's place that does nothing but write: what gRPC and the clients cost by themselves.

It speaks pdserve.v1.Inference to the same clients, steps at the same pace as the workers would, and has each message as
bytes before it is due. Its streams are shared by as many steppers as there would be workers.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import grpc

from benchmarks.router_clients import GENERATE
from benchmarks.router_worker import FIRST_TOKEN_ID, NUM_TOKEN_IDS, Pace
from cluster import niceness
from protos import inference_pb2 as pb

Context = grpc.aio.ServicerContext[Any, Any]


class DirectSide(grpc.GenericRpcHandler):
    """The server; its methods are those of the workers and of a router."""

    def __init__(self, num_groups: int, credits: Connection) -> None:
        """Each byte of `credits` lets every group take a step."""
        self._credits = credits
        self._groups = [_Group() for _ in range(num_groups)]
        self._num_came = 0

    async def start(self) -> str:
        """Listen; gives host:port."""
        asyncio.get_running_loop().add_reader(self._credits.fileno(), self._hear)
        self._server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
        self._server.add_generic_rpc_handlers((self,))
        port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        niceness.poller_gives_way()
        return f"127.0.0.1:{port}"

    async def set_pace(self, pace: Pace) -> None:
        """Begin anew; nothing may run."""
        self._pace, self._num_came = pace, 0
        for group in self._groups:
            group.reset(pace)

    async def sent_at(self) -> dict[tuple[str, str], list[float]]:
        """As of workers: when each step was."""
        return {(f"d{index}", "direct"): group.sent_at for index, group in enumerate(self._groups)}

    async def stop(self) -> None:
        """Give the port back."""
        await self._server.stop(None)

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Generate alone."""
        if handler_call_details.method != GENERATE:
            return None
        handler: Callable[..., Any] = self._generate
        return grpc.unary_stream_rpc_method_handler(handler, request_deserializer=pb.GenerateRequest.FromString)

    async def _generate(self, request: pb.GenerateRequest, context: Context) -> None:
        index = self._num_came % len(self._groups)
        group, num_tokens = self._groups[index], request.sampling.max_tokens
        queue: asyncio.Queue[bytes] = asyncio.Queue()
        group.queues.append(queue)
        await context.write(pb.GenerateEvent(accepted={}).SerializeToString())
        self._num_came += 1
        if self._num_came == self._pace.num_streams:
            phases = [each / len(self._groups) for each in range(len(self._groups))]
            self._stepping = [
                asyncio.create_task(each.steps(num_tokens, phase))
                for each, phase in zip(self._groups, phases, strict=True)
            ]
        for _ in range(num_tokens):
            await context.write(await queue.get())
        last = pb.Finished(decode_worker=f"d{index}/1")
        await context.write(pb.GenerateEvent(finished=last).SerializeToString())

    def _hear(self) -> None:
        for _ in self._credits.recv_bytes():
            for group in self._groups:
                group.credit.release()


class _Group:
    """Streams whose tokens come in the same steps."""

    def __init__(self) -> None:
        self.reset(Pace())

    def reset(self, pace: Pace) -> None:
        self._step_s = pace.step_s
        self.queues: list[asyncio.Queue[bytes]] = []
        self.sent_at: list[float] = []
        self.credit = asyncio.Semaphore(pace.window)

    async def steps(self, num_tokens: int, phase: float) -> None:
        due = time.monotonic() + (phase - 1) * self._step_s
        for offset in range(num_tokens):
            due += self._step_s
            tokens = pb.Tokens(offset=offset, token_ids=(FIRST_TOKEN_ID + offset % NUM_TOKEN_IDS,), text="a")
            message = pb.GenerateEvent(tokens=tokens).SerializeToString()
            if not self._step_s:
                await self.credit.acquire()
            elif (left_s := due - time.monotonic()) > 0:
                await asyncio.sleep(left_s)
            self.sent_at.append(time.monotonic())
            for queue in self.queues:
                queue.put_nowait(message)
