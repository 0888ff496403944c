"""Who may call a worker: the cluster's own routers, which know its secret."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from protos.auth import WORKER_METADATA_KEY, same_key

STREAMS = ("/Attach", "/OpenReserve", "/OpenPrefill")
"""The methods that take a stream."""


class WorkerKeyCheck(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Lets in only callers who know the cluster secret."""

    def __init__(self, key: str) -> None:
        self._key = key

        async def refuse(_request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "this port is for the cluster's own routers")

        self._refusals = {
            False: grpc.unary_unary_rpc_method_handler(refuse),
            True: grpc.stream_stream_rpc_method_handler(refuse),
        }

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """Refuse a call whose metadata lacks the key."""
        metadata = dict(handler_call_details.invocation_metadata or ())
        if same_key(str(metadata.get(WORKER_METADATA_KEY, "")), self._key):
            return await continuation(handler_call_details)
        return self._refusals[handler_call_details.method.endswith(STREAMS)]
