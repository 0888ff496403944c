"""A real grpc.aio Inference server without a model: it answers by rule, so that clients can be tested.

An answer's token i is `(sum of the prompt's ids + i) % vocab_size`, its text ` w<id>`. Text prompts are
cut into their characters' code points. What a request makes it do beyond that, its prompt text says:

    fail:<status>     fails with that status (`fail:busy` with RetryInfo, `fail:field` with BadRequest)
    break:<how>       breaks the stream's contract: `gap` or `end`
    hang              sends one token, then nothing until it is cancelled
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import grpc
import grpc.aio
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import InferenceServicer, add_InferenceServicer_to_server

VOCAB_SIZE = 1000
TIMING = pb.Timing(
    queue_s=0.001,
    prefill_s=0.02,
    transfer_s=0.004,
    first_decode_step_s=0.005,
    decode_s=0.05,
    total_s=0.08,
    ttft_s=0.021,
    transfer_busy_s=0.016,
    transfer_bytes=3 << 20,
)


@dataclass
class Double(InferenceServicer):
    """The service; remembers what it was asked."""

    requests: list[pb.GenerateRequest] = field(default_factory=list)
    metadata: list[dict[str, str]] = field(default_factory=list)
    cancelled: threading.Event = field(default_factory=threading.Event)
    step_s: float = 0.0
    tokens_per_message: int = 1
    paced: bool = False
    address: str = ""
    unavailable_at: int | None = None
    """Ends a call with UNAVAILABLE instead of the token at this position; -1: before it is accepted."""
    running: dict[str, pb.GenerateRequest] = field(default_factory=dict)
    """By request_id: what may be resumed, at whoever shares this."""
    resumed_from: list[int] = field(default_factory=list)

    async def Generate(self, request, context) -> AsyncIterator[pb.GenerateEvent]:
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        prompt = prompt_ids(request)
        words = request.text if request.HasField("text") else ""
        if words.startswith("fail:"):
            await context.abort_with_status(rpc_status.to_status(failure(words)))
        if self.unavailable_at == -1:
            await context.abort_with_status(rpc_status.to_status(_status(code_pb2.UNAVAILABLE, "about to stop")))
        self.running[request.request_id or "drawn"] = request
        yield accepted(request, prompt)
        try:
            async for event in self._answer(request, prompt, words, context):
                yield event
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    async def Resume(self, request, context) -> AsyncIterator[pb.GenerateEvent]:
        self.resumed_from.append(request.next_offset)
        known = self.running[request.request_id]
        prompt = prompt_ids(known)
        yield accepted(known, prompt)
        async for event in self._answer(known, prompt, "", context, request.next_offset):
            yield event

    async def _answer(self, request, prompt, words, context, first=0) -> AsyncIterator[pb.GenerateEvent]:
        if words == "break:end":
            return
        num_tokens = request.sampling.max_tokens or 4
        ids = answer_ids(prompt, num_tokens)
        for offset in range(first, num_tokens, self.tokens_per_message):
            await asyncio.sleep(self.step_s)
            if offset == self.unavailable_at:
                await context.abort_with_status(rpc_status.to_status(_status(code_pb2.UNAVAILABLE, "about to stop")))
            part = ids[offset : offset + self.tokens_per_message]
            tokens = pb.Tokens(offset=offset + (words == "break:gap"), token_ids=part, text=answer_text(part))
            if request.sampling.HasField("logprobs"):
                tokens.logprobs.extend(logprobs(each, request.sampling.logprobs) for each in part)
            yield pb.GenerateEvent(tokens=tokens)
            if words == "hang":
                await asyncio.sleep(60)
        usage = pb.Usage(prompt_tokens=len(prompt), cached_prompt_tokens=2, completion_tokens=num_tokens)
        yield pb.GenerateEvent(
            finished=pb.Finished(
                reason=pb.FINISH_REASON_LENGTH,
                usage=usage,
                timing=TIMING,
                prefill_worker="prefill-0/1",
                decode_worker="decode-0/1",
            )
        )

    async def Cancel(self, request, context) -> pb.CancelResponse:
        return pb.CancelResponse(found=any(each.request_id == request.request_id for each in self.requests))

    async def ListModels(self, request, context) -> pb.ListModelsResponse:
        model = pb.Model(
            name="double", max_model_len=4096, vocab_size=VOCAB_SIZE, architecture="double", paced=self.paced
        )
        return pb.ListModelsResponse(models=[model])

    async def Tokenize(self, request, context) -> pb.TokenizeResponse:
        text = request.text if request.HasField("text") else chat_text(request.chat)
        return pb.TokenizeResponse(token_ids=[ord(each) for each in text], text=text)


def accepted(request: pb.GenerateRequest, prompt: list[int]) -> pb.GenerateEvent:
    return pb.GenerateEvent(
        accepted=pb.Accepted(
            request_id=request.request_id or "drawn",
            model="double",
            num_prompt_tokens=len(prompt),
            seed=request.sampling.seed,
        )
    )


def chat_text(chat: pb.Chat) -> str:
    return "".join(f"<{each.role}>{each.content}\n" for each in chat.messages) + "<assistant>"


def prompt_ids(request: pb.GenerateRequest) -> list[int]:
    if request.HasField("token_ids"):
        return list(request.token_ids.ids)
    return [ord(each) for each in (request.text if request.HasField("text") else chat_text(request.chat))]


def answer_ids(prompt: list[int], num_tokens: int) -> list[int]:
    return [(sum(prompt) + i) % VOCAB_SIZE for i in range(num_tokens)]


def answer_text(ids: list[int]) -> str:
    return "".join(f" w{each}" for each in ids)


def logprobs(token_id: int, num_top: int) -> pb.PositionLogprobs:
    top = [pb.TokenLogprob(token_id=token_id + i, logprob=-0.5 - i) for i in range(num_top)]
    return pb.PositionLogprobs(chosen=pb.TokenLogprob(token_id=token_id, logprob=-0.5), top=top)


def failure(words: str) -> status_pb2.Status:
    what = words.removeprefix("fail:")
    if what == "busy":
        retry = error_details_pb2.RetryInfo(retry_delay=Duration(seconds=1, nanos=500_000_000))
        return _status(code_pb2.RESOURCE_EXHAUSTED, "the queue is full", retry)
    if what == "field":
        violation = error_details_pb2.BadRequest.FieldViolation(field="sampling.top_p", description="too big")
        return _status(
            code_pb2.INVALID_ARGUMENT,
            "must be at most 1, got 2",
            error_details_pb2.BadRequest(field_violations=[violation]),
        )
    return _status(code_pb2.Code.Value(what), "as asked")


def _status(code: int, message: str, *details) -> status_pb2.Status:
    packed = [AnyMessage() for _ in details]
    for box, detail in zip(packed, details, strict=True):
        box.Pack(detail)
    return status_pb2.Status(code=code, message=message, details=packed)


@contextmanager
def serve(double: Double, tls: grpc.ServerCredentials | None = None) -> Iterator[Double]:
    """Run the service in a thread of its own on a free port; `double.address` says where."""
    ready, loop = threading.Event(), asyncio.new_event_loop()
    stop: asyncio.Event = asyncio.Event()

    async def main() -> None:
        server = grpc.aio.server()
        add_InferenceServicer_to_server(double, server)
        free = "127.0.0.1:0"
        port = server.add_insecure_port(free) if tls is None else server.add_secure_port(free, tls)
        double.address = f"127.0.0.1:{port}"
        await server.start()
        ready.set()
        await stop.wait()
        await server.stop(grace=0)

    thread = threading.Thread(target=loop.run_until_complete, args=(main(),), daemon=True)
    thread.start()
    assert ready.wait(10), "the double did not start in 10 s"
    try:
        yield double
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()
