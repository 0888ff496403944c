"""What every call to the router passes first: the API key, and a parser that answers instead of failing.

The key is an interceptor, where keys are asked for. The parser is built into the handlers: an interceptor costs each
call a task.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from router.errors import InvalidArgumentError, RouterError, UnauthenticatedError
from router.tenants import Tenants

HEALTH_PREFIX = "/grpc.health.v1.Health/"
Continuation = Callable[[grpc.HandlerCallDetails], Awaitable["grpc.RpcMethodHandler[Any, Any]"]]


class ApiKeys(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Lets a call in only with `authorization: Bearer <key>`; health checks need none."""

    def __init__(self, tenants: Tenants) -> None:
        self._tenants = tenants

    async def intercept_service(
        self, continuation: Continuation, details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """Replace the handler of a call without a valid key by a refusal."""
        if details.method.startswith(HEALTH_PREFIX) or self._tenants.knows_key(details.invocation_metadata):
            return await continuation(details)
        return _refusal(UnauthenticatedError("send metadata `authorization: Bearer <key>` with a valid API key"))


@dataclass(frozen=True, slots=True)
class _Malformed:
    """Stands for a request that could not be parsed."""

    error: InvalidArgumentError


class StrictParsing:
    """Stands for the server while a service is added: bytes that are no message (or not UTF-8 where text is due) are
    then answered with INVALID_ARGUMENT."""

    def __init__(self, server: grpc.aio.Server) -> None:
        self._server = server

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler[Any, Any]]) -> None:
        """Nothing: the same handlers come by name."""

    def add_registered_method_handlers(
        self, service: str, handlers: Mapping[str, grpc.RpcMethodHandler[Any, Any]]
    ) -> None:
        """Add a service's methods, each with a parser and a behaviour that are wrapped."""
        strict = {name: _guarded(handler) for name, handler in handlers.items()}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, strict),))
        self._server.add_registered_method_handlers(service, strict)  # type: ignore[attr-defined]


def _guarded(handler: Any) -> Any:
    name = "unary_stream" if handler.response_streaming else "unary_unary"
    return handler._replace(
        request_deserializer=_strict(handler.request_deserializer),
        **{name: _answering(getattr(handler, name))},
    )


def _strict(parse: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def parse_or_tell(data: bytes) -> Any:
        try:
            return parse(data)
        except DecodeError as error:
            text = f"the request's {len(data)} bytes are not a valid message: {error}"
            return _Malformed(InvalidArgumentError(text, field="request"))

    return parse_or_tell


def _answering(behaviour: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any], Awaitable[Any]]:
    async def answer(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        if isinstance(request, _Malformed):
            await context.abort(request.error.code, request.error.message, request.error.trailing_metadata())
        return await behaviour(request, context)

    return answer


def _refusal(error: RouterError) -> grpc.RpcMethodHandler[Any, Any]:
    async def refuse(request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        await context.abort(error.code, error.message, error.trailing_metadata())

    return grpc.unary_unary_rpc_method_handler(refuse)
