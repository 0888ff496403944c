"""Whatever a client sends, it hears which field is wrong and why, and nothing is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
from pathlib import Path

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.config import ModelOptions
from protos import inference_pb2
from router import validation
from router.config import RouterConfig
from router.errors import InvalidArgumentError
from router.model import ServedModel
from tests.router.fake_worker import VOCAB_SIZE, expected_answer
from tests.router.harness import PROMPT, Behaviour, Refusal, ask, cluster, eventually, run

CONFIG = RouterConfig()


def chat(*turns: tuple[str, str]) -> inference_pb2.Chat:
    return inference_pb2.Chat(messages=[inference_pb2.ChatMessage(role=role, content=text) for role, text in turns])


def request(**fields: object) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(**fields)  # type: ignore[arg-type]


def sampling(**fields: object) -> inference_pb2.GenerateRequest:
    return request(text="x", sampling=inference_pb2.Sampling(**fields))  # type: ignore[arg-type]


def ids(*token_ids: int) -> inference_pb2.TokenIds:
    return inference_pb2.TokenIds(ids=token_ids)


BAD: list[tuple[inference_pb2.GenerateRequest, str, str]] = [
    (request(), "prompt", "got none"),
    (request(text="a", token_ids=ids(1)), "prompt", "got text and token_ids"),
    (request(text="a", token_ids=ids(1), chat=chat(("user", "a"))), "prompt", "text and token_ids and chat"),
    (request(text=""), "text", "empty"),
    (request(token_ids=ids()), "token_ids", "empty"),
    (request(chat=chat()), "chat.messages", "at least one message"),
    (request(chat=chat(("user", "a"), ("robot", "b"))), "chat.messages[1].role", "'robot'"),
    (request(token_ids=ids(1, 2, VOCAB_SIZE)), "token_ids.ids[2]", "vocabulary of 300"),
    (request(token_ids=ids(-1)), "token_ids.ids[0]", "-1"),
    (request(token_ids=ids(*[5] * 512)), "token_ids", "the prompt has 512 tokens, at most 511"),
    (request(text="a" * 2000), "text", "2000 tokens, at most 511"),
    (request(text="x", request_id="r" * 129), "request_id", "129 characters"),
    (request(text="x", request_id="a\nb"), "request_id", "printable"),
    (request(text="x", deadline_s=0.0), "deadline_s", "got 0"),
    (request(text="x", deadline_s=math.nan), "deadline_s", "nan"),
    (request(text="x", deadline_s=math.inf), "deadline_s", "inf"),
    (sampling(temperature=-0.1), "sampling.temperature", "-0.1"),
    (sampling(temperature=math.nan), "sampling.temperature", "nan"),
    (sampling(temperature=math.inf), "sampling.temperature", "inf"),
    (sampling(top_p=0.0), "sampling.top_p", "0"),
    (sampling(top_p=1.5), "sampling.top_p", "1.5"),
    (sampling(top_k=-1), "sampling.top_k", "-1"),
    (sampling(min_p=math.nan), "sampling.min_p", "nan"),
    (sampling(repetition_penalty=0.0), "sampling.repetition_penalty", "0"),
    (sampling(presence_penalty=math.nan), "sampling.presence_penalty", "nan"),
    (sampling(frequency_penalty=1e9), "sampling.frequency_penalty", "1000000000"),
    (sampling(max_tokens=0), "sampling.max_tokens", "0"),
    (sampling(max_tokens=-5), "sampling.max_tokens", "-5"),
    (sampling(min_tokens=-1), "sampling.min_tokens", "-1"),
    (sampling(min_tokens=9, max_tokens=8), "sampling.min_tokens", "9"),
    (sampling(logprobs=21), "sampling.logprobs", "21"),
    (sampling(stop_token_ids=[1, VOCAB_SIZE]), "sampling.stop_token_ids[1]", "vocabulary"),
    (sampling(stop_token_ids=[1] * 257), "sampling.stop_token_ids", "257"),
    (sampling(stop=["a", ""]), "sampling.stop[1]", "got 0"),
    (sampling(stop=["a" * 10_000]), "sampling.stop[0]", "10000"),
    (sampling(stop=["a"] * 100_000), "sampling.stop", "100000"),
]


def test_each_bad_request_names_its_field(model: Path) -> None:
    async def scenario() -> None:
        async with cluster(model) as made:
            for bad, field, said in BAD:
                refusal = await made.refused(bad)
                assert refusal.code is grpc.StatusCode.INVALID_ARGUMENT, (field, refusal)
                assert refusal.field == field
                assert said in refusal.message, refusal.message
            assert made.app.stats().outcomes == {"invalid_argument": len(BAD)}
            assert not made.workers["d0"].reserved
            await made.idle()

    run(scenario())


def test_unknown_model_is_not_found(model: Path) -> None:
    async def scenario() -> None:
        async with cluster(model) as made:
            refusal = await made.refused(request(text="x", model="other"))
            assert refusal.code is grpc.StatusCode.NOT_FOUND
            assert "'other'" in refusal.message
            assert model.name in refusal.message

    run(scenario())


def test_running_request_id_is_taken(model: Path) -> None:
    async def scenario() -> None:
        async with cluster(model) as made:
            made.workers["d0"].behaviour.step_s = 0.01
            first = asyncio.create_task(made.ask(ask("same", num=30)))
            await eventually(lambda: made.app.stats().in_flight)
            refusal = await made.refused(ask("same"))
            assert refusal.code is grpc.StatusCode.ALREADY_EXISTS
            assert (await first).token_ids == expected_answer(PROMPT, 30)
            assert (await made.ask(ask("same"))).reason == "LENGTH"

    run(scenario())


def test_bytes_that_are_no_message_are_refused(model: Path) -> None:
    async def scenario() -> None:
        async with cluster(model) as made:
            for method, body in (
                ("Generate", b"\xff\xff\xff"),
                ("Generate", b"\x1a\x02\xff\xfe"),
                ("Cancel", b"\x0a\x01\xff"),
                ("Tokenize", b"\x12\x09a"),
            ):
                maker = made.channel.unary_stream if method == "Generate" else made.channel.unary_unary
                call = maker(f"/pdserve.v1.Inference/{method}")(body)
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await (anext(aiter(call)) if method == "Generate" else call)
                refusal = Refusal.of(caught.value)
                assert (refusal.code, refusal.field) == (grpc.StatusCode.INVALID_ARGUMENT, "request")
            assert (await made.ask(ask())).reason == "LENGTH"

    run(scenario())


def test_mutated_messages_never_break_the_router(model: Path) -> None:
    async def scenario() -> None:
        rng = random.Random(3)
        sound = inference_pb2.GenerateRequest(
            chat=chat(("user", "Paris is where?"), ("assistant", "In France.")),
            sampling=inference_pb2.Sampling(max_tokens=3, temperature=0.5, stop=["x"], stop_token_ids=[1]),
            priority=1,
            deadline_s=5.0,
        ).SerializeToString()
        allowed = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"}
        seen: set[str] = set()
        async with cluster(model, behaviour=Behaviour(step_s=0.0)) as made:
            generate = made.channel.unary_stream("/pdserve.v1.Inference/Generate")
            for _ in range(200):
                body = bytearray(sound)
                for _ in range(rng.randint(1, 3)):
                    body[rng.randrange(len(body))] = rng.randrange(256)
                call = generate(bytes(body[: rng.choice([len(body), len(body), rng.randrange(len(body))])]))
                with contextlib.suppress(grpc.aio.AioRpcError):
                    async for _ in call:
                        pass
                seen.add((await call.code()).name)
            assert seen <= allowed
            assert {"OK", "INVALID_ARGUMENT"} <= seen
            await made.idle()

    run(scenario())


def test_message_over_the_limit_is_refused(model: Path) -> None:
    async def scenario() -> None:
        async with cluster(model, max_request_bytes=10_000) as made:
            refusal = await made.refused(request(text="a" * 20_000))
            assert refusal.code is grpc.StatusCode.RESOURCE_EXHAUSTED

    run(scenario())


def test_prompt_larger_than_the_kv_pool_is_refused_with_the_limit(model: Path) -> None:
    async def scenario() -> None:
        async with cluster(model, decode=0) as made:
            await made.add_worker("d0", "decode", num_blocks=4)
            await made.ready(2)
            refusal = await made.refused(request(token_ids=ids(*[5] * 64)))
            assert (refusal.code, refusal.field) == (grpc.StatusCode.INVALID_ARGUMENT, "token_ids")
            assert "64 tokens, at most 63" in refusal.message
            assert "KV cache" in refusal.message
            longest = [5] * 63
            answer = await made.ask(ask(prompt=longest, num=100))
            assert answer.token_ids == expected_answer(longest, 1)

    run(scenario())


def test_max_tokens_is_capped_to_the_room(model: Path) -> None:
    async def scenario() -> None:
        async with cluster(model) as made:
            prompt = [7] * 500
            answer = await made.ask(ask(prompt=prompt, num=10**9))
            assert (len(answer.token_ids), answer.reason) == (12, "LENGTH")
            default = await made.ask(request(token_ids=ids(*PROMPT)))
            assert len(default.token_ids) == 256

    run(scenario())


def test_text_and_chat_are_cut_as_tokenize_shows(model: Path) -> None:
    async def scenario() -> None:
        async with cluster(model) as made:
            turns = chat(("system", "Be brief."), ("user", "Paris is where?"))
            for fields in ({"text": "the quick fox"}, {"chat": turns}, {"text": "é" * 200}):
                shown = await made.stub.Tokenize(inference_pb2.TokenizeRequest(**fields))
                answer = await made.ask(request(sampling=inference_pb2.Sampling(max_tokens=4), **fields))
                assert answer.token_ids == expected_answer(list(shown.token_ids), 4)
            shown = await made.stub.Tokenize(inference_pb2.TokenizeRequest(chat=turns))
            assert shown.text == "<|im_start|>system Be brief.<|im_start|>user Paris is where?"
            for bad, code in (
                (inference_pb2.TokenizeRequest(), grpc.StatusCode.INVALID_ARGUMENT),
                (inference_pb2.TokenizeRequest(text="x", chat=turns), grpc.StatusCode.INVALID_ARGUMENT),
                (inference_pb2.TokenizeRequest(text="x", model="y"), grpc.StatusCode.NOT_FOUND),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await made.stub.Tokenize(bad)
                assert caught.value.code() is code

    run(scenario())


numbers = st.one_of(st.floats(width=64), st.integers(-3, 3).map(float))
small = st.integers(-(2**31), 2**31 - 1) | st.integers(-3, 400)
fuzzed = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(
            ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"), numbers
        ),
        **dict.fromkeys(("top_k", "max_tokens", "min_tokens", "logprobs"), small),
        "seed": st.integers(0, 2**64 - 1),
        "ignore_eos": st.booleans(),
        "stop_token_ids": st.lists(small, max_size=3),
        "stop": st.lists(st.text(max_size=5), max_size=20),
    },
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fields=fuzzed, length=st.integers(1, 600), pool=st.none() | st.integers(2, 700))
def test_fuzzed_sampling_is_either_sound_or_refused_by_field(
    served: ServedModel, fields: dict[str, object], length: int, pool: int | None
) -> None:
    message = inference_pb2.Sampling(**fields)  # type: ignore[arg-type]
    try:
        validation.stop_strings(message, served)
        params = validation.sampling_params(message, CONFIG, served)
        params = validation.fitted(params, length, served, pool, "text")
    except InvalidArgumentError as error:
        named = error.field
    else:
        named = None
    if named is not None:
        assert named == "text" or named.startswith("sampling.")
        return
    assert 0 <= params.temperature <= 100
    assert 0 < params.top_p <= 1
    assert params.max_tokens >= 1
    assert 0 <= params.min_tokens <= params.max_tokens
    assert length + params.max_tokens <= min(served.max_model_len, pool or served.max_model_len)
    assert all(0 <= token_id < VOCAB_SIZE for token_id in params.stop_token_ids)
    assert params.seed == fields.get("seed", params.seed)


@pytest.fixture(scope="module")
def served(model: Path) -> ServedModel:
    return ServedModel.load(ModelOptions(path=str(model)))
