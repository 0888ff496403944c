"""Errors of the router, and the gRPC status each one becomes.

RouterError                   carries a gRPC status, perhaps a field, perhaps a hint when to try again
├── InvalidArgumentError      INVALID_ARGUMENT    the request can never be served; names the field
├── ModelNotFoundError        NOT_FOUND           no such model
├── RequestNotFoundError      NOT_FOUND           no such resumable request
├── DuplicateRequestError     ALREADY_EXISTS      a request of this id is running
├── UnauthenticatedError      UNAUTHENTICATED     no API key, or an unknown one
├── OverloadedError           RESOURCE_EXHAUSTED  too many requests wait; RetryInfo
├── SlowClientError           RESOURCE_EXHAUSTED  the client reads too slowly
├── UnavailableError          UNAVAILABLE         no worker can serve, or the router drains; RetryInfo
├── DeadlineExceededError     DEADLINE_EXCEEDED   the request's time is over
├── RequestCancelledError     CANCELLED           Cancel was called
├── RequestOrphanedError      CANCELLED           nobody followed a resumable request any more
└── RequestMovedError         ABORTED             another call, or another router, goes on with it

Inside the router, never seen by a client:

WorkerError                   one attempt cannot go on
├── WorkerFullError           the worker has no room now; another one, or a later moment, may
├── PreemptedError            the worker needed its blocks for others; no failure, another attempt goes on
├── HandedBackError           the worker leaves or has changed its role; no failure, another attempt goes on
└── AttemptFailedError        the attempt is lost; another attempt may succeed
    └── WorkerLostError       the worker that served it is gone
StoreError
├── StoreUnavailableError     the Redis server did not answer within its bound
└── StaleEpochError           a newer life of this worker exists
RouterStartError              the router cannot start: port in use, unreadable key file
"""

from __future__ import annotations

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from router.info import WorkerLife

MAX_DETAIL_CHARS = 1000
"""A message travels in HTTP/2 headers, which have room for 8 KiB in all."""

DETAILS_METADATA_KEY = "grpc-status-details-bin"


class RouterError(Exception):
    """Base of what a client may be told."""

    code = grpc.StatusCode.INTERNAL

    def __init__(self, message: str, *, field: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(_shortened(message))
        self.field = field
        self.retry_after_s = retry_after_s

    @property
    def message(self) -> str:
        """What the client reads."""
        return str(self.args[0])

    def trailing_metadata(self) -> tuple[tuple[str, bytes], ...]:
        """A google.rpc.Status with BadRequest and RetryInfo where they apply, as gRPC metadata."""
        details: list[any_pb2.Any] = []
        if self.field is not None:
            violation = error_details_pb2.BadRequest.FieldViolation(field=self.field, description=self.message)
            details.append(_packed(error_details_pb2.BadRequest(field_violations=[violation])))
        if self.retry_after_s is not None:
            delay = duration_pb2.Duration()
            delay.FromMilliseconds(round(self.retry_after_s * 1000))
            details.append(_packed(error_details_pb2.RetryInfo(retry_delay=delay)))
        if not details:
            return ()
        status = status_pb2.Status(code=self.code.value[0], message=self.message, details=details)
        return ((DETAILS_METADATA_KEY, status.SerializeToString()),)


class InvalidArgumentError(RouterError):
    """The request can never be served; `field` names what is wrong with it."""

    code = grpc.StatusCode.INVALID_ARGUMENT

    def __init__(self, message: str, *, field: str) -> None:
        super().__init__(message, field=field)


class ModelNotFoundError(RouterError):
    """No such model."""

    code = grpc.StatusCode.NOT_FOUND


class DuplicateRequestError(RouterError):
    """A request of this id is running."""

    code = grpc.StatusCode.ALREADY_EXISTS


class UnauthenticatedError(RouterError):
    """No API key, or an unknown one."""

    code = grpc.StatusCode.UNAUTHENTICATED


class OverloadedError(RouterError):
    """Too many requests wait already."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class SlowClientError(RouterError):
    """The client lags too far behind its own stream."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class UnavailableError(RouterError):
    """Nobody can serve the request now."""

    code = grpc.StatusCode.UNAVAILABLE


class DeadlineExceededError(RouterError):
    """The request's time is over."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class RequestCancelledError(RouterError):
    """Cancel was called for the request."""

    code = grpc.StatusCode.CANCELLED


class RequestNotFoundError(RouterError):
    """No such resumable request is known."""

    code = grpc.StatusCode.NOT_FOUND


class RequestOrphanedError(RouterError):
    """Nobody followed a resumable request any more."""

    code = grpc.StatusCode.CANCELLED


class RequestMovedError(RouterError):
    """Another call, or another router, goes on with the request."""

    code = grpc.StatusCode.ABORTED


class WorkerError(Exception):
    """One attempt cannot go on; `worker` is who is to be left alone, if anybody in particular."""

    def __init__(self, message: str, *, worker: WorkerLife | None = None) -> None:
        super().__init__(message)
        self.worker = worker


class WorkerFullError(WorkerError):
    """The worker has no room now."""


class PreemptedError(WorkerError):
    """The worker gave the request back, for its blocks were needed by others."""


class HandedBackError(WorkerError):
    """The worker gave the request back, for it leaves or has changed its role."""


class AttemptFailedError(WorkerError):
    """The attempt is lost; another may succeed."""


class WorkerLostError(AttemptFailedError):
    """The connection to a worker ended: everything it did for this router is over."""


class StoreError(Exception):
    """Base of the store's errors."""


class StoreUnavailableError(StoreError):
    """The store did not answer within its bound."""


class StaleEpochError(StoreError):
    """A newer life of this worker exists; the older one must stop serving."""


class RouterStartError(Exception):
    """The router cannot start."""


def _packed(message: error_details_pb2.BadRequest | error_details_pb2.RetryInfo) -> any_pb2.Any:
    box = any_pb2.Any()
    box.Pack(message)
    return box


def _shortened(message: str) -> str:
    return message if len(message) <= MAX_DETAIL_CHARS else message[: MAX_DETAIL_CHARS - 1] + "…"
