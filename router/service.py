"""The gRPC edge: hands each call to whoever serves it, and turns errors into statuses. It decides nothing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from typing import Any, NoReturn, TypeVar

import grpc

from protos import inference_pb2, inference_pb2_grpc
from router.errors import InvalidArgumentError, RequestCancelledError, RouterError
from router.runs import Run, Runs
from router.session import CANCEL_PATIENCE_S, Desk, Session
from router.validation import THREAD_FROM_CHARS

logger = logging.getLogger(__name__)
Q = TypeVar("Q")
A = TypeVar("A")


GenerateContext = grpc.aio.ServicerContext[inference_pb2.GenerateRequest, inference_pb2.GenerateEvent]
ResumeContext = grpc.aio.ServicerContext[inference_pb2.ResumeRequest, inference_pb2.GenerateEvent]


class InferenceService(inference_pb2_grpc.InferenceServicer):
    """pdserve.v1.Inference."""

    def __init__(self, desk: Desk, runs: Runs) -> None:
        self._desk = desk
        self._runs = runs

    async def Generate(self, request: inference_pb2.GenerateRequest, context: GenerateContext) -> None:
        """Stream a request's events; see protos/inference.proto."""
        if request.resumable:
            await self._follow(self._runs.generate(request, context.invocation_metadata()), 0, context)
            return
        failure = await Session(self._desk, request, context).serve_to_the_end()
        if failure is not None:
            _tell(context, failure)

    async def Resume(self, request: inference_pb2.ResumeRequest, context: ResumeContext) -> None:
        """Go on with a resumable request; see protos/inference.proto."""
        await self._follow(
            self._runs.find(request.request_id, request.next_offset, context.invocation_metadata()),
            request.next_offset,
            context,
        )

    async def _follow(
        self, finding: Awaitable[Run], next_offset: int, context: GenerateContext | ResumeContext
    ) -> None:
        """Tell what a run says, until it ends, the client goes, or another call goes on with it."""
        failure: RouterError | None = None
        try:
            await self._runs.follow(await finding, next_offset, context)
        except RouterError as error:
            failure = error.with_traceback(None)
        except grpc.aio.InternalError:
            logger.debug("the client is gone")
        if failure is not None:
            _tell(context, failure)

    async def Cancel(
        self,
        request: inference_pb2.CancelRequest,
        context: grpc.aio.ServicerContext[inference_pb2.CancelRequest, inference_pb2.CancelResponse],
    ) -> inference_pb2.CancelResponse:
        """End a running request."""
        scope = self._desk.running.get(request.request_id)
        cancelled = RequestCancelledError("the request was cancelled")
        return inference_pb2.CancelResponse(found=scope is not None and scope.interrupt(cancelled, CANCEL_PATIENCE_S))

    async def ListModels(
        self,
        request: inference_pb2.ListModelsRequest,
        context: grpc.aio.ServicerContext[inference_pb2.ListModelsRequest, inference_pb2.ListModelsResponse],
    ) -> inference_pb2.ListModelsResponse:
        """Name the served model."""
        model = self._desk.model
        described = inference_pb2.Model(
            name=model.name,
            max_model_len=model.max_model_len,
            vocab_size=model.vocab_size,
            architecture=model.architecture,
            paced=self._desk.fleet.is_paced,
        )
        return inference_pb2.ListModelsResponse(models=[described])

    async def Tokenize(
        self,
        request: inference_pb2.TokenizeRequest,
        context: grpc.aio.ServicerContext[inference_pb2.TokenizeRequest, inference_pb2.TokenizeResponse],
    ) -> inference_pb2.TokenizeResponse:
        """Cut a prompt into tokens."""
        try:
            if request.ByteSize() < THREAD_FROM_CHARS:
                return self._tokenize(request)
            return await asyncio.to_thread(self._tokenize, request)
        except RouterError as error:
            await abort(context, error)

    def _tokenize(self, request: inference_pb2.TokenizeRequest) -> inference_pb2.TokenizeResponse:
        model = self._desk.model
        model.check_name(request.model)
        if request.HasField("text") == request.HasField("chat"):
            given = "both" if request.HasField("text") else "none"
            raise InvalidArgumentError(f"exactly one of text and chat must be set, got {given}", field="prompt")
        if request.HasField("text"):
            return inference_pb2.TokenizeResponse(token_ids=model.encode_text(request.text), text=request.text)
        text = model.render_chat(request.chat)
        return inference_pb2.TokenizeResponse(token_ids=model.encode_rendered(text), text=text)


def _tell(context: grpc.aio.ServicerContext[Any, Any], failure: RouterError) -> None:
    """The status with which a stream ends when its handler returns.

    Not by `abort`: its exception and the frames it passed are garbage in a circle, a few dozen objects a refusal, and
    under an overload the collector's pauses are what other requests wait for.
    """
    context.set_code(failure.code)
    context.set_details(failure.message)
    context.set_trailing_metadata(failure.trailing_metadata())


async def abort(context: grpc.aio.ServicerContext[Q, A], error: RouterError) -> NoReturn:
    """End a call with an error's status and details."""
    await context.abort(error.code, error.message, error.trailing_metadata())
