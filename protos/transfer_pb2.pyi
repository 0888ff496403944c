from protos import worker_pb2 as _worker_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PairHello(_message.Message):
    __slots__ = ("sender", "receiver", "layout", "attempt", "nonce", "protocol_version", "transport", "digest", "gpu", "transport_is_auto")
    SENDER_FIELD_NUMBER: _ClassVar[int]
    RECEIVER_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    GPU_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_IS_AUTO_FIELD_NUMBER: _ClassVar[int]
    sender: _worker_pb2.WorkerIdentity
    receiver: _worker_pb2.WorkerIdentity
    layout: _worker_pb2.Layout
    attempt: int
    nonce: bytes
    protocol_version: int
    transport: str
    digest: str
    gpu: str
    transport_is_auto: bool
    def __init__(self, sender: _Optional[_Union[_worker_pb2.WorkerIdentity, _Mapping]] = ..., receiver: _Optional[_Union[_worker_pb2.WorkerIdentity, _Mapping]] = ..., layout: _Optional[_Union[_worker_pb2.Layout, _Mapping]] = ..., attempt: _Optional[int] = ..., nonce: _Optional[bytes] = ..., protocol_version: _Optional[int] = ..., transport: _Optional[str] = ..., digest: _Optional[str] = ..., gpu: _Optional[str] = ..., transport_is_auto: _Optional[bool] = ...) -> None: ...

class PairChallenge(_message.Message):
    __slots__ = ("nonce", "mac", "layout")
    NONCE_FIELD_NUMBER: _ClassVar[int]
    MAC_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    nonce: bytes
    mac: bytes
    layout: _worker_pb2.Layout
    def __init__(self, nonce: _Optional[bytes] = ..., mac: _Optional[bytes] = ..., layout: _Optional[_Union[_worker_pb2.Layout, _Mapping]] = ...) -> None: ...

class PairProof(_message.Message):
    __slots__ = ("mac",)
    MAC_FIELD_NUMBER: _ClassVar[int]
    mac: bytes
    def __init__(self, mac: _Optional[bytes] = ...) -> None: ...

class PairReady(_message.Message):
    __slots__ = ("transport",)
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    transport: str
    def __init__(self, transport: _Optional[str] = ...) -> None: ...

class PairRefused(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class StoreSet(_message.Message):
    __slots__ = ("key", "value")
    KEY_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    key: str
    value: bytes
    def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...

class Probe(_message.Message):
    __slots__ = ("num_bytes",)
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    num_bytes: int
    def __init__(self, num_bytes: _Optional[int] = ...) -> None: ...

class ProbeSeen(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PairMeasured(_message.Message):
    __slots__ = ("latency_s", "bytes_per_s")
    LATENCY_S_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    latency_s: float
    bytes_per_s: float
    def __init__(self, latency_s: _Optional[float] = ..., bytes_per_s: _Optional[float] = ...) -> None: ...

class PieceAnnounced(_message.Message):
    __slots__ = ("sequence_number", "ticket_id", "first_layer", "num_layers", "first_token", "num_tokens", "num_bytes", "digest", "has_digest")
    SEQUENCE_NUMBER_FIELD_NUMBER: _ClassVar[int]
    TICKET_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_LAYER_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    HAS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    sequence_number: int
    ticket_id: str
    first_layer: int
    num_layers: int
    first_token: int
    num_tokens: int
    num_bytes: int
    digest: int
    has_digest: bool
    def __init__(self, sequence_number: _Optional[int] = ..., ticket_id: _Optional[str] = ..., first_layer: _Optional[int] = ..., num_layers: _Optional[int] = ..., first_token: _Optional[int] = ..., num_tokens: _Optional[int] = ..., num_bytes: _Optional[int] = ..., digest: _Optional[int] = ..., has_digest: _Optional[bool] = ...) -> None: ...

class TicketComplete(_message.Message):
    __slots__ = ("ticket_id", "first", "first_age_s")
    TICKET_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    FIRST_AGE_S_FIELD_NUMBER: _ClassVar[int]
    ticket_id: str
    first: _worker_pb2.TokenOutput
    first_age_s: float
    def __init__(self, ticket_id: _Optional[str] = ..., first: _Optional[_Union[_worker_pb2.TokenOutput, _Mapping]] = ..., first_age_s: _Optional[float] = ...) -> None: ...

class TicketSettled(_message.Message):
    __slots__ = ("ticket_id", "state", "reason")
    TICKET_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ticket_id: str
    state: str
    reason: str
    def __init__(self, ticket_id: _Optional[str] = ..., state: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class TicketAbandoned(_message.Message):
    __slots__ = ("ticket_id", "reason")
    TICKET_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ticket_id: str
    reason: str
    def __init__(self, ticket_id: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class Ping(_message.Message):
    __slots__ = ("count",)
    COUNT_FIELD_NUMBER: _ClassVar[int]
    count: int
    def __init__(self, count: _Optional[int] = ...) -> None: ...

class Pong(_message.Message):
    __slots__ = ("count",)
    COUNT_FIELD_NUMBER: _ClassVar[int]
    count: int
    def __init__(self, count: _Optional[int] = ...) -> None: ...

class ControlMessage(_message.Message):
    __slots__ = ("hello", "challenge", "proof", "ready", "refused", "store_set", "piece", "complete", "settled", "abandoned", "ping", "pong", "probe", "probe_seen", "measured", "granted")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    CHALLENGE_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    STORE_SET_FIELD_NUMBER: _ClassVar[int]
    PIECE_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    SETTLED_FIELD_NUMBER: _ClassVar[int]
    ABANDONED_FIELD_NUMBER: _ClassVar[int]
    PING_FIELD_NUMBER: _ClassVar[int]
    PONG_FIELD_NUMBER: _ClassVar[int]
    PROBE_FIELD_NUMBER: _ClassVar[int]
    PROBE_SEEN_FIELD_NUMBER: _ClassVar[int]
    MEASURED_FIELD_NUMBER: _ClassVar[int]
    GRANTED_FIELD_NUMBER: _ClassVar[int]
    hello: PairHello
    challenge: PairChallenge
    proof: PairProof
    ready: PairReady
    refused: PairRefused
    store_set: StoreSet
    piece: PieceAnnounced
    complete: TicketComplete
    settled: TicketSettled
    abandoned: TicketAbandoned
    ping: Ping
    pong: Pong
    probe: Probe
    probe_seen: ProbeSeen
    measured: PairMeasured
    granted: _worker_pb2.KVTicket
    def __init__(self, hello: _Optional[_Union[PairHello, _Mapping]] = ..., challenge: _Optional[_Union[PairChallenge, _Mapping]] = ..., proof: _Optional[_Union[PairProof, _Mapping]] = ..., ready: _Optional[_Union[PairReady, _Mapping]] = ..., refused: _Optional[_Union[PairRefused, _Mapping]] = ..., store_set: _Optional[_Union[StoreSet, _Mapping]] = ..., piece: _Optional[_Union[PieceAnnounced, _Mapping]] = ..., complete: _Optional[_Union[TicketComplete, _Mapping]] = ..., settled: _Optional[_Union[TicketSettled, _Mapping]] = ..., abandoned: _Optional[_Union[TicketAbandoned, _Mapping]] = ..., ping: _Optional[_Union[Ping, _Mapping]] = ..., pong: _Optional[_Union[Pong, _Mapping]] = ..., probe: _Optional[_Union[Probe, _Mapping]] = ..., probe_seen: _Optional[_Union[ProbeSeen, _Mapping]] = ..., measured: _Optional[_Union[PairMeasured, _Mapping]] = ..., granted: _Optional[_Union[_worker_pb2.KVTicket, _Mapping]] = ...) -> None: ...

class RankOrder(_message.Message):
    __slots__ = ("start", "grant", "end", "open_send", "finish_send", "abort_send", "meet", "stop")
    START_FIELD_NUMBER: _ClassVar[int]
    GRANT_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    OPEN_SEND_FIELD_NUMBER: _ClassVar[int]
    FINISH_SEND_FIELD_NUMBER: _ClassVar[int]
    ABORT_SEND_FIELD_NUMBER: _ClassVar[int]
    MEET_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    start: NodeStart
    grant: RankGrant
    end: RankEnd
    open_send: RankSend
    finish_send: str
    abort_send: RankEnd
    meet: RankMeet
    stop: NodeStop
    def __init__(self, start: _Optional[_Union[NodeStart, _Mapping]] = ..., grant: _Optional[_Union[RankGrant, _Mapping]] = ..., end: _Optional[_Union[RankEnd, _Mapping]] = ..., open_send: _Optional[_Union[RankSend, _Mapping]] = ..., finish_send: _Optional[str] = ..., abort_send: _Optional[_Union[RankEnd, _Mapping]] = ..., meet: _Optional[_Union[RankMeet, _Mapping]] = ..., stop: _Optional[_Union[NodeStop, _Mapping]] = ...) -> None: ...

class NodeStart(_message.Message):
    __slots__ = ("identity",)
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    identity: _worker_pb2.WorkerIdentity
    def __init__(self, identity: _Optional[_Union[_worker_pb2.WorkerIdentity, _Mapping]] = ...) -> None: ...

class NodeStop(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RankGrant(_message.Message):
    __slots__ = ("ticket_id", "request_id", "attempt", "block_ids", "first_token", "num_tokens")
    TICKET_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ticket_id: str
    request_id: str
    attempt: int
    block_ids: _containers.RepeatedScalarFieldContainer[int]
    first_token: int
    num_tokens: int
    def __init__(self, ticket_id: _Optional[str] = ..., request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., block_ids: _Optional[_Iterable[int]] = ..., first_token: _Optional[int] = ..., num_tokens: _Optional[int] = ...) -> None: ...

class RankEnd(_message.Message):
    __slots__ = ("ticket_id", "reason")
    TICKET_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ticket_id: str
    reason: str
    def __init__(self, ticket_id: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class RankSend(_message.Message):
    __slots__ = ("ticket",)
    TICKET_FIELD_NUMBER: _ClassVar[int]
    ticket: _worker_pb2.KVTicket
    def __init__(self, ticket: _Optional[_Union[_worker_pb2.KVTicket, _Mapping]] = ...) -> None: ...

class RankMeet(_message.Message):
    __slots__ = ("worker", "control_addresses", "layout")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    CONTROL_ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    worker: _worker_pb2.WorkerIdentity
    control_addresses: _containers.RepeatedScalarFieldContainer[str]
    layout: _worker_pb2.Layout
    def __init__(self, worker: _Optional[_Union[_worker_pb2.WorkerIdentity, _Mapping]] = ..., control_addresses: _Optional[_Iterable[str]] = ..., layout: _Optional[_Union[_worker_pb2.Layout, _Mapping]] = ...) -> None: ...

class RankReport(_message.Message):
    __slots__ = ("started", "ticket_ended", "send_settled")
    STARTED_FIELD_NUMBER: _ClassVar[int]
    TICKET_ENDED_FIELD_NUMBER: _ClassVar[int]
    SEND_SETTLED_FIELD_NUMBER: _ClassVar[int]
    started: NodeStarted
    ticket_ended: RankTicketEnded
    send_settled: RankTicketEnded
    def __init__(self, started: _Optional[_Union[NodeStarted, _Mapping]] = ..., ticket_ended: _Optional[_Union[RankTicketEnded, _Mapping]] = ..., send_settled: _Optional[_Union[RankTicketEnded, _Mapping]] = ...) -> None: ...

class NodeStarted(_message.Message):
    __slots__ = ("address", "error", "epoch")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    address: str
    error: str
    epoch: int
    def __init__(self, address: _Optional[str] = ..., error: _Optional[str] = ..., epoch: _Optional[int] = ...) -> None: ...

class RankTicketEnded(_message.Message):
    __slots__ = ("ticket_id", "state", "reason", "busy_s", "num_bytes", "last_home")
    TICKET_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    BUSY_S_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    LAST_HOME_FIELD_NUMBER: _ClassVar[int]
    ticket_id: str
    state: str
    reason: str
    busy_s: float
    num_bytes: int
    last_home: float
    def __init__(self, ticket_id: _Optional[str] = ..., state: _Optional[str] = ..., reason: _Optional[str] = ..., busy_s: _Optional[float] = ..., num_bytes: _Optional[int] = ..., last_home: _Optional[float] = ...) -> None: ...

class PushNote(_message.Message):
    __slots__ = ("pushes",)
    class Push(_message.Message):
        __slots__ = ("ticket_id", "first_token", "num_tokens", "block_ids", "is_there")
        TICKET_ID_FIELD_NUMBER: _ClassVar[int]
        FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
        NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
        BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
        IS_THERE_FIELD_NUMBER: _ClassVar[int]
        ticket_id: str
        first_token: int
        num_tokens: int
        block_ids: _containers.RepeatedScalarFieldContainer[int]
        is_there: bool
        def __init__(self, ticket_id: _Optional[str] = ..., first_token: _Optional[int] = ..., num_tokens: _Optional[int] = ..., block_ids: _Optional[_Iterable[int]] = ..., is_there: _Optional[bool] = ...) -> None: ...
    PUSHES_FIELD_NUMBER: _ClassVar[int]
    pushes: _containers.RepeatedCompositeFieldContainer[PushNote.Push]
    def __init__(self, pushes: _Optional[_Iterable[_Union[PushNote.Push, _Mapping]]] = ...) -> None: ...
