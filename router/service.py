"""The gRPC edge: hands each call to whoever serves it, and turns errors into statuses. It decides nothing."""

from __future__ import annotations

import asyncio
import logging
from typing import NoReturn, TypeVar

import grpc

from protos import inference_pb2, inference_pb2_grpc
from router.errors import InvalidArgumentError, RequestCancelledError, RouterError
from router.session import CANCEL_PATIENCE_S, Desk, GenerateContext, Session
from router.validation import THREAD_FROM_CHARS

logger = logging.getLogger(__name__)
Q = TypeVar("Q")
A = TypeVar("A")


class InferenceService(inference_pb2_grpc.InferenceServicer):
    """pdserve.v1.Inference."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def Generate(self, request: inference_pb2.GenerateRequest, context: GenerateContext) -> None:
        """Stream a request's events; see protos/inference.proto."""
        session = Session(self._desk, request, context)
        outcome = "client_gone"
        failure: RouterError | None = None
        try:
            outcome = await session.serve()
        except RouterError as error:
            failure = error
            outcome = error.code.name.lower()
        except grpc.aio.InternalError:
            logger.debug("the client is gone", extra={"request_id": session.request_id})
        except Exception:
            failure = RouterError("the router failed; its log says why")
            outcome = "internal"
            logger.exception("request failed by a defect", extra={"request_id": session.request_id})
        finally:
            session.account(outcome, "" if failure is None else failure.message)
        if failure is not None:
            await self._tell(context, failure)

    async def _tell(self, context: GenerateContext, failure: RouterError) -> None:
        """The status; a client that does not read gets it when it does, or goes."""
        try:
            await abort(context, failure)
        except grpc.aio.InternalError:
            logger.info("the client was gone before its status: %s", failure)

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


async def abort(context: grpc.aio.ServicerContext[Q, A], error: RouterError) -> NoReturn:
    """End a call with an error's status and details."""
    await context.abort(error.code, error.message, error.trailing_metadata())
