"""Prefill on one engine, decode on another: the same tokens as one engine alone, and no block lost."""

import random
import socket
import time
from dataclasses import replace

import pytest

from engine.config import CacheOptions, EngineOptions, ModelOptions
from engine.engine import Engine, tokens_of
from protos import worker_pb2 as pb
from tests.session_pair import Peer, make_request, reserve, split_generate, start_prefill

VOCAB = 400


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed * 10_007 + length).choices(range(3, VOCAB), k=length)


@pytest.fixture(scope="module")
def pair(tiny_llama, tmp_path_factory):
    directory = tmp_path_factory.mktemp("s")
    with Peer("p", tiny_llama, directory) as prefill, Peer("d", tiny_llama, directory) as decode:
        yield prefill, decode


@pytest.fixture
def clean_pair(pair):
    """Both workers must be as empty after a test as before it."""
    yield pair
    for peer in pair:
        wait_until(lambda peer=peer: peer.session.num_open() == 0)
        stats = peer.check()
        assert stats.free_blocks == stats.num_blocks
        assert stats.open_tickets == stats.open_sends == 0


def wait_until(condition, timeout_s: float = 10.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def alone(tiny_llama):
    cache = CacheOptions(block_size=16, num_blocks=128)
    with Engine(ModelOptions(path=str(tiny_llama)), cache, EngineOptions(max_step_tokens=64)) as engine:
        yield lambda request: list(tokens_of(engine.generate([request])[0]))


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 64, 100, 333])
def test_split_equals_alone(clean_pair, alone, length):
    request = make_request(f"len{length}", prompt_of(length))
    assert split_generate(*clean_pair, request) == alone(request)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_split_sampling_with_a_seed_equals_alone(clean_pair, alone, seed):
    request = make_request(f"seed{seed}", prompt_of(40), temperature=1.0, top_p=0.9, seed=seed, max_tokens=30)
    assert split_generate(*clean_pair, request) == alone(request)


def test_blocks_the_decode_worker_holds_are_not_sent_again(clean_pair, alone):
    prefill, decode = clean_pair
    first = make_request("again-a", prompt_of(100, seed=5))
    before = prefill.session.stats().sent_bytes
    split_generate(prefill, decode, first)
    sent = prefill.session.stats().sent_bytes
    bytes_per_token = (sent - before) / 100
    longer = make_request("again-b", [*prompt_of(100, seed=5), *prompt_of(20, seed=6)])
    reserved = reserve(decode, longer).reserve
    assert reserved.ticket.first_token == 96
    reply = start_prefill(prefill, longer, reserved.ticket).get(timeout=60)
    tokens = [*reply.prefill.first.token_ids, *decode.stream("again-b")]
    assert tokens == alone(longer)
    assert reply.prefill.cached_tokens == 96
    assert prefill.session.stats().sent_bytes - sent == 24 * bytes_per_token


def test_a_resumed_request_goes_on_with_the_same_tokens(clean_pair, alone):
    request = make_request("resumed", prompt_of(50, seed=9), temperature=0.8, seed=11, max_tokens=20)
    whole = alone(request)
    rest = replace(request, attempt=1, resume_from=tuple(whole[:7]))
    assert split_generate(*clean_pair, rest) == whole[7:]


def test_a_first_token_that_ends_the_request(clean_pair):
    request = make_request("one", prompt_of(20, seed=3), max_tokens=1)
    assert len(split_generate(*clean_pair, request)) == 1


@pytest.mark.parametrize("phase", ["reserved", "prefilling", "decoding"])
def test_abort_frees_both_sides(clean_pair, phase):
    prefill, decode = clean_pair
    request = make_request(f"abort-{phase}", prompt_of(600, seed=4), max_tokens=400)
    ticket = reserve(decode, request).reserve.ticket
    if phase != "reserved":
        replies = start_prefill(prefill, request, ticket)
    if phase == "decoding":
        assert replies.get(timeout=60).WhichOneof("result") == "prefill"
        decode.outputs.get(timeout=60)
    abort = pb.AbortRequest(request_id=request.request_id, attempt=0, reason="test")
    assert decode.call(pb.EngineCommand(abort_decode=abort)).abort.found
    prefill.call(pb.EngineCommand(abort_prefill=abort))
    if phase == "prefilling":
        assert replies.get(timeout=60).WhichOneof("result") in ("error", "prefill")


def test_kv_that_cannot_leave_behind_the_first_token_fails_the_attempt(clean_pair):
    prefill, decode = clean_pair
    request = make_request("nowhere", prompt_of(20, seed=8))
    ticket = reserve(decode, request).reserve.ticket
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        ticket.control_addresses[0] = f"127.0.0.1:{nobody.getsockname()[1]}"
        reply = start_prefill(prefill, request, ticket).get(timeout=60)
        assert reply.WhichOneof("result") == "prefill"
    failure = prefill.outputs.get(timeout=60)
    assert (failure.request_id, failure.offset, failure.finish) == ("nowhere", 1, pb.ENGINE_FINISH_FAILED)
    assert "the transfer ended LOST" in failure.reason
    abort = pb.AbortRequest(request_id="nowhere", attempt=0, reason="test")
    assert decode.call(pb.EngineCommand(abort_decode=abort)).abort.found


def test_a_lost_router_ends_all_it_asked_for(clean_pair):
    prefill, decode = clean_pair
    for index in range(4):
        request = make_request(f"orphan{index}", prompt_of(300, seed=index), max_tokens=300)
        start_prefill(prefill, request, reserve(decode, request).reserve.ticket)
    for peer in clean_pair:
        peer.session.handle(pb.EngineCommand(router_gone=pb.RouterGone(router_id="router-0")))


def test_refusals_name_the_reason(clean_pair):
    _, decode = clean_pair
    too_long = reserve(decode, make_request("long", prompt_of(2100))).error
    assert too_long.status == "INVALID_ARGUMENT"
    assert "the prompt has 2100 tokens, the limit is 2047" in too_long.message
    outside = reserve(decode, make_request("outside", [5, VOCAB + 7])).error
    assert "token id 407 at index 1 is outside the vocabulary of 400" in outside.message


def test_a_full_decode_worker_refuses_and_promises_nothing_twice(clean_pair):
    _, decode = clean_pair
    reserved = []
    for index in range(10):
        reply = reserve(decode, make_request(f"full{index}", prompt_of(500, seed=index), max_tokens=200))
        if reply.WhichOneof("result") == "error":
            break
        reserved.append(f"full{index}")
    assert reply.error.status == "RESOURCE_EXHAUSTED"
    assert 2 <= len(reserved) <= 3
    for name in reserved:
        abort = pb.AbortRequest(request_id=name, attempt=0)
        assert decode.call(pb.EngineCommand(abort_decode=abort)).abort.found


def test_a_ticket_of_another_epoch_fails_the_prefill_not_the_worker(clean_pair, alone):
    prefill, decode = clean_pair
    request = make_request("old", prompt_of(30))
    ticket = reserve(decode, request).reserve.ticket
    ticket.receiver.epoch = 7
    reply = start_prefill(prefill, request, ticket).get(timeout=60)
    assert reply.WhichOneof("result") in ("error", "prefill")
    abort = pb.AbortRequest(request_id="old", attempt=0)
    assert decode.call(pb.EngineCommand(abort_decode=abort)).abort.found
    again = make_request("new", prompt_of(30))
    assert split_generate(prefill, decode, again) == alone(again)


def test_many_at_once(clean_pair, alone):
    prefill, decode = clean_pair
    requests = [make_request(f"many{index}", prompt_of(7 + 23 * index, seed=index)) for index in range(8)]
    waiting = [start_prefill(prefill, item, reserve(decode, item).reserve.ticket) for item in requests]
    tokens = {item.request_id: [] for item in requests}
    finished = set()
    for item, replies in zip(requests, waiting, strict=True):
        tokens[item.request_id] += replies.get(timeout=60).prefill.first.token_ids
    while len(finished) < len(requests):
        output = decode.outputs.get(timeout=60)
        tokens[output.request_id] += output.token_ids
        if output.finish:
            finished.add(output.request_id)
    for item in requests:
        assert tokens[item.request_id] == alone(item)
