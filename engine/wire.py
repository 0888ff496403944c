"""The engine's values as messages, and back: the two forms of engine/api.py and protos/worker.proto.

Reading a message checks it as making the value does, so InvalidRequestError comes through with its field's name.
"""

from __future__ import annotations

from engine.api import FinishReason, GenerateRequest, SamplingParams, TokenLogprobs, TokenOutput
from engine.errors import InvalidRequestError
from protos import inference_pb2, worker_pb2

_NO_LOGPROBS = -1
MAX_AGE_S = 366 * 86400.0
"""No request is older."""

_FINISH_TO_WIRE = {
    None: worker_pb2.ENGINE_FINISH_NONE,
    FinishReason.EOS: worker_pb2.ENGINE_FINISH_EOS,
    FinishReason.STOP: worker_pb2.ENGINE_FINISH_STOP,
    FinishReason.LENGTH: worker_pb2.ENGINE_FINISH_LENGTH,
    FinishReason.ABORTED: worker_pb2.ENGINE_FINISH_ABORTED,
    FinishReason.FAILED: worker_pb2.ENGINE_FINISH_FAILED,
    FinishReason.PREEMPTED: worker_pb2.ENGINE_FINISH_PREEMPTED,
}
_FINISH_FROM_WIRE = {wire: reason for reason, wire in _FINISH_TO_WIRE.items()}


def params_to_wire(params: SamplingParams) -> worker_pb2.SamplingParams:
    """Every field set."""
    return worker_pb2.SamplingParams(
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        max_tokens=params.max_tokens,
        min_tokens=params.min_tokens,
        stop_token_ids=params.stop_token_ids,
        seed=params.seed,
        logprobs=_NO_LOGPROBS if params.logprobs is None else params.logprobs,
        ignore_eos=params.ignore_eos,
    )


def params_from_wire(message: worker_pb2.SamplingParams) -> SamplingParams:
    """Raises InvalidRequestError for a value out of its range."""
    return SamplingParams(
        temperature=message.temperature,
        top_p=message.top_p,
        top_k=message.top_k,
        min_p=message.min_p,
        repetition_penalty=message.repetition_penalty,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        max_tokens=message.max_tokens,
        min_tokens=message.min_tokens,
        stop_token_ids=tuple(message.stop_token_ids),
        seed=message.seed,
        logprobs=None if message.logprobs == _NO_LOGPROBS else message.logprobs,
        ignore_eos=message.ignore_eos,
    )


def request_to_wire(request: GenerateRequest) -> worker_pb2.EngineRequest:
    """A deadline that has passed already stays one: it is sent as the shortest time there is."""
    deadline_s = 0.0 if request.deadline_s is None else max(request.deadline_s, 1e-9)
    return worker_pb2.EngineRequest(
        request_id=request.request_id,
        attempt=request.attempt,
        prompt_token_ids=request.prompt_token_ids,
        params=params_to_wire(request.params),
        priority=request.priority,
        deadline_s=deadline_s,
        resume_from=request.resume_from,
        resumable=request.resumable,
        age_s=request.age_s,
        num_preemptions=request.num_preemptions,
    )


def request_from_wire(message: worker_pb2.EngineRequest) -> GenerateRequest:
    """Raises InvalidRequestError for a missing or impossible part."""
    if not message.HasField("params"):
        raise InvalidRequestError("the request has no sampling parameters", field="params")
    if not message.prompt_token_ids:
        raise InvalidRequestError("the prompt is empty", field="prompt_token_ids")
    return GenerateRequest(
        request_id=message.request_id,
        prompt_token_ids=tuple(message.prompt_token_ids[:]),  # to slice first is faster
        params=params_from_wire(message.params),
        attempt=message.attempt,
        priority=message.priority,
        deadline_s=message.deadline_s or None,
        resume_from=tuple(message.resume_from),
        resumable=message.resumable,
        age_s=min(message.age_s, MAX_AGE_S) if message.age_s > 0 else 0.0,
        num_preemptions=max(0, message.num_preemptions),
    )


def logprobs_to_wire(logprobs: TokenLogprobs) -> inference_pb2.PositionLogprobs:
    """One position's log-probabilities."""
    return inference_pb2.PositionLogprobs(
        chosen=inference_pb2.TokenLogprob(token_id=logprobs.token_id, logprob=logprobs.logprob),
        top=[inference_pb2.TokenLogprob(token_id=token_id, logprob=logprob) for token_id, logprob in logprobs.top],
    )


def logprobs_from_wire(message: inference_pb2.PositionLogprobs) -> TokenLogprobs:
    """One position's log-probabilities, rounded to single precision on the way."""
    return TokenLogprobs(
        token_id=message.chosen.token_id,
        logprob=message.chosen.logprob,
        top=tuple((entry.token_id, entry.logprob) for entry in message.top),
    )


def output_to_wire(output: TokenOutput) -> worker_pb2.TokenOutput:
    """Without timing, which the engine does not know."""
    return worker_pb2.TokenOutput(
        request_id=output.request_id,
        attempt=output.attempt,
        offset=output.offset,
        token_ids=output.token_ids,
        logprobs=[logprobs_to_wire(entry) for entry in output.logprobs],
        finish=_FINISH_TO_WIRE[output.finish_reason],
        reason=output.reason,
        cached_tokens=output.num_cached_tokens,
    )


def output_from_wire(message: worker_pb2.TokenOutput) -> TokenOutput:
    """A finish that this version does not know counts as FAILED, so that no stream stays open for ever."""
    return TokenOutput(
        request_id=message.request_id,
        attempt=message.attempt,
        offset=message.offset,
        token_ids=tuple(message.token_ids),
        logprobs=tuple(logprobs_from_wire(entry) for entry in message.logprobs),
        finish_reason=_FINISH_FROM_WIRE.get(message.finish, FinishReason.FAILED),
        reason=message.reason,
        num_cached_tokens=message.cached_tokens,
    )
