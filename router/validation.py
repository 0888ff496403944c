"""Turns what a client sent into a job's parts, or says which field is wrong and why.

`prompt_ids` is the only slow step (tokenising); everything else takes microseconds, so that a bad request
is refused before any work is done for it.
"""

from __future__ import annotations

import asyncio
import math
import secrets
from collections.abc import Callable
from dataclasses import replace

from engine.api import SamplingParams
from engine.errors import InvalidRequestError
from engine.stream_decoder import MAX_STOP_CHARS, MAX_STOPS
from protos import inference_pb2
from router.config import RouterConfig
from router.errors import InvalidArgumentError
from router.model import ServedModel

MAX_REQUEST_ID_CHARS = 128
MAX_STOP_TOKEN_IDS = 256
MAX_DEADLINE_S = 30 * 86400.0
THREAD_FROM_CHARS = 4096
"""Prompts longer than this are cut into tokens in a thread, so that other streams go on meanwhile."""

PROMPT_KINDS = ("text", "token_ids", "chat")
_OPTIONAL_FIELDS = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "max_tokens", "min_tokens", "seed", "logprobs", "ignore_eos",
)  # fmt: skip


def request_id(asked: str) -> str:
    """The client's id, or a new one."""
    if not asked:
        return f"req-{secrets.token_hex(12)}"
    if len(asked) > MAX_REQUEST_ID_CHARS:
        raise InvalidArgumentError(
            f"request_id has {len(asked)} characters, at most {MAX_REQUEST_ID_CHARS} are allowed", field="request_id"
        )
    if not asked.isprintable():
        raise InvalidArgumentError("request_id must have printable characters only", field="request_id")
    return asked


def deadline_s(request: inference_pb2.GenerateRequest, config: RouterConfig, grpc_s: float | None) -> float:
    """Seconds from arrival to the end: the client's, the call's own deadline, or the default, whichever is least."""
    asked = request.deadline_s if request.HasField("deadline_s") else config.default_deadline_s
    if not 0 < asked <= MAX_DEADLINE_S:  # NaN is never inside
        raise InvalidArgumentError(
            f"deadline_s must be more than 0 and at most {MAX_DEADLINE_S:.0f} seconds, got {asked}", field="deadline_s"
        )
    return asked if grpc_s is None or math.isinf(grpc_s) else min(asked, grpc_s)


def stop_strings(sampling: inference_pb2.Sampling, model: ServedModel) -> list[str]:
    """The stop strings, without repeats."""
    if sampling.stop:
        model.needed_tokenizer("sampling.stop")
    if len(sampling.stop) > MAX_STOPS:
        raise InvalidArgumentError(
            f"{len(sampling.stop)} stop strings were given, at most {MAX_STOPS} are allowed",
            field="sampling.stop",
        )
    for index, stop in enumerate(sampling.stop):
        if not 1 <= len(stop) <= MAX_STOP_CHARS:
            raise InvalidArgumentError(
                f"a stop string must have 1 to {MAX_STOP_CHARS} characters, got {len(stop)}",
                field=f"sampling.stop[{index}]",
            )
    return list(dict.fromkeys(sampling.stop))


def sampling_params(sampling: inference_pb2.Sampling, config: RouterConfig, model: ServedModel) -> SamplingParams:
    """Every parameter with a value, and a seed in any case."""
    given = {name: getattr(sampling, name) for name in _OPTIONAL_FIELDS if sampling.HasField(name)}
    if len(sampling.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        raise InvalidArgumentError(
            f"{len(sampling.stop_token_ids)} stop tokens were given, at most {MAX_STOP_TOKEN_IDS} are allowed",
            field="sampling.stop_token_ids",
        )
    check_token_ids(list(sampling.stop_token_ids), model, field="sampling.stop_token_ids")
    given.setdefault("max_tokens", max(config.default_max_tokens, given.get("min_tokens", 0)))
    given.setdefault("seed", draw_seed())
    try:
        return SamplingParams(stop_token_ids=tuple(sampling.stop_token_ids), **given)
    except InvalidRequestError as error:
        raise InvalidArgumentError(str(error), field=f"sampling.{error.field}") from error


def draw_seed() -> int:
    """For a request that names none."""
    return secrets.randbits(63)


def check_token_ids(ids: list[int], model: ServedModel, *, field: str) -> None:
    """Refuse ids outside the vocabulary."""
    if ids and not (min(ids) >= 0 and max(ids) < model.vocab_size):
        index = next(index for index, token_id in enumerate(ids) if not 0 <= token_id < model.vocab_size)
        raise InvalidArgumentError(
            f"token id {ids[index]} is not in the vocabulary of {model.vocab_size} tokens", field=f"{field}[{index}]"
        )


def prompt_kind(request: inference_pb2.GenerateRequest) -> str:
    """The one kind of prompt that was given."""
    kinds = [kind for kind in PROMPT_KINDS if request.HasField(kind)]
    if len(kinds) != 1:
        given = " and ".join(kinds) or "none"
        raise InvalidArgumentError(f"exactly one of text, token_ids and chat must be set, got {given}", field="prompt")
    return kinds[0]


async def prompt_ids(request: inference_pb2.GenerateRequest, model: ServedModel) -> list[int]:
    """The prompt as token ids, at least one."""
    kind = prompt_kind(request)
    if kind == "token_ids":
        ids = request.token_ids.ids[:]  # a slice is a list, and faster than list()
        check_token_ids(ids, model, field="token_ids.ids")
    elif kind == "text":
        ids = await _encoded(len(request.text), lambda: model.encode_text(request.text))
    else:
        num_chars = sum(len(message.content) for message in request.chat.messages)
        ids = await _encoded(num_chars, lambda: model.encode_chat(request.chat))
    if not ids:
        raise InvalidArgumentError("the prompt is empty: it must have at least one token", field=kind)
    return ids


async def _encoded(num_chars: int, encode: Callable[[], list[int]]) -> list[int]:
    return encode() if num_chars < THREAD_FROM_CHARS else await asyncio.to_thread(encode)


def fitted(
    params: SamplingParams, num_prompt_tokens: int, model: ServedModel, pool_tokens: int | None, kind: str
) -> SamplingParams:
    """Cap max_tokens to the room the prompt leaves; refuse a prompt that leaves none.

    `pool_tokens` is what the largest worker can hold of one sequence, if that is known.
    """
    for limit, what in ((model.max_model_len, f"of model {model.name}"), (pool_tokens, "of the workers' KV cache")):
        if limit is not None and num_prompt_tokens > limit - 1:
            raise InvalidArgumentError(
                f"the prompt has {num_prompt_tokens} tokens, at most {limit - 1} are allowed: the limit {what} is "
                f"{limit} tokens for prompt and answer together",
                field=kind,
            )
    room = min(limit for limit in (model.max_model_len, pool_tokens) if limit is not None) - num_prompt_tokens
    return replace(params, max_tokens=min(params.max_tokens, room), min_tokens=min(params.min_tokens, room))
