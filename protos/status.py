"""An engine's refusal as a gRPC status."""

from __future__ import annotations

from typing import Any, NoReturn, Protocol

import grpc

from protos import worker_pb2 as pb


class Refusing(Protocol):
    """What ends a call with a status; a gRPC context."""

    async def abort(self, code: grpc.StatusCode, details: str) -> NoReturn:
        """Raises."""


async def refuse(context: Refusing | grpc.aio.ServicerContext[Any, Any], error: pb.EngineError) -> NoReturn:
    """End the call with the status that the error names (INTERNAL if it names none)."""
    code = getattr(grpc.StatusCode, error.status, grpc.StatusCode.INTERNAL)
    await context.abort(code, error.message)
    raise AssertionError("abort returned")
