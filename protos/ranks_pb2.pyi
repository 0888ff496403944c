from protos import worker_pb2 as _worker_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RankHello(_message.Message):
    __slots__ = ("rank", "size", "device")
    RANK_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    rank: int
    size: int
    device: str
    def __init__(self, rank: _Optional[int] = ..., size: _Optional[int] = ..., device: _Optional[str] = ...) -> None: ...

class RankWelcome(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RankValue(_message.Message):
    __slots__ = ("key", "value")
    KEY_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    key: str
    value: bytes
    def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...

class RankHeartbeat(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RankShare(_message.Message):
    __slots__ = ("sequence_id", "start", "num_tokens", "samples", "life", "request", "first_token", "token_ids", "first_block", "block_ids")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    LIFE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    sequence_id: int
    start: int
    num_tokens: int
    samples: bool
    life: int
    request: _worker_pb2.EngineRequest
    first_token: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    first_block: int
    block_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, sequence_id: _Optional[int] = ..., start: _Optional[int] = ..., num_tokens: _Optional[int] = ..., samples: _Optional[bool] = ..., life: _Optional[int] = ..., request: _Optional[_Union[_worker_pb2.EngineRequest, _Mapping]] = ..., first_token: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., first_block: _Optional[int] = ..., block_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class RankStep(_message.Message):
    __slots__ = ("forgotten", "shares", "note")
    FORGOTTEN_FIELD_NUMBER: _ClassVar[int]
    SHARES_FIELD_NUMBER: _ClassVar[int]
    NOTE_FIELD_NUMBER: _ClassVar[int]
    forgotten: _containers.RepeatedScalarFieldContainer[int]
    shares: _containers.RepeatedCompositeFieldContainer[RankShare]
    note: bytes
    def __init__(self, forgotten: _Optional[_Iterable[int]] = ..., shares: _Optional[_Iterable[_Union[RankShare, _Mapping]]] = ..., note: _Optional[bytes] = ...) -> None: ...

class RankFailure(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class RankStop(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RankMessage(_message.Message):
    __slots__ = ("hello", "welcome", "value", "heartbeat", "step", "order", "report", "failure", "stop")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    hello: RankHello
    welcome: RankWelcome
    value: RankValue
    heartbeat: RankHeartbeat
    step: RankStep
    order: bytes
    report: bytes
    failure: RankFailure
    stop: RankStop
    def __init__(self, hello: _Optional[_Union[RankHello, _Mapping]] = ..., welcome: _Optional[_Union[RankWelcome, _Mapping]] = ..., value: _Optional[_Union[RankValue, _Mapping]] = ..., heartbeat: _Optional[_Union[RankHeartbeat, _Mapping]] = ..., step: _Optional[_Union[RankStep, _Mapping]] = ..., order: _Optional[bytes] = ..., report: _Optional[bytes] = ..., failure: _Optional[_Union[RankFailure, _Mapping]] = ..., stop: _Optional[_Union[RankStop, _Mapping]] = ...) -> None: ...
