"""A prompt and its ticket come by different ways, in either order; nothing is computed or kept without both."""

from __future__ import annotations

import queue
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import prefill_pool.worker
from engine import wire
from engine.api import GenerateRequest
from engine.config import CacheOptions, EngineOptions, ModelOptions
from engine.engine import Engine, tokens_of
from kv_transfer.ticket import KVTicket
from prefill_pool import early_tickets
from prefill_pool.early_tickets import EarlyTickets
from protos import worker_pb2 as pb
from tests.session_pair import ROUTER, TIMEOUT_S, Peer, make_request, start_prefill

Pair = tuple[Peer, Peer]
Replies = queue.Queue[pb.EngineReply]


@pytest.fixture(scope="module")
def engines(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    directory = tmp_path_factory.mktemp("w")
    with Peer("p", tiny_llama, directory) as prefill, Peer("d", tiny_llama, directory) as decode:
        yield prefill, decode


@pytest.fixture
def pair(engines: Pair) -> Iterator[Pair]:
    """Both workers must be as empty after a test as before it."""
    yield engines
    for peer in engines:
        wait_until(lambda peer=peer: peer.session.num_open() == 0)
        stats = peer.check()
        assert stats.free_blocks == stats.num_blocks
        assert (stats.open_tickets, stats.open_sends, stats.num_waiting) == (0, 0, 0)


@pytest.fixture(scope="module")
def alone(tiny_llama: Path) -> Iterator[Callable[[GenerateRequest], list[int]]]:
    cache = CacheOptions(block_size=16, num_blocks=128)
    with Engine(ModelOptions(path=str(tiny_llama)), cache, EngineOptions(max_step_tokens=64)) as engine:
        yield lambda request: list(tokens_of(engine.generate([request])[0]))


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def request_named(name: str, num_tokens: int = 40) -> GenerateRequest:
    return make_request(name, random.Random(name).choices(range(3, 400), k=num_tokens))


def ask_prefill(peer: Peer, request: GenerateRequest, receiver: str = "d", router: str = ROUTER) -> Replies:
    """Ask for a prompt whose ticket is still to come."""
    message = pb.PrefillRequest(
        router_id=router,
        request=wire.request_to_wire(request),
        epoch=1,
        receiver=pb.WorkerIdentity(worker_id=receiver, epoch=1),
    )
    return peer.send(pb.EngineCommand(prefill=message))


def ask_reserve(peer: Peer, request: GenerateRequest, sender: Peer | None) -> pb.KVTicket:
    message = pb.ReserveRequest(router_id=ROUTER, request=wire.request_to_wire(request), epoch=1)
    if sender is not None:
        message.prefill.CopyFrom(sender.description.identity)
    reply = peer.call(pb.EngineCommand(reserve=message))
    assert reply.WhichOneof("result") == "reserve", reply.error.message
    return reply.reserve.ticket


def early(peer: Peer) -> EarlyTickets:
    """Its tickets without a prompt, as of everything it was told before."""
    peer.check()
    assert peer.session._prefill is not None
    return peer.session._prefill._early


def abort(peer: Peer, name: str, *, decode: bool = False) -> bool:
    """End a request in one craft; whether there was one."""
    message = pb.AbortRequest(request_id=name, attempt=0, reason="the client left")
    command = pb.EngineCommand(abort_decode=message) if decode else pb.EngineCommand(abort_prefill=message)
    return peer.call(command).abort.found


def meet(prefill: Peer, decode: Peer) -> None:
    """Have the pair made."""
    met = decode.description
    message = pb.MeetRequest(epoch=1, worker=met.identity, control_addresses=met.control_addresses, layout=met.layout)
    prefill.call(pb.EngineCommand(meet=message))
    for peer in (prefill, decode):
        wait_until(lambda peer=peer: any(pair.state == "ready" for pair in peer.session.pairs()))


def tokens(replies: Replies, decode: Peer, request: GenerateRequest) -> list[int]:
    reply = replies.get(timeout=TIMEOUT_S)
    assert reply.WhichOneof("result") == "prefill", reply.error.message
    return [*reply.prefill.first.token_ids, *decode.stream(request.request_id)]


def test_a_ticket_behind_its_prompt(pair: Pair, alone: Callable[[GenerateRequest], list[int]]) -> None:
    prefill, decode = pair
    request = request_named("behind")
    replies = ask_prefill(prefill, request)
    wait_until(lambda: prefill.session.stats().num_waiting == 1)
    prefill.session.handle(pb.EngineCommand(ticket=ask_reserve(decode, request, None)))
    assert tokens(replies, decode, request) == alone(request)
    wait_until(lambda: prefill.told.computed_tokens >= 40)  # routers choose by it, and a prompt is news
    assert prefill.told.prompt_tokens_per_s > 0


@pytest.mark.parametrize("first", ["prompt", "ticket"])
def test_the_decode_worker_brings_the_ticket(
    pair: Pair, alone: Callable[[GenerateRequest], list[int]], first: str
) -> None:
    prefill, decode = pair
    meet(prefill, decode)
    request = request_named(f"brought {first}")
    if first == "prompt":
        replies = ask_prefill(prefill, request)
        wait_until(lambda: prefill.session.stats().num_waiting == 1)
        ticket = ask_reserve(decode, request, prefill)
    else:
        ticket = ask_reserve(decode, request, prefill)
        wait_until(lambda: len(early(prefill)) == 1)
        replies = ask_prefill(prefill, request)
    assert tokens(replies, decode, request) == alone(request)
    prefill.session.handle(pb.EngineCommand(ticket=ticket))  # the router's copy comes too late
    assert len(early(prefill)) == 0


def test_a_ticket_is_brought_only_to_the_life_it_is_for(pair: Pair) -> None:
    prefill, decode = pair
    meet(prefill, decode)
    request = request_named("other life")
    message = pb.ReserveRequest(router_id=ROUTER, request=wire.request_to_wire(request), epoch=1)
    message.prefill.worker_id, message.prefill.epoch = "p", 2
    decode.call(pb.EngineCommand(reserve=message))
    known = request_named("this life")
    ask_reserve(decode, known, prefill)
    wait_until(lambda: len(early(prefill)) == 1)
    for name in ("other life", "this life"):
        assert abort(decode, name, decode=True)
    assert not abort(prefill, "other life")
    assert len(early(prefill)) == 1
    assert not abort(prefill, "this life")
    assert len(early(prefill)) == 0


def test_aborted_while_it_waits(pair: Pair) -> None:
    prefill, decode = pair
    request = request_named("aborted")
    replies = ask_prefill(prefill, request)
    assert abort(prefill, "aborted")
    assert replies.get(timeout=TIMEOUT_S).error.status == "ABORTED"
    prefill.session.handle(pb.EngineCommand(ticket=ask_reserve(decode, request, None)))
    assert not abort(prefill, "aborted")
    assert abort(decode, "aborted", decode=True)


def test_a_ticket_brought_behind_the_end_of_its_request(
    pair: Pair, alone: Callable[[GenerateRequest], list[int]]
) -> None:
    """The next request of that name waits for its own, whatever its length."""
    prefill, decode = pair
    meet(prefill, decode)
    for num_tokens in (40, 30):
        assert not abort(prefill, "again")
        ask_reserve(decode, request_named("again"), prefill)
        assert abort(decode, "again", decode=True)
        request = request_named("again", num_tokens)
        replies = ask_prefill(prefill, request)
        wait_until(lambda: decode.session.num_open() == 0)
        prefill.session.handle(pb.EngineCommand(ticket=ask_reserve(decode, request, None)))
        assert tokens(replies, decode, request) == alone(request)


def test_a_ticket_of_another_worker_or_for_another_router_is_not_taken(
    pair: Pair, alone: Callable[[GenerateRequest], list[int]]
) -> None:
    prefill, decode = pair
    meet(prefill, decode)
    for name, others in (("stranger", {"receiver": "e"}), ("other router", {"router": "router-1"})):
        replies = ask_prefill(prefill, request_named(name), **others)
        ask_reserve(decode, request_named(name), prefill)
        marker = request_named(f"behind {name}")  # brought over the same pair, so behind it
        ask_reserve(decode, marker, prefill)
        wait_until(lambda: len(early(prefill)) == 1)
        assert prefill.session.stats().num_waiting == 1
        assert abort(prefill, name)
        assert replies.get(timeout=TIMEOUT_S).error.status == "ABORTED"
        assert abort(decode, name, decode=True)
        assert tokens(ask_prefill(prefill, marker), decode, marker) == alone(marker)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_tokens": 30}, "the ticket is for 30 tokens, the request has 40"),
        ({"first_token": -16}, "begins at token -16"),
        ({"first_token": 7}, "begins at token 7"),
        ({"first_token": 48}, "begins at token 48"),
        ({"router_id": "router-1"}, "is for router-1"),
        ({"layout": pb.Layout()}, "must be"),
    ],
)
@pytest.mark.parametrize("way", ["with the prompt", "behind it"])
def test_a_ticket_that_cannot_be_used_is_refused(pair: Pair, change: dict[str, Any], said: str, way: str) -> None:
    prefill, decode = pair
    request = request_named("wrong")
    ticket = ask_reserve(decode, request, None)
    for name, value in change.items():
        if isinstance(value, pb.Layout):
            ticket.layout.CopyFrom(value)
        else:
            setattr(ticket, name, value)
    if way == "behind it":
        replies = ask_prefill(prefill, request)
        prefill.session.handle(pb.EngineCommand(ticket=ticket))
    else:
        replies = start_prefill(prefill, request, ticket)
    error = replies.get(timeout=TIMEOUT_S).error
    assert error.status == "INVALID_ARGUMENT"
    assert said in error.message
    assert abort(decode, "wrong", decode=True)


def test_a_prompt_that_says_nothing_of_a_ticket(pair: Pair) -> None:
    prefill, _ = pair
    message = pb.PrefillRequest(router_id=ROUTER, request=wire.request_to_wire(request_named("bare")), epoch=1)
    error = prefill.call(pb.EngineCommand(prefill=message)).error
    assert (error.status, error.message) == (
        "INVALID_ARGUMENT",
        "ticket: neither the ticket nor its receiver is named",
    )


def test_its_router_goes_while_it_waits(pair: Pair) -> None:
    prefill, _ = pair
    replies = ask_prefill(prefill, request_named("orphan"))
    prefill.session.handle(pb.EngineCommand(router_gone=pb.RouterGone(router_id="another")))
    assert prefill.check().num_waiting == 1
    prefill.session.handle(pb.EngineCommand(router_gone=pb.RouterGone(router_id=ROUTER)))
    assert "router-0 is gone" in replies.get(timeout=TIMEOUT_S).error.message


def test_no_ticket_in_time(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill_pool.worker, "TICKET_WAIT_S", 0.05)
    prefill, _ = pair
    error = ask_prefill(prefill, request_named("never")).get(timeout=TIMEOUT_S).error
    assert (error.status, error.message) == ("INTERNAL", "EngineError: no ticket of d/1 came within 0.05 s")


def test_the_same_attempt_twice(pair: Pair) -> None:
    prefill, _ = pair
    request = request_named("twice")
    waiting = ask_prefill(prefill, request)
    assert ask_prefill(prefill, request).get(timeout=TIMEOUT_S).error.status == "RESOURCE_EXHAUSTED"
    prefill.call(pb.EngineCommand(abort_prefill=pb.AbortRequest(request_id="twice", attempt=0)))
    assert waiting.get(timeout=TIMEOUT_S).error.status == "ABORTED"


def test_tickets_without_a_prompt_do_not_pile_up(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(early_tickets, "MAX_KEPT", 2)
    prefill, decode = pair
    meet(prefill, decode)
    names = [f"piled {index}" for index in range(4)]
    for name in names:
        ask_reserve(decode, request_named(name), prefill)
    wait_until(lambda: [name for name, _ in early(prefill)._kept] == names[-2:])
    prefill.session.handle(pb.EngineCommand(router_gone=pb.RouterGone(router_id=ROUTER)))
    assert len(early(prefill)) == 0
    for name in names:
        assert abort(decode, name, decode=True)


def test_a_ticket_whose_prompt_comes_too_late_is_not_used(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    prefill, decode = pair
    meet(prefill, decode)
    request = request_named("late")
    ask_reserve(decode, request, prefill)
    wait_until(lambda: len(early(prefill)) == 1)
    now = time.monotonic
    monkeypatch.setattr(early_tickets.time, "monotonic", lambda: now() + 31.0)
    ask_prefill(prefill, request)
    assert len(early(prefill)) == 0
    monkeypatch.undo()
    assert abort(prefill, "late")
    assert abort(decode, "late", decode=True)


def test_a_worker_speaks_only_for_itself(pair: Pair) -> None:
    """A ticket of somebody else, brought over a pair, ends the pair."""
    prefill, decode = pair
    meet(prefill, decode)
    ticket = ask_reserve(decode, request_named("forged"), None)
    ticket.receiver.worker_id = "somebody"
    decode.session._node.tell_granted("p", 1, KVTicket.from_proto(ticket))
    wait_until(lambda: not prefill.session.pairs())
    assert len(early(prefill)) == 0
    assert decode.call(pb.EngineCommand(abort_decode=pb.AbortRequest(request_id="forged"))).abort.found
    wait_until(lambda: not decode.session.pairs())
