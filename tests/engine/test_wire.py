import dataclasses
import sys
from subprocess import run

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.api import FinishReason, GenerateRequest, SamplingParams, TokenLogprobs, TokenOutput
from engine.errors import InvalidRequestError
from engine.wire import (
    output_from_wire,
    output_to_wire,
    params_from_wire,
    params_to_wire,
    request_from_wire,
    request_to_wire,
)
from protos import worker_pb2

token_ids = st.lists(st.integers(0, 2**31 - 1), max_size=5).map(tuple)
single = st.floats(-50, 0, width=32)
params = st.builds(
    SamplingParams,
    temperature=st.floats(0, 100),
    top_p=st.floats(0.01, 1),
    top_k=st.integers(0, 2**31 - 1),
    min_p=st.floats(0, 1),
    repetition_penalty=st.floats(0.01, 100),
    presence_penalty=st.floats(-100, 100),
    frequency_penalty=st.floats(-100, 100),
    max_tokens=st.integers(10, 2**31 - 1),
    min_tokens=st.integers(0, 10),
    stop_token_ids=token_ids,
    seed=st.integers(0, 2**64 - 1),
    logprobs=st.none() | st.integers(0, 20),
    ignore_eos=st.booleans(),
)
requests = st.builds(
    GenerateRequest,
    request_id=st.text(max_size=20),
    prompt_token_ids=token_ids.filter(len),
    params=params,
    attempt=st.integers(0, 100),
    priority=st.integers(-5, 5),
    deadline_s=st.none() | st.floats(1e-6, 1e6),
    resume_from=token_ids,
    age_s=st.floats(0, 1e6),
    num_preemptions=st.integers(0, 9),
)
logprobs = st.builds(
    TokenLogprobs,
    token_id=st.integers(0, 2**31 - 1),
    logprob=single,
    top=st.lists(st.tuples(st.integers(0, 99), single), max_size=3).map(tuple),
)
outputs = st.builds(
    TokenOutput,
    request_id=st.text(max_size=20),
    attempt=st.integers(0, 100),
    offset=st.integers(0, 2**40),
    token_ids=token_ids,
    logprobs=st.lists(logprobs, max_size=3).map(tuple),
    finish_reason=st.none() | st.sampled_from(FinishReason),
    reason=st.text(max_size=20),
    num_cached_tokens=st.integers(0, 10**6),
)


@settings(deadline=None)
@given(requests)
def test_a_request_survives_the_journey(request: GenerateRequest) -> None:
    wire = request_to_wire(request).SerializeToString()
    assert request_from_wire(worker_pb2.EngineRequest.FromString(wire)) == request


@settings(deadline=None)
@given(outputs)
def test_an_output_survives_the_journey(output: TokenOutput) -> None:
    wire = output_to_wire(output).SerializeToString()
    assert output_from_wire(worker_pb2.TokenOutput.FromString(wire)) == output


def test_a_deadline_that_has_passed_is_not_lost() -> None:
    request = GenerateRequest(request_id="r", prompt_token_ids=(1,), params=SamplingParams(), deadline_s=-3.0)
    deadline_s = request_from_wire(request_to_wire(request)).deadline_s
    assert deadline_s is not None
    assert 0 < deadline_s < 1e-6


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("max_tokens", 0),
        ("min_tokens", 300),
        ("logprobs", 21),
        ("logprobs", -2),
        ("top_k", -1),
    ],
)
def test_a_bad_value_is_refused_with_its_field(field: str, value: float) -> None:
    message = params_to_wire(SamplingParams())
    setattr(message, field, value)
    with pytest.raises(InvalidRequestError) as caught:
        params_from_wire(message)
    assert caught.value.field == field


@pytest.mark.parametrize("field", ["params", "prompt_token_ids"])
def test_a_missing_part_is_named(field: str) -> None:
    message = request_to_wire(GenerateRequest(request_id="r", prompt_token_ids=(1,), params=SamplingParams()))
    message.ClearField(field)
    with pytest.raises(InvalidRequestError) as caught:
        request_from_wire(message)
    assert caught.value.field == field


def test_an_unknown_finish_ends_the_stream_as_failed() -> None:
    message = output_to_wire(TokenOutput("r", 0, 0, (1,)))
    message.finish = 99
    assert output_from_wire(message).finish_reason is FinishReason.FAILED


def test_every_field_of_the_engines_values_has_a_place_on_the_wire() -> None:
    for value, message in [
        (SamplingParams, worker_pb2.SamplingParams),
        (GenerateRequest, worker_pb2.EngineRequest),
    ]:
        assert {field.name for field in dataclasses.fields(value)} == set(message.DESCRIPTOR.fields_by_name)


def test_what_the_router_uses_is_free_of_torch() -> None:
    names = ["api", "block_hash", "config", "model_source", "models.config", "stream_decoder", "tokenizer", "wire"]
    imports = ", ".join(f"engine.{name}" for name in names)
    code = f"import sys, {imports}; sys.exit('torch' in sys.modules)"
    assert run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
