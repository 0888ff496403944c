"""What a sender hears, and that one ticket's end leaves the pair and the other tickets alone."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from kv_transfer.lane import CpuLane
from kv_transfer.receiver import ReceiverPair
from kv_transfer.sender import SenderPair
from kv_transfer.ticket import SendResult, TicketState
from tests.kv_transfer.conftest import (
    BOUND_S,
    LAYOUT,
    Make,
    Memory,
    Two,
    first_token_of,
    offer,
    send_all,
    slots,
)


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + BOUND_S
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, f"waited {BOUND_S} s until {what}"
        pause.wait(0.005)


def test_a_cancel_by_the_sender_mid_transfer_leaves_the_pair_usable(two: Two) -> None:
    delivery = offer(two.receiver, 40, range(5))
    job = two.sender.open_send(delivery.ticket, delivery.sent.put)
    job.push(0, 1, 0, slots(range(5), 0, 40))
    wait_until(lambda: two.receiver.stats().received_pieces == 1, "the first layer came")
    start = time.monotonic()
    job.abort("client left")
    assert delivery.at_sender() == SendResult(delivery.ticket.ticket_id, TicketState.ABORTED, "client left")
    state, reason = delivery.at_receiver()  # type: ignore[misc]
    assert time.monotonic() - start < 5 * 0.2
    assert state is TicketState.ABORTED
    assert "client left" in reason
    delivery.assert_told_once()
    assert_usable(two)


def test_a_cancel_by_the_receiver_mid_transfer_leaves_the_pair_usable(two: Two) -> None:
    delivery = offer(two.receiver, 40, range(5))
    job = two.sender.open_send(delivery.ticket, delivery.sent.put)
    job.push(0, 1, 0, slots(range(5), 0, 40))
    wait_until(lambda: two.receiver.stats().received_pieces == 1, "the first layer came")
    start = time.monotonic()
    assert two.receiver.abort(delivery.ticket.ticket_id, "client left")
    assert not two.receiver.abort(delivery.ticket.ticket_id, "again")
    assert delivery.at_receiver() == (TicketState.ABORTED, "client left")
    assert delivery.at_sender().state is TicketState.ABORTED
    assert time.monotonic() - start < 5 * 0.2
    job.push(1, 1, 0, slots(range(5), 0, 40))
    job.finish(first_token_of(delivery))
    delivery.assert_told_once()
    assert_usable(two)


def assert_usable(two: Two) -> None:
    """The pair in use carries the next ticket, and nothing else is open."""
    two.receiver.check_integrity(idle=True)
    two.sender.check_integrity(idle=True)
    delivery = offer(two.receiver, 24, [7, 8, 9])
    send_all(two.sender, delivery, [3, 1, 2])
    delivery.assert_delivered()
    two.assert_same([3, 1, 2], [7, 8, 9], 0, 24)
    assert two.sender.stats().pairs == two.receiver.stats().pairs == 1
    assert two.sender.stats().lost_peers == two.receiver.stats().lost_peers == 0


def test_a_sender_frees_nothing_while_its_memory_is_read(two: Two) -> None:
    delivery = offer(two.receiver, 8, [0])
    two.source.gather_gate.clear()
    job = two.sender.open_send(delivery.ticket, delivery.sent.put)
    job.push(0, 1, 0, slots([0], 0, 8))
    assert two.source.gathering.wait(BOUND_S)
    job.abort("client left")
    threading.Event().wait(0.1)
    assert delivery.sent.empty()
    two.source.gather_gate.set()
    assert delivery.at_sender().state is TicketState.ABORTED
    assert delivery.at_receiver()[0] is TicketState.ABORTED  # type: ignore[index]
    assert_usable(two)


def test_a_gather_that_fails_ends_its_ticket_alone(two: Two) -> None:
    delivery = offer(two.receiver, 8, [0])
    job = two.sender.open_send(delivery.ticket, delivery.sent.put)
    job.push(0, 1, 0, np.full(8, 100_000))
    result = delivery.at_sender()
    assert result.state is TicketState.ABORTED
    assert "gathering KV failed: IndexError" in result.reason
    assert delivery.at_receiver()[0] is TicketState.ABORTED  # type: ignore[index]
    assert_usable(two)


def test_writes_are_joined_while_the_pair_is_busy(two: Two) -> None:
    delivery = offer(two.receiver, 64, range(8))
    job = two.sender.open_send(delivery.ticket, delivery.sent.put)
    two.source.gather_gate.clear()
    job.push(0, 1, 0, slots(range(8), 0, 1))
    assert two.source.gathering.wait(BOUND_S)
    for token in range(1, 64):
        for layer in range(3):
            job.push(layer, 1, token, slots(range(8), token, token + 1))
    job.push(1, 2, 0, slots(range(8), 0, 1))
    job.finish(first_token_of(delivery))
    two.source.gather_gate.set()
    delivery.assert_delivered()
    two.assert_same(range(8), range(8), 0, 64)
    assert two.sender.stats().sent_pieces <= 66, "the three layers of a token travel together"


def test_large_writes_are_cut(make_node: Make) -> None:
    layout = replace(LAYOUT, num_kv_heads=8, head_dim=128)
    source, target = Memory(layout, seed=1), Memory(layout)
    sender = make_node("prefill", source, layout=layout, piece_mib=1, staging_mib=2)
    receiver = make_node("decode", target, layout=layout, piece_mib=1, staging_mib=2)
    delivery = offer(receiver, 510, range(64))
    job = sender.open_send(delivery.ticket, delivery.sent.put)
    job.push(0, 3, 0, np.arange(510))
    job.finish(first_token_of(delivery))
    delivery.assert_delivered()
    assert (target.kv[:, :, :510] == source.kv[:, :, :510]).all()
    assert sender.stats().sent_pieces >= 12
    assert sender.stats().sent_bytes == 510 * 3 * layout.bytes_per_token_layer


def test_many_tickets_at_once_over_one_pair(two: Two) -> None:
    deliveries = [offer(two.receiver, 15, [2 * n, 2 * n + 1]) for n in range(30)]
    order = threading.Barrier(5)

    def send(share: int) -> None:
        order.wait(BOUND_S)
        for n in range(share, 30, 5):
            send_all(two.sender, deliveries[n], [60 - 2 * n, 61 - 2 * n], chunks=[8, 7])

    threads = [threading.Thread(target=send, args=[share]) for share in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(BOUND_S)
    for n, delivery in enumerate(deliveries):
        delivery.assert_delivered()
        two.assert_same([60 - 2 * n, 61 - 2 * n], [2 * n, 2 * n + 1], 0, 15)
    assert two.sender.stats().pairs == 1
    two.receiver.check_integrity(idle=True)
    two.sender.check_integrity(idle=True)


def test_no_verdict_in_time_is_recorded_as_lost(make_node: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    sender = make_node("prefill", Memory(LAYOUT), settle_timeout_s=0.2)
    receiver = make_node("decode", Memory(LAYOUT))
    monkeypatch.setattr(ReceiverPair, "tell_settled", lambda *_: None)
    delivery = offer(receiver, 8, [0])
    send_all(sender, delivery, [0])
    result = delivery.at_sender()
    assert result.state is TicketState.LOST
    assert "no verdict within 0.2 s" in result.reason
    delivery.at_receiver()


def test_an_idle_pair_is_closed_and_made_again_when_needed(make_node: Make) -> None:
    sender = make_node("prefill", Memory(LAYOUT), idle_pair_s=0.2)
    receiver = make_node("decode", Memory(LAYOUT))
    for _ in range(2):
        delivery = offer(receiver, 8, [0])
        send_all(sender, delivery, [0])
        delivery.assert_delivered()
        wait_until(lambda: sender.stats().pairs == receiver.stats().pairs == 0, "the idle pair is gone")
    assert sender.stats().lost_peers == receiver.stats().lost_peers == 0


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ({"epoch": 2}, "this is decode/2, the ticket was for decode/1: ask for a new ticket"),
        ({"secret": b"another"}, "holds another cluster secret"),
        ({"layout": replace(LAYOUT, block_size=16)}, "block_size is 16 here and 8 there"),
        ({"transport": "gloo"}, "transport is gloo here and loopback there"),
        ({"digest": "none"}, "digest is none here and auto there"),
    ],
)
def test_a_refused_pair_aborts_its_tickets_saying_why(make_node: Make, theirs: dict[str, object], message: str) -> None:
    """The ticket is sound, but another process listens where it points."""
    sender = make_node("prefill", Memory(LAYOUT))
    receiver = make_node("decode", Memory(LAYOUT))
    imposter = make_node("decode", Memory(LAYOUT), **theirs)
    delivery = offer(receiver, 8, [0])
    address = imposter.grant(replace(delivery.grant, block_ids=(0,))).control_addresses
    delivery = replace(delivery, ticket=replace(delivery.ticket, control_addresses=address))
    send_all(sender, delivery, [0])
    result = delivery.at_sender()
    assert result.state is TicketState.ABORTED
    assert message in result.reason
    wait_until(lambda: sender.stats().pairs == 0, "the refused pair is gone")
    again = offer(receiver, 8, [1])
    send_all(sender, again, [0])
    again.assert_delivered()


def test_a_ticket_of_another_layout_is_refused_without_dialling(make_node: Make) -> None:
    sender = make_node("prefill", Memory(LAYOUT))
    receiver = make_node("decode", Memory(LAYOUT), layout=replace(LAYOUT, head_dim=8, dtype="float16"))
    delivery = offer(receiver, 8, [0])
    send_all(sender, delivery, [0])
    result = delivery.at_sender()
    assert result.state is TicketState.ABORTED
    assert "head_dim is 4 here and 8 there; dtype is float32 here and float16 there" in result.reason
    assert sender.stats().pairs == 0


def test_nobody_at_the_address_is_lost(make_node: Make) -> None:
    sender = make_node("prefill", Memory(LAYOUT))
    receiver = make_node("decode", Memory(LAYOUT))
    delivery = offer(receiver, 8, [0])
    receiver.stop()
    assert delivery.at_receiver()[0] is TicketState.ABORTED  # type: ignore[index]
    send_all(sender, delivery, [0])
    result = delivery.at_sender()
    assert result.state is TicketState.LOST
    assert "nobody answers" in result.reason


def test_a_pair_that_fails_at_once_takes_its_first_ticket_along(
    make_node: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = SenderPair.start

    def start(pair: SenderPair) -> None:
        begin(pair)
        wait_until(lambda: pair.info.state == "closed", "the dialling has failed")

    monkeypatch.setattr(SenderPair, "start", start)
    sender = make_node("prefill", Memory(LAYOUT))
    receiver = make_node("decode", Memory(LAYOUT))
    delivery = offer(receiver, 8, [0])
    receiver.stop()
    send_all(sender, delivery, [0])
    assert delivery.at_sender().state is TicketState.LOST
    delivery.at_receiver()


def test_a_ticket_can_be_given_up_while_the_pair_is_being_made(make_node: Make) -> None:
    sender = make_node("prefill", Memory(LAYOUT), connect_timeout_s=1.0)
    receiver = make_node("decode", Memory(LAYOUT))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        delivery = offer(receiver, 8, [0])
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        job = sender.open_send(replace(delivery.ticket, control_addresses=(address,)), delivery.sent.put)
        job.push(0, 3, 0, slots([0], 0, 8))
        start = time.monotonic()
        job.abort("client left")
        assert delivery.at_sender().reason == "client left"
        assert time.monotonic() - start < 0.8, "it does not wait for the handshake"
        waiting = sender.open_send(
            replace(delivery.ticket, control_addresses=(address,), ticket_id="x"), delivery.sent.put
        )
        result = delivery.at_sender()
        assert result.state is TicketState.LOST
        assert "did not send its challenge" in result.reason
        assert waiting.settled


@pytest.mark.parametrize(("expected_gb_s", "is_slow"), [(1e-6, False), (1e6, True)])
def test_workers_meet_ahead_of_any_ticket_and_a_slow_pair_is_named(
    make_node: Make, expected_gb_s: float, is_slow: bool
) -> None:
    sender = make_node("p", Memory(LAYOUT, seed=1), expected_gb_s=expected_gb_s)
    receiver = make_node("d", Memory(LAYOUT))
    for _ in range(2):
        sender.meet("d", 1, receiver.addresses, LAYOUT)
    wait_until(lambda: [info.state for info in sender.pair_infos()] == ["ready"], "the pair is ready")
    (info,) = sender.pair_infos()
    assert (info.peer, info.direction, info.is_slow) == ("d/1", "to", is_slow)
    assert info.to_proto().is_slow is is_slow
    assert sender.stats().slow_pairs == int(is_slow)


class Event:
    """An event of a GPU that a test lets come."""

    def __init__(self) -> None:
        self.come = threading.Event()

    def query(self) -> bool:
        return self.come.is_set()


def follow(lane: CpuLane, event: Event | None) -> None:
    """As the data thread waits on a GPU for a gather behind an event."""
    assert event is None or event.come.wait(BOUND_S)


def test_a_prompt_that_is_being_computed_holds_up_no_other(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written leaves, also the first token, while the next prompt's KV is awaited on the same pair."""
    monkeypatch.setattr(CpuLane, "follow", follow)
    done, under_way = offer(two.receiver, 16, [0, 1]), offer(two.receiver, 16, [2, 3])
    later, sooner = Event(), Event()
    first = two.sender.open_send(done.ticket, done.sent.put)
    for layer in range(3):
        first.push(layer, 1, 0, slots([4, 5], 0, 16), sooner)
    second = two.sender.open_send(under_way.ticket, under_way.sent.put)
    for layer in range(3):
        second.push(layer, 1, 0, slots([6, 7], 0, 16), later)
    sooner.come.set()
    wait_until(lambda: two.receiver.stats().received_pieces == 1, "the first prompt's KV came")
    first.finish(first_token_of(done))
    done.assert_delivered()
    assert two.receiver.stats().received_pieces == 1, "three layers of one step are one piece"
    second.finish(first_token_of(under_way))
    assert under_way.sent.empty()
    later.come.set()
    under_way.assert_delivered()
    two.assert_same([6, 7], [2, 3], 0, 16)
