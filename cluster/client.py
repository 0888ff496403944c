"""A typed client of the Inference service: for the command line, the load generator and programs.

    async with Client(Endpoint(address="127.0.0.1:50051")) as client:
        async for event in client.generate(GenerateRequest(text="Once upon a time")):
            print(event.tokens.text, end="")

Given the addresses of several routers of a cluster, a client that one of them refuses with UNAVAILABLE goes on at the
next one: a plain request until its first token, a resumable one at any time.

ClientError
├── NoClusterError       nothing serves there
├── StatusError          the server refused or ended the call with a gRPC status
└── BrokenStreamError    a stream broke its contract (a gap, a repeat, no end): a defect
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc
import grpc.aio
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from cluster.run_dir import Phase, RunDir
from protos.inference_pb2 import (
    CancelRequest,
    Chat,
    GenerateEvent,
    GenerateRequest,
    ListModelsRequest,
    Model,
    ResumeRequest,
    TokenizeRequest,
    TokenizeResponse,
)
from protos.inference_pb2_grpc import InferenceStub

UNARY_TIMEOUT_S = 10.0
"""Bound of a call that generates nothing."""
DEADLINE_GRACE_S = 5.0
"""How much longer than its own deadline a stream is waited for, so that the server's word arrives."""
_CHANNEL_OPTIONS = (
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.max_receive_message_length", 64 << 20),
)


class ClientError(Exception):
    """Base of all client errors; its text says what happened and what to do."""


class NoClusterError(ClientError):
    """Nothing serves there."""


class BrokenStreamError(ClientError):
    """A stream with a gap, a repeat or no end: a defect of the server."""


class StatusError(ClientError):
    """The server refused or ended a call with a gRPC status."""

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        *,
        field: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(_explain(code, message, field, retry_after_s))
        self.code = code
        self.message = message
        self.field = field
        """The request's field that is wrong, where the server named one."""
        self.retry_after_s = retry_after_s
        """After how many seconds trying again may help, where the server said so."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Endpoint:
    """Where a server is and how to speak to it."""

    address: str
    """host:port."""
    api_key: str | None = None
    """Sent with every call as `authorization: Bearer <key>`."""
    tls_ca: Path | None = None
    """PEM file of the authorities that may have signed the server's certificate; None: no TLS."""

    def __post_init__(self) -> None:
        host, colon, port = self.address.rpartition(":")
        if not host or not colon or not port.isdigit() or not 0 < int(port) < 65536:
            raise ValueError(f"address must be host:port, got {self.address!r}")
        if self.api_key is not None and not (self.api_key and self.api_key.isascii() and self.api_key.isprintable()):
            raise ValueError("api_key must be printable ASCII and not empty")

    def channel(self) -> grpc.aio.Channel:
        """A new channel; connects on its first call."""
        if self.tls_ca is None:
            return grpc.aio.insecure_channel(self.address, options=_CHANNEL_OPTIONS)
        credentials = grpc.ssl_channel_credentials(self.tls_ca.read_bytes())
        return grpc.aio.secure_channel(self.address, credentials, options=_CHANNEL_OPTIONS)


class _Server:
    """One channel to a server."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.channel = endpoint.channel()
        self.stub: Any = InferenceStub(self.channel)  # type: ignore[no-untyped-call]
        key = endpoint.api_key
        self.metadata = (("authorization", f"Bearer {key}"),) if key else ()

    def generate(self, request: GenerateRequest) -> Any:
        """A call that generates."""
        timeout = request.deadline_s + DEADLINE_GRACE_S if request.HasField("deadline_s") else None
        return self.stub.Generate(request, metadata=self.metadata, timeout=timeout)

    def resume(self, request_id: str, next_offset: int) -> Any:
        """A call that goes on with a resumable request."""
        asked = ResumeRequest(request_id=request_id, next_offset=next_offset)
        return self.stub.Resume(asked, metadata=self.metadata)


class Client:
    """A channel to each of one or several routers; any number of calls at once, all in one event loop."""

    def __init__(self, endpoint: Endpoint, *others: Endpoint) -> None:
        """`others`: more routers of the same cluster."""
        self._servers = [_Server(each) for each in (endpoint, *others)]
        self._current = 0
        """Index of the one that is asked first: the last one that did not refuse."""

    @property
    def endpoint(self) -> Endpoint:
        """Whom it asks first."""
        return self._server.endpoint

    @property
    def _server(self) -> _Server:
        return self._servers[self._current]

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End all calls and the connection."""
        for server in self._servers:
            await server.channel.close(None)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[GenerateEvent, None]:
        """Yield the stream's events: one Accepted, Tokens without gap or repeat, one Finished.

        Leaving the iterator early (`aclose`, or cancelling the task) cancels the request on the server. Of several
        routers each is asked once, and once more after each token of a resumable request.
        """
        begun, num_tokens, request_id = time.monotonic(), 0, ""
        asked, left = self._named(request), len(self._servers)
        while True:
            server = self._server
            call = server.resume(request_id, num_tokens) if num_tokens else server.generate(asked)
            try:
                async with aclosing(_events(call, num_tokens, server.endpoint.address)) as events:
                    async for event in events:
                        if event.WhichOneof("event") == "accepted":
                            is_known, request_id = bool(request_id), event.accepted.request_id
                            if is_known:
                                continue
                        elif event.WhichOneof("event") == "tokens":
                            num_tokens, left = num_tokens + len(event.tokens.token_ids), len(self._servers)
                        yield event
                return
            except ClientError as error:
                left -= 1
                if not left or not _is_unavailable(error) or (num_tokens and not request.resumable):
                    raise
            self._go_on_from(server)
            if not request.resumable:
                asked = _with_less_time(request, time.monotonic() - begun)

    async def resume(self, request_id: str, next_offset: int = 0) -> AsyncGenerator[GenerateEvent, None]:
        """Yield the events of a resumable request from its token `next_offset` on.

        Any router of its cluster may be asked. Leaving the iterator early leaves the request running, for a while.
        """
        server = self._server
        call = server.resume(request_id, next_offset)
        async with aclosing(_events(call, next_offset, server.endpoint.address)) as events:
            async for event in events:
                yield event

    async def cancel(self, request_id: str) -> bool:
        """End a running request, whichever router has it; False where no such request runs."""
        failures = []
        for server in self._servers:
            try:
                if (await self._ask(server, "Cancel", CancelRequest(request_id=request_id))).found:
                    return True
            except ClientError as error:
                if not _is_unavailable(error):
                    raise
                failures.append(error)
        if len(failures) == len(self._servers):
            raise failures[-1]
        return False

    async def list_models(self) -> list[Model]:
        """The models served, the default one first."""
        return list((await self._unary("ListModels", ListModelsRequest())).models)

    async def tokenize(self, prompt: str | Chat, model: str = "") -> TokenizeResponse:
        """How the model's tokenizer (and, for a chat, its template) cuts a prompt."""
        request = TokenizeRequest(model=model)
        if isinstance(prompt, str):
            request.text = prompt
        else:
            request.chat.CopyFrom(prompt)
        response: TokenizeResponse = await self._unary("Tokenize", request)
        return response

    async def _unary(self, method: str, request: object) -> Any:
        for left in reversed(range(len(self._servers))):
            server = self._server
            try:
                return await self._ask(server, method, request)
            except ClientError as error:
                if not left or not _is_unavailable(error):
                    raise
            self._go_on_from(server)
        raise AssertionError("the last failure is raised")

    @staticmethod
    async def _ask(server: _Server, method: str, request: object) -> Any:
        call: Callable[..., Any] = getattr(server.stub, method)
        try:
            return await call(request, metadata=server.metadata, timeout=UNARY_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise translate(error, server.endpoint.address) from error

    def _named(self, request: GenerateRequest) -> GenerateRequest:
        """A resumable request of this client's own id: another router knows it again by that."""
        if request.resumable and not request.request_id and len(self._servers) > 1:
            named = GenerateRequest()
            named.CopyFrom(request)
            named.request_id = str(uuid.uuid4())
            return named
        return request

    def _go_on_from(self, server: _Server) -> None:
        """Ask the next one from now on, unless another call has found out before."""
        if self._server is server:
            self._current = (self._current + 1) % len(self._servers)


async def _events(call: Any, next_offset: int, address: str) -> AsyncGenerator[GenerateEvent, None]:
    contract = _StreamContract(next_offset)
    try:
        async for event in call:
            contract.check(event)
            yield event
    except grpc.aio.AioRpcError as error:
        raise translate(error, address) from error
    finally:
        call.cancel()
    contract.check_end()


def _is_unavailable(error: ClientError) -> bool:
    """Whether another router may do what this one does not."""
    is_refused = isinstance(error, StatusError) and error.code is grpc.StatusCode.UNAVAILABLE
    return is_refused or isinstance(error, NoClusterError)


def _with_less_time(request: GenerateRequest, passed_s: float) -> GenerateRequest:
    """The same, of whose time some has passed."""
    if not request.HasField("deadline_s"):
        return request
    hurried = GenerateRequest()
    hurried.CopyFrom(request)
    hurried.deadline_s = max(0.001, request.deadline_s - passed_s)
    return hurried


class _StreamContract:
    """What every Generate stream keeps: Accepted, then gap-free Tokens, then Finished and nothing more."""

    def __init__(self, num_tokens: int) -> None:
        """`num_tokens`: those that came before."""
        self._stage: str | None = None
        self._num_tokens = num_tokens

    def check(self, event: GenerateEvent) -> None:
        kind = event.WhichOneof("event")
        if self._stage == "finished" or (kind == "accepted") != (self._stage is None):
            raise BrokenStreamError(f"the server sent {kind or 'an empty event'} after {self._stage or 'nothing'}")
        if kind == "tokens":
            if event.tokens.offset != self._num_tokens:
                raise BrokenStreamError(
                    f"the server sent tokens at offset {event.tokens.offset}, expected {self._num_tokens}"
                )
            self._num_tokens += len(event.tokens.token_ids)
        self._stage = kind

    def check_end(self) -> None:
        if self._stage != "finished":
            raise BrokenStreamError(f"the server ended the stream after {self._stage or 'nothing'}, expected finished")


def find_endpoint(address: str | None, *, api_key: str | None = None, tls_ca: Path | None = None) -> Endpoint:
    """The endpoint of that address, or of the cluster that runs on this machine.

    Raises ValueError for a malformed address, NoClusterError where none is given and none runs.
    """
    if address is None:
        address = _running_address()
    return Endpoint(address=address, api_key=api_key, tls_ca=tls_ca)


def _running_address() -> str:
    run_dir = RunDir.default()
    state = run_dir.running()
    if state is None:
        raise NoClusterError("no cluster is running: start one with `pdserve up`, or name its address with --address")
    if state.phase is not Phase.READY or not state.routers:
        raise NoClusterError(f"the cluster in {run_dir.path} is {state.phase.value}: see `pdserve status`")
    return state.routers[0]


def translate(error: grpc.aio.AioRpcError, address: str) -> ClientError:
    """Our error for a gRPC one, with the field and the retry time that its details carry."""
    code, message = error.code(), error.details() or "no message"
    field: str | None = None
    retry_after_s: float | None = None
    try:
        status = rpc_status.from_call(error)  # type: ignore[arg-type]
    except ValueError:  # details that contradict the status are no details
        status = None
    for detail in status.details if status is not None else ():
        bad, retry = error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        if detail.Unpack(bad) and bad.field_violations:
            field = bad.field_violations[0].field
        elif detail.Unpack(retry):
            retry_after_s = retry.retry_delay.ToTimedelta().total_seconds()
    if code is grpc.StatusCode.UNAVAILABLE and status is None:
        return NoClusterError(
            f"no pdserve answers at {address} ({_short(message)}): "
            "start one with `pdserve up`, or name its address with --address"
        )
    return StatusError(code, message, field=field, retry_after_s=retry_after_s)


def _explain(code: grpc.StatusCode, message: str, field: str | None, retry_after_s: float | None) -> str:
    text = f"{code.name}: {message}"
    if field and field not in message and field.rpartition(".")[2] not in message:
        text = f"{code.name}: {field}: {message}"
    if retry_after_s is not None and "try again" not in message:
        text += f" (try again in {retry_after_s:g} s)"
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        text += " (give it more time with --deadline)"
    elif "larger than max" in message:
        text += " (bytes: shorten the prompt, or raise router.max_request_bytes in the server's YAML)"
    elif code is grpc.StatusCode.UNAUTHENTICATED:
        text += " (give a key with --api-key-file)"
    return text


def _short(message: str) -> str:
    """The last clause of gRPC's connection errors, which say the same thing several times."""
    return " ".join(message.rpartition("last error: ")[2].split())[:200]
