from protos import inference_pb2 as _inference_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class EngineFinish(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ENGINE_FINISH_NONE: _ClassVar[EngineFinish]
    ENGINE_FINISH_EOS: _ClassVar[EngineFinish]
    ENGINE_FINISH_STOP: _ClassVar[EngineFinish]
    ENGINE_FINISH_LENGTH: _ClassVar[EngineFinish]
    ENGINE_FINISH_ABORTED: _ClassVar[EngineFinish]
    ENGINE_FINISH_FAILED: _ClassVar[EngineFinish]
    ENGINE_FINISH_MOVED: _ClassVar[EngineFinish]
    ENGINE_FINISH_PREEMPTED: _ClassVar[EngineFinish]
    ENGINE_FINISH_HANDED_BACK: _ClassVar[EngineFinish]
ENGINE_FINISH_NONE: EngineFinish
ENGINE_FINISH_EOS: EngineFinish
ENGINE_FINISH_STOP: EngineFinish
ENGINE_FINISH_LENGTH: EngineFinish
ENGINE_FINISH_ABORTED: EngineFinish
ENGINE_FINISH_FAILED: EngineFinish
ENGINE_FINISH_MOVED: EngineFinish
ENGINE_FINISH_PREEMPTED: EngineFinish
ENGINE_FINISH_HANDED_BACK: EngineFinish

class SamplingParams(_message.Message):
    __slots__ = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "max_tokens", "min_tokens", "stop_token_ids", "seed", "logprobs", "ignore_eos")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    max_tokens: int
    min_tokens: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    seed: int
    logprobs: int
    ignore_eos: bool
    def __init__(self, temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., max_tokens: _Optional[int] = ..., min_tokens: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., seed: _Optional[int] = ..., logprobs: _Optional[int] = ..., ignore_eos: _Optional[bool] = ...) -> None: ...

class EngineRequest(_message.Message):
    __slots__ = ("request_id", "attempt", "prompt_token_ids", "params", "priority", "deadline_s", "resume_from", "resumable", "age_s", "num_preemptions")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PARAMS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    RESUME_FROM_FIELD_NUMBER: _ClassVar[int]
    RESUMABLE_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    NUM_PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    params: SamplingParams
    priority: int
    deadline_s: float
    resume_from: _containers.RepeatedScalarFieldContainer[int]
    resumable: bool
    age_s: float
    num_preemptions: int
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., params: _Optional[_Union[SamplingParams, _Mapping]] = ..., priority: _Optional[int] = ..., deadline_s: _Optional[float] = ..., resume_from: _Optional[_Iterable[int]] = ..., resumable: _Optional[bool] = ..., age_s: _Optional[float] = ..., num_preemptions: _Optional[int] = ...) -> None: ...

class WorkerIdentity(_message.Message):
    __slots__ = ("worker_id", "epoch")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    epoch: int
    def __init__(self, worker_id: _Optional[str] = ..., epoch: _Optional[int] = ...) -> None: ...

class Layout(_message.Message):
    __slots__ = ("model_hash", "num_layers", "block_size", "num_kv_heads", "head_dim", "dtype", "tp_rank", "tp_size")
    MODEL_HASH_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    TP_RANK_FIELD_NUMBER: _ClassVar[int]
    TP_SIZE_FIELD_NUMBER: _ClassVar[int]
    model_hash: str
    num_layers: int
    block_size: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    tp_rank: int
    tp_size: int
    def __init__(self, model_hash: _Optional[str] = ..., num_layers: _Optional[int] = ..., block_size: _Optional[int] = ..., num_kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., dtype: _Optional[str] = ..., tp_rank: _Optional[int] = ..., tp_size: _Optional[int] = ...) -> None: ...

class KVTicket(_message.Message):
    __slots__ = ("ticket_id", "request_id", "attempt", "receiver", "control_addresses", "block_ids", "first_token", "num_tokens", "layout", "expires_in_s", "router_id")
    TICKET_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    RECEIVER_FIELD_NUMBER: _ClassVar[int]
    CONTROL_ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_IN_S_FIELD_NUMBER: _ClassVar[int]
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    ticket_id: str
    request_id: str
    attempt: int
    receiver: WorkerIdentity
    control_addresses: _containers.RepeatedScalarFieldContainer[str]
    block_ids: _containers.RepeatedScalarFieldContainer[int]
    first_token: int
    num_tokens: int
    layout: Layout
    expires_in_s: float
    router_id: str
    def __init__(self, ticket_id: _Optional[str] = ..., request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., receiver: _Optional[_Union[WorkerIdentity, _Mapping]] = ..., control_addresses: _Optional[_Iterable[str]] = ..., block_ids: _Optional[_Iterable[int]] = ..., first_token: _Optional[int] = ..., num_tokens: _Optional[int] = ..., layout: _Optional[_Union[Layout, _Mapping]] = ..., expires_in_s: _Optional[float] = ..., router_id: _Optional[str] = ...) -> None: ...

class ReserveRequest(_message.Message):
    __slots__ = ("router_id", "request", "epoch", "local_prefill", "prefill")
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    LOCAL_PREFILL_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    request: EngineRequest
    epoch: int
    local_prefill: bool
    prefill: WorkerIdentity
    def __init__(self, router_id: _Optional[str] = ..., request: _Optional[_Union[EngineRequest, _Mapping]] = ..., epoch: _Optional[int] = ..., local_prefill: _Optional[bool] = ..., prefill: _Optional[_Union[WorkerIdentity, _Mapping]] = ...) -> None: ...

class ReserveReply(_message.Message):
    __slots__ = ("ticket", "cached_tokens")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ticket: KVTicket
    cached_tokens: int
    def __init__(self, ticket: _Optional[_Union[KVTicket, _Mapping]] = ..., cached_tokens: _Optional[int] = ...) -> None: ...

class PrefillRequest(_message.Message):
    __slots__ = ("router_id", "request", "epoch", "ticket", "receiver")
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    RECEIVER_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    request: EngineRequest
    epoch: int
    ticket: KVTicket
    receiver: WorkerIdentity
    def __init__(self, router_id: _Optional[str] = ..., request: _Optional[_Union[EngineRequest, _Mapping]] = ..., epoch: _Optional[int] = ..., ticket: _Optional[_Union[KVTicket, _Mapping]] = ..., receiver: _Optional[_Union[WorkerIdentity, _Mapping]] = ...) -> None: ...

class PrefillReply(_message.Message):
    __slots__ = ("first", "cached_tokens", "queue_s", "prefill_s")
    FIRST_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_FIELD_NUMBER: _ClassVar[int]
    first: TokenOutput
    cached_tokens: int
    queue_s: float
    prefill_s: float
    def __init__(self, first: _Optional[_Union[TokenOutput, _Mapping]] = ..., cached_tokens: _Optional[int] = ..., queue_s: _Optional[float] = ..., prefill_s: _Optional[float] = ...) -> None: ...

class MeetRequest(_message.Message):
    __slots__ = ("epoch", "worker", "control_addresses", "layout")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    CONTROL_ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    worker: WorkerIdentity
    control_addresses: _containers.RepeatedScalarFieldContainer[str]
    layout: Layout
    def __init__(self, epoch: _Optional[int] = ..., worker: _Optional[_Union[WorkerIdentity, _Mapping]] = ..., control_addresses: _Optional[_Iterable[str]] = ..., layout: _Optional[_Union[Layout, _Mapping]] = ...) -> None: ...

class MeetReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AbortRequest(_message.Message):
    __slots__ = ("request_id", "attempt", "reason")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    reason: str
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class AbortReply(_message.Message):
    __slots__ = ("found",)
    FOUND_FIELD_NUMBER: _ClassVar[int]
    found: bool
    def __init__(self, found: _Optional[bool] = ...) -> None: ...

class AdoptRequest(_message.Message):
    __slots__ = ("router_id", "request_id", "attempt", "epoch")
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    request_id: str
    attempt: int
    epoch: int
    def __init__(self, router_id: _Optional[str] = ..., request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., epoch: _Optional[int] = ...) -> None: ...

class AdoptReply(_message.Message):
    __slots__ = ("found",)
    FOUND_FIELD_NUMBER: _ClassVar[int]
    found: bool
    def __init__(self, found: _Optional[bool] = ...) -> None: ...

class AttachHello(_message.Message):
    __slots__ = ("router_id",)
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    def __init__(self, router_id: _Optional[str] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("wants_blocks",)
    WANTS_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    wants_blocks: bool
    def __init__(self, wants_blocks: _Optional[bool] = ...) -> None: ...

class AttachRequest(_message.Message):
    __slots__ = ("hello", "heartbeat")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    hello: AttachHello
    heartbeat: Heartbeat
    def __init__(self, hello: _Optional[_Union[AttachHello, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ...) -> None: ...

class WorkerDescription(_message.Message):
    __slots__ = ("identity", "role", "model_name", "layout", "num_blocks", "max_model_len", "max_running", "vocab_size", "architecture", "control_addresses", "paced")
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    MAX_RUNNING_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    CONTROL_ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    PACED_FIELD_NUMBER: _ClassVar[int]
    identity: WorkerIdentity
    role: str
    model_name: str
    layout: Layout
    num_blocks: int
    max_model_len: int
    max_running: int
    vocab_size: int
    architecture: str
    control_addresses: _containers.RepeatedScalarFieldContainer[str]
    paced: bool
    def __init__(self, identity: _Optional[_Union[WorkerIdentity, _Mapping]] = ..., role: _Optional[str] = ..., model_name: _Optional[str] = ..., layout: _Optional[_Union[Layout, _Mapping]] = ..., num_blocks: _Optional[int] = ..., max_model_len: _Optional[int] = ..., max_running: _Optional[int] = ..., vocab_size: _Optional[int] = ..., architecture: _Optional[str] = ..., control_addresses: _Optional[_Iterable[str]] = ..., paced: _Optional[bool] = ...) -> None: ...

class TokenOutput(_message.Message):
    __slots__ = ("request_id", "attempt", "offset", "token_ids", "logprobs", "finish", "reason", "timing", "cached_tokens")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    offset: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[_inference_pb2.PositionLogprobs]
    finish: EngineFinish
    reason: str
    timing: DecodeTiming
    cached_tokens: int
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., offset: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[_inference_pb2.PositionLogprobs, _Mapping]]] = ..., finish: _Optional[_Union[EngineFinish, str]] = ..., reason: _Optional[str] = ..., timing: _Optional[_Union[DecodeTiming, _Mapping]] = ..., cached_tokens: _Optional[int] = ...) -> None: ...

class DecodeTiming(_message.Message):
    __slots__ = ("transfer_tail_s", "transfer_busy_s", "transfer_bytes", "first_step_s", "queue_s", "prefill_s")
    TRANSFER_TAIL_S_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_BUSY_S_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_BYTES_FIELD_NUMBER: _ClassVar[int]
    FIRST_STEP_S_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_FIELD_NUMBER: _ClassVar[int]
    transfer_tail_s: float
    transfer_busy_s: float
    transfer_bytes: int
    first_step_s: float
    queue_s: float
    prefill_s: float
    def __init__(self, transfer_tail_s: _Optional[float] = ..., transfer_busy_s: _Optional[float] = ..., transfer_bytes: _Optional[int] = ..., first_step_s: _Optional[float] = ..., queue_s: _Optional[float] = ..., prefill_s: _Optional[float] = ...) -> None: ...

class WorkerStats(_message.Message):
    __slots__ = ("num_running", "num_waiting", "num_reserved", "free_blocks", "num_blocks", "waiting_tokens", "open_tickets", "steps", "computed_tokens", "cached_tokens", "preemptions", "sent_bytes", "received_bytes", "digest_mismatches", "generated_tokens", "findable_blocks", "open_sends", "num_pairs", "lost_peers", "slow_pairs", "retired_pairs", "prompt_tokens_per_s", "free_places", "unpromised_blocks", "expected_answer_tokens")
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    NUM_RESERVED_FIELD_NUMBER: _ClassVar[int]
    FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    WAITING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OPEN_TICKETS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    SENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    DIGEST_MISMATCHES_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINDABLE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    OPEN_SENDS_FIELD_NUMBER: _ClassVar[int]
    NUM_PAIRS_FIELD_NUMBER: _ClassVar[int]
    LOST_PEERS_FIELD_NUMBER: _ClassVar[int]
    SLOW_PAIRS_FIELD_NUMBER: _ClassVar[int]
    RETIRED_PAIRS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    FREE_PLACES_FIELD_NUMBER: _ClassVar[int]
    UNPROMISED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_ANSWER_TOKENS_FIELD_NUMBER: _ClassVar[int]
    num_running: int
    num_waiting: int
    num_reserved: int
    free_blocks: int
    num_blocks: int
    waiting_tokens: int
    open_tickets: int
    steps: int
    computed_tokens: int
    cached_tokens: int
    preemptions: int
    sent_bytes: int
    received_bytes: int
    digest_mismatches: int
    generated_tokens: int
    findable_blocks: int
    open_sends: int
    num_pairs: int
    lost_peers: int
    slow_pairs: int
    retired_pairs: int
    prompt_tokens_per_s: float
    free_places: int
    unpromised_blocks: int
    expected_answer_tokens: int
    def __init__(self, num_running: _Optional[int] = ..., num_waiting: _Optional[int] = ..., num_reserved: _Optional[int] = ..., free_blocks: _Optional[int] = ..., num_blocks: _Optional[int] = ..., waiting_tokens: _Optional[int] = ..., open_tickets: _Optional[int] = ..., steps: _Optional[int] = ..., computed_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., preemptions: _Optional[int] = ..., sent_bytes: _Optional[int] = ..., received_bytes: _Optional[int] = ..., digest_mismatches: _Optional[int] = ..., generated_tokens: _Optional[int] = ..., findable_blocks: _Optional[int] = ..., open_sends: _Optional[int] = ..., num_pairs: _Optional[int] = ..., lost_peers: _Optional[int] = ..., slow_pairs: _Optional[int] = ..., retired_pairs: _Optional[int] = ..., prompt_tokens_per_s: _Optional[float] = ..., free_places: _Optional[int] = ..., unpromised_blocks: _Optional[int] = ..., expected_answer_tokens: _Optional[int] = ...) -> None: ...

class Credits(_message.Message):
    __slots__ = ("requests", "blocks")
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    requests: int
    blocks: int
    def __init__(self, requests: _Optional[int] = ..., blocks: _Optional[int] = ...) -> None: ...

class PairInfo(_message.Message):
    __slots__ = ("peer", "direction", "state", "transport", "latency_s", "bytes_per_s", "is_slow")
    PEER_FIELD_NUMBER: _ClassVar[int]
    DIRECTION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    LATENCY_S_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    IS_SLOW_FIELD_NUMBER: _ClassVar[int]
    peer: str
    direction: str
    state: str
    transport: str
    latency_s: float
    bytes_per_s: float
    is_slow: bool
    def __init__(self, peer: _Optional[str] = ..., direction: _Optional[str] = ..., state: _Optional[str] = ..., transport: _Optional[str] = ..., latency_s: _Optional[float] = ..., bytes_per_s: _Optional[float] = ..., is_slow: _Optional[bool] = ...) -> None: ...

class BlockEvents(_message.Message):
    __slots__ = ("after", "number", "stored", "evicted", "is_snapshot")
    AFTER_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    STORED_FIELD_NUMBER: _ClassVar[int]
    EVICTED_FIELD_NUMBER: _ClassVar[int]
    IS_SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    after: int
    number: int
    stored: _containers.RepeatedScalarFieldContainer[int]
    evicted: _containers.RepeatedScalarFieldContainer[int]
    is_snapshot: bool
    def __init__(self, after: _Optional[int] = ..., number: _Optional[int] = ..., stored: _Optional[_Iterable[int]] = ..., evicted: _Optional[_Iterable[int]] = ..., is_snapshot: _Optional[bool] = ...) -> None: ...

class AttachEvent(_message.Message):
    __slots__ = ("description", "outputs", "stats", "draining", "blocks", "pair_bytes_per_s", "credits", "role")
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    STATS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    PAIR_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    CREDITS_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    description: WorkerDescription
    outputs: _containers.RepeatedCompositeFieldContainer[TokenOutput]
    stats: WorkerStats
    draining: bool
    blocks: BlockEvents
    pair_bytes_per_s: float
    credits: Credits
    role: str
    def __init__(self, description: _Optional[_Union[WorkerDescription, _Mapping]] = ..., outputs: _Optional[_Iterable[_Union[TokenOutput, _Mapping]]] = ..., stats: _Optional[_Union[WorkerStats, _Mapping]] = ..., draining: _Optional[bool] = ..., blocks: _Optional[_Union[BlockEvents, _Mapping]] = ..., pair_bytes_per_s: _Optional[float] = ..., credits: _Optional[_Union[Credits, _Mapping]] = ..., role: _Optional[str] = ...) -> None: ...

class StartEngine(_message.Message):
    __slots__ = ("identity", "role")
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    identity: WorkerIdentity
    role: SetRole
    def __init__(self, identity: _Optional[_Union[WorkerIdentity, _Mapping]] = ..., role: _Optional[_Union[SetRole, _Mapping]] = ...) -> None: ...

class SetRole(_message.Message):
    __slots__ = ("role", "prompt_share")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    PROMPT_SHARE_FIELD_NUMBER: _ClassVar[int]
    role: str
    prompt_share: float
    def __init__(self, role: _Optional[str] = ..., prompt_share: _Optional[float] = ...) -> None: ...

class HandBack(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class RouterGone(_message.Message):
    __slots__ = ("router_id",)
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    def __init__(self, router_id: _Optional[str] = ...) -> None: ...

class RenewLeases(_message.Message):
    __slots__ = ("router_id",)
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    def __init__(self, router_id: _Optional[str] = ...) -> None: ...

class DrainEngine(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CheckIntegrity(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class EngineCommand(_message.Message):
    __slots__ = ("call_id", "start", "reserve", "prefill", "abort_decode", "abort_prefill", "renew", "router_gone", "drain", "check", "meet", "ticket", "adopt", "set_role", "hand_back")
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    RESERVE_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    ABORT_DECODE_FIELD_NUMBER: _ClassVar[int]
    ABORT_PREFILL_FIELD_NUMBER: _ClassVar[int]
    RENEW_FIELD_NUMBER: _ClassVar[int]
    ROUTER_GONE_FIELD_NUMBER: _ClassVar[int]
    DRAIN_FIELD_NUMBER: _ClassVar[int]
    CHECK_FIELD_NUMBER: _ClassVar[int]
    MEET_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    ADOPT_FIELD_NUMBER: _ClassVar[int]
    SET_ROLE_FIELD_NUMBER: _ClassVar[int]
    HAND_BACK_FIELD_NUMBER: _ClassVar[int]
    call_id: int
    start: StartEngine
    reserve: ReserveRequest
    prefill: PrefillRequest
    abort_decode: AbortRequest
    abort_prefill: AbortRequest
    renew: RenewLeases
    router_gone: RouterGone
    drain: DrainEngine
    check: CheckIntegrity
    meet: MeetRequest
    ticket: KVTicket
    adopt: AdoptRequest
    set_role: SetRole
    hand_back: HandBack
    def __init__(self, call_id: _Optional[int] = ..., start: _Optional[_Union[StartEngine, _Mapping]] = ..., reserve: _Optional[_Union[ReserveRequest, _Mapping]] = ..., prefill: _Optional[_Union[PrefillRequest, _Mapping]] = ..., abort_decode: _Optional[_Union[AbortRequest, _Mapping]] = ..., abort_prefill: _Optional[_Union[AbortRequest, _Mapping]] = ..., renew: _Optional[_Union[RenewLeases, _Mapping]] = ..., router_gone: _Optional[_Union[RouterGone, _Mapping]] = ..., drain: _Optional[_Union[DrainEngine, _Mapping]] = ..., check: _Optional[_Union[CheckIntegrity, _Mapping]] = ..., meet: _Optional[_Union[MeetRequest, _Mapping]] = ..., ticket: _Optional[_Union[KVTicket, _Mapping]] = ..., adopt: _Optional[_Union[AdoptRequest, _Mapping]] = ..., set_role: _Optional[_Union[SetRole, _Mapping]] = ..., hand_back: _Optional[_Union[HandBack, _Mapping]] = ...) -> None: ...

class EngineError(_message.Message):
    __slots__ = ("status", "message", "retry_after_s")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_S_FIELD_NUMBER: _ClassVar[int]
    status: str
    message: str
    retry_after_s: float
    def __init__(self, status: _Optional[str] = ..., message: _Optional[str] = ..., retry_after_s: _Optional[float] = ...) -> None: ...

class EngineReply(_message.Message):
    __slots__ = ("call_id", "error", "description", "reserve", "prefill", "abort", "stats", "meet", "adopt", "pairs")
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    RESERVE_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    STATS_FIELD_NUMBER: _ClassVar[int]
    MEET_FIELD_NUMBER: _ClassVar[int]
    ADOPT_FIELD_NUMBER: _ClassVar[int]
    PAIRS_FIELD_NUMBER: _ClassVar[int]
    call_id: int
    error: EngineError
    description: WorkerDescription
    reserve: ReserveReply
    prefill: PrefillReply
    abort: AbortReply
    stats: WorkerStats
    meet: MeetReply
    adopt: AdoptReply
    pairs: _containers.RepeatedCompositeFieldContainer[PairInfo]
    def __init__(self, call_id: _Optional[int] = ..., error: _Optional[_Union[EngineError, _Mapping]] = ..., description: _Optional[_Union[WorkerDescription, _Mapping]] = ..., reserve: _Optional[_Union[ReserveReply, _Mapping]] = ..., prefill: _Optional[_Union[PrefillReply, _Mapping]] = ..., abort: _Optional[_Union[AbortReply, _Mapping]] = ..., stats: _Optional[_Union[WorkerStats, _Mapping]] = ..., meet: _Optional[_Union[MeetReply, _Mapping]] = ..., adopt: _Optional[_Union[AdoptReply, _Mapping]] = ..., pairs: _Optional[_Iterable[_Union[PairInfo, _Mapping]]] = ...) -> None: ...

class RouterOutputs(_message.Message):
    __slots__ = ("router_id", "outputs")
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    outputs: _containers.RepeatedCompositeFieldContainer[TokenOutput]
    def __init__(self, router_id: _Optional[str] = ..., outputs: _Optional[_Iterable[_Union[TokenOutput, _Mapping]]] = ...) -> None: ...

class EngineEvent(_message.Message):
    __slots__ = ("reply", "step")
    REPLY_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    reply: EngineReply
    step: StepEvent
    def __init__(self, reply: _Optional[_Union[EngineReply, _Mapping]] = ..., step: _Optional[_Union[StepEvent, _Mapping]] = ...) -> None: ...

class StepEvent(_message.Message):
    __slots__ = ("outputs", "stats", "blocks", "draining")
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    STATS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    outputs: _containers.RepeatedCompositeFieldContainer[RouterOutputs]
    stats: WorkerStats
    blocks: BlockEvents
    draining: bool
    def __init__(self, outputs: _Optional[_Iterable[_Union[RouterOutputs, _Mapping]]] = ..., stats: _Optional[_Union[WorkerStats, _Mapping]] = ..., blocks: _Optional[_Union[BlockEvents, _Mapping]] = ..., draining: _Optional[bool] = ...) -> None: ...
