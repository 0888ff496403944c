"""What may be written, what is dropped, and what happens to a ticket whose KV goes wrong on the way."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from kv_transfer import receiver as receiver_module
from kv_transfer.digest import Digester
from kv_transfer.errors import PeerLostError
from kv_transfer.gloo import GlooTransport
from kv_transfer.jobs import SendJob
from kv_transfer.loopback import LoopbackTransport
from kv_transfer.self_test import SMALL_BYTES, Measured, SelfTest
from kv_transfer.ticket import ReceivedKV, TicketState
from protos.transfer_pb2 import ControlMessage, PieceAnnounced, Probe
from tests.kv_transfer.conftest import (
    BOUND_S,
    LAYOUT,
    Delivery,
    Make,
    Memory,
    Two,
    first_token_of,
    offer,
    send_all,
    slots,
)
from tests.kv_transfer.test_digest import damaged
from tests.kv_transfer.test_sender import assert_usable, wait_until


def begin(two: Two, num_tokens: int = 24) -> tuple[Delivery, SendJob]:
    """A ticket of which one layer has been sent."""
    blocks = range(num_tokens // 8)
    delivery = offer(two.receiver, num_tokens, blocks)
    job = two.sender.open_send(delivery.ticket, delivery.sent.put)
    job.push(0, 1, 0, slots(blocks, 0, num_tokens))
    return delivery, job


def is_piece(data: torch.Tensor) -> bool:
    """Whether these bytes are KV, not a probe of the self-test."""
    return data.numel() < SMALL_BYTES


def flip_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on a bit of every piece is flipped on the way."""
    for transport in (GlooTransport, LoopbackTransport):
        honest = transport.send

        def flip(self: object, data: torch.Tensor, honest: object = honest) -> object:
            if is_piece(data):
                data[data.numel() // 2] ^= 0x10
            return honest(self, data)  # type: ignore[operator]

        monkeypatch.setattr(transport, "send", flip)


def test_a_late_piece_is_dropped_and_writes_nothing(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sender does not hear the verdict, goes on, and the blocks belong to another ticket by then."""
    delivery, job = begin(two)
    wait_until(lambda: two.receiver.stats().received_pieces == 1, "the first layer came")
    with monkeypatch.context() as deaf:
        deaf.setattr("kv_transfer.sender.SenderPair._settle", lambda *_: None)
        two.receiver.abort(delivery.ticket.ticket_id, "client left")
        assert delivery.at_receiver() == (TicketState.ABORTED, "client left")
        heir = offer(two.receiver, 24, delivery.ticket.block_ids)
        two.target.kv.zero_()
        job.push(1, 2, 0, slots([0, 1, 2], 0, 24))
        job.finish(first_token_of(delivery))
        wait_until(lambda: two.receiver.stats().dropped_pieces >= 1, "the late piece came")
        threading.Event().wait(0.05)
    assert not two.target.kv.any()
    job.abort("over")
    send_all(two.sender, heir, [4, 5, 6])
    heir.assert_delivered()
    two.assert_same([4, 5, 6], [0, 1, 2], 0, 24)


def test_an_abort_tells_the_owner_only_after_the_scatter_under_way(two: Two) -> None:
    two.target.scatter_gate.clear()
    delivery, _ = begin(two)
    assert two.target.scattering.wait(BOUND_S)
    assert two.receiver.abort(delivery.ticket.ticket_id, "client left")
    threading.Event().wait(0.1)
    assert delivery.received.empty()
    two.target.scatter_gate.set()
    assert delivery.at_receiver() == (TicketState.ABORTED, "client left")
    assert delivery.at_sender().state is TicketState.ABORTED
    assert_usable(two)


def test_a_damaged_piece_aborts_its_ticket_and_is_not_written(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    flip_bits(monkeypatch)
    delivery, _ = begin(two)
    assert delivery.at_receiver() == (TicketState.ABORTED, "digest mismatch")
    assert delivery.at_sender().reason == "digest mismatch"
    assert not two.target.kv.any()
    assert two.receiver.stats().digest_mismatches == 1
    monkeypatch.undo()
    assert_usable(two)


def test_a_digest_that_is_known_late_still_aborts_the_ticket(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where a piece and its digest are done together: it is written, and its ticket never delivered."""
    prompt = Digester.begin

    def late(digester: Digester, data: torch.Tensor) -> Callable[[], int]:
        digester.is_prompt = False
        return prompt(digester, data)

    monkeypatch.setattr(Digester, "begin", late)
    assert_usable(two)
    flip_bits(monkeypatch)
    delivery, job = begin(two)
    assert delivery.at_receiver() == (TicketState.ABORTED, "digest mismatch")
    assert delivery.at_sender().reason == "digest mismatch"
    delivery.assert_told_once()
    assert job.settled
    assert two.target.kv[0, :, :24].any()
    assert two.receiver.stats().digest_mismatches == 1
    monkeypatch.undo()
    assert_usable(two)


def test_swapped_pieces_are_caught(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pieces of one size whose bytes change places on the way."""
    held: list[torch.Tensor] = []
    for transport in (GlooTransport, LoopbackTransport):
        honest = transport.send

        def shuffle(self: object, data: torch.Tensor, honest: object = honest) -> object:
            if not is_piece(data):
                return honest(self, data)  # type: ignore[operator]
            other = torch.zeros_like(data) if not held else held[0]
            held.append(data.clone())
            return honest(self, other)  # type: ignore[operator]

        monkeypatch.setattr(transport, "send", shuffle)
    first, second = offer(two.receiver, 8, [0]), offer(two.receiver, 8, [1])
    for delivery, block in ((first, 0), (second, 1)):
        job = two.sender.open_send(delivery.ticket, delivery.sent.put)
        job.push(0, 3, 0, slots([block], 0, 8))
        assert delivery.at_receiver() == (TicketState.ABORTED, "digest mismatch")
    assert not two.target.kv.any()


@pytest.mark.parametrize("kind", ["bit flip", "truncated", "swapped pieces", "swapped runs"])
def test_damage_on_the_way_never_reaches_a_delivered_ticket(
    make_node: Make, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """End to end what test_digest counts: every other piece is damaged while many tickets are sent."""
    draw, honest, sent = random.Random(3), LoopbackTransport.send, [np.zeros(1 << 20, dtype=np.uint8)]

    def faulty(self: LoopbackTransport, data: torch.Tensor) -> object:
        if not is_piece(data):
            return honest(self, data)
        true = data.numpy().copy()
        other, sent[0] = sent[0][: len(true)], true
        wrong = damaged(true, other, kind, draw) if len(other) == len(true) and draw.random() < 0.5 else true
        num_damaged.extend([1] * (not np.array_equal(wrong, true)))
        return honest(self, torch.from_numpy(wrong))

    num_damaged: list[int] = []
    monkeypatch.setattr(LoopbackTransport, "send", faulty)
    source, target = Memory(LAYOUT, seed=1), Memory(LAYOUT)
    sender, receiver = make_node("prefill", source, digest="all"), make_node("decode", target, digest="all")
    num_delivered = 0
    for n in range(40):
        delivery = offer(receiver, 24, [3 * (n % 20), 3 * (n % 20) + 1, 3 * (n % 20) + 2])
        before = len(num_damaged)
        job = sender.open_send(delivery.ticket, delivery.sent.put)
        job.push(0, LAYOUT.num_layers, 0, slots([n, n + 1, n + 2], 0, 24))  # one piece: none is left after the verdict
        job.finish(first_token_of(delivery))
        end, result = delivery.at_receiver(), delivery.at_sender()
        if len(num_damaged) > before:
            assert end == (TicketState.ABORTED, "digest mismatch")
            assert result.state is TicketState.ABORTED
        else:
            assert isinstance(end, ReceivedKV), end
            num_delivered += 1
            Two(sender, receiver, source, target).assert_same([n, n + 1, n + 2], delivery.ticket.block_ids, 0, 24)
    assert num_delivered > 3
    assert receiver.stats().digest_mismatches >= 10


def test_without_digests_damage_is_not_seen(make_node: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    flip_bits(monkeypatch)
    sender = make_node("prefill", Memory(LAYOUT, seed=1), digest="none")
    receiver = make_node("decode", Memory(LAYOUT), digest="none")
    delivery = offer(receiver, 8, [0])
    send_all(sender, delivery, [0])
    delivery.assert_delivered()
    assert receiver.stats().digest_mismatches == 0


def test_a_scatter_that_fails_ends_its_ticket_alone(two: Two) -> None:
    """Block 64 is beyond the memory."""
    delivery = offer(two.receiver, 8, [64])
    send_all(two.sender, delivery, [0])
    state, reason = delivery.at_receiver()  # type: ignore[misc]
    assert state is TicketState.ABORTED
    assert "writing KV failed: IndexError" in reason
    assert delivery.at_sender().state is TicketState.ABORTED
    assert_usable(two)


def test_a_ticket_whose_first_piece_never_came_ends_with_the_pair(
    make_node: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Announced and not sent: nobody has begun to write, and its lease would last half a minute."""
    honest, announced, gate = LoopbackTransport.send, threading.Event(), threading.Event()

    def hold(self: LoopbackTransport, data: torch.Tensor) -> object:
        if is_piece(data):
            announced.set()
            gate.wait(BOUND_S)
        return honest(self, data)

    monkeypatch.setattr(LoopbackTransport, "send", hold)
    sender, receiver = make_node("prefill", Memory(LAYOUT)), make_node("decode", Memory(LAYOUT))
    delivery = offer(receiver, 8, [0])
    sender.open_send(delivery.ticket, delivery.sent.put).push(0, 1, 0, slots([0], 0, 8))
    assert announced.wait(BOUND_S)
    (pair,) = receiver._peers._pairs.values()
    wait_until(lambda: bool(pair._begun), "the announcement came")
    threading.Timer(0.05, gate.set).start()
    next(iter(sender._alive)).close("the link broke")
    state, reason = delivery.at_receiver()  # type: ignore[misc]
    assert state is TicketState.ABORTED
    assert "peer prefill/1 lost" in reason
    assert receiver.stats().lost_peers == 1
    delivery.at_sender()


def test_kv_pushed_twice_aborts_the_ticket(two: Two) -> None:
    delivery, job = begin(two)
    job.push(0, 1, 8, slots([1], 0, 8))
    state, reason = delivery.at_receiver()  # type: ignore[misc]
    assert state is TicketState.ABORTED
    assert "came twice" in reason
    assert delivery.at_sender().reason == reason
    assert_usable(two)


def test_finishing_too_early_aborts_the_ticket(two: Two) -> None:
    delivery, job = begin(two)
    job.finish(first_token_of(delivery))
    state, reason = delivery.at_receiver()  # type: ignore[misc]
    assert state is TicketState.ABORTED
    assert "KV of 48 (layer, token) places never came" in reason
    assert delivery.at_sender().reason == reason
    assert_usable(two)


def test_an_expired_ticket_ends_on_both_sides(make_node: Make) -> None:
    sender = make_node("prefill", Memory(LAYOUT))
    receiver = make_node("decode", Memory(LAYOUT), ticket_lease_s=0.3)
    delivery = offer(receiver, 8, [0])
    job = sender.open_send(delivery.ticket, delivery.sent.put)
    job.push(0, 1, 0, slots([0], 0, 8))
    assert delivery.at_receiver()[0] is TicketState.EXPIRED  # type: ignore[index]
    assert delivery.at_sender().state is TicketState.EXPIRED
    receiver.check_integrity(idle=True)


def test_a_renewed_ticket_outlives_its_lease(make_node: Make) -> None:
    sender = make_node("prefill", Memory(LAYOUT))
    receiver = make_node("decode", Memory(LAYOUT), ticket_lease_s=0.5)
    delivery = offer(receiver, 8, [0], owner="router-1")
    for _ in range(15):
        threading.Event().wait(0.05)
        receiver.renew("router-1")
    send_all(sender, delivery, [0])
    delivery.assert_delivered()


@pytest.mark.usefixtures("small_sockets")
def test_a_slow_receiver_holds_the_sender_back_and_loses_nothing(make_node: Make) -> None:
    layout = replace(LAYOUT, num_kv_heads=8, head_dim=128)
    source, target = Memory(layout, seed=1), Memory(layout)
    sender = make_node("prefill", source, layout=layout, piece_mib=1, staging_mib=2)
    receiver = make_node("decode", target, layout=layout, piece_mib=1, staging_mib=2)
    target.scatter_gate.clear()
    delivery = offer(receiver, 512, range(64))
    job = send_all(sender, delivery, range(64))
    assert target.scattering.wait(BOUND_S)
    threading.Event().wait(0.3)
    assert source.num_gathers < 12, "staging bounds what is under way"
    assert not job.settled
    target.scatter_gate.set()
    delivery.assert_delivered()
    assert torch.equal(source.kv, target.kv)


def test_a_probe_behind_the_self_test_ends_the_pair(two: Two) -> None:
    """Its receive would be posted behind those of later pieces, and each would get the other's bytes."""
    delivery, _ = begin(two)
    wait_until(lambda: two.receiver.stats().received_pieces == 1, "the first layer came")
    (pair,) = two.sender._alive
    pair._say(ControlMessage(probe=Probe(num_bytes=SMALL_BYTES)))
    state, reason = delivery.at_receiver()  # type: ignore[misc]
    assert state is TicketState.ABORTED
    assert "a probe behind its self-test" in reason
    assert delivery.at_sender().state in (TicketState.LOST, TicketState.ABORTED)
    wait_until(lambda: two.sender.stats().pairs == 0, "the sender has noticed")
    again = offer(two.receiver, 24, [7, 8, 9])
    send_all(two.sender, again, [3, 1, 2])
    again.assert_delivered()


def test_a_piece_before_the_end_of_the_self_test_ends_the_pair(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as hasty:
        hasty.setattr(SelfTest, "run", lambda *_: Measured(1.0, 1e9))
        delivery, _ = begin(two)
        assert delivery.at_sender().state is TicketState.LOST
    assert two.receiver.stats().received_pieces == 0
    two.receiver.abort(delivery.ticket.ticket_id, "over")
    delivery.at_receiver()
    again = offer(two.receiver, 24, [7, 8, 9])
    send_all(two.sender, again, [3, 1, 2])
    again.assert_delivered()


def test_a_sender_that_announces_without_end_is_cut_off(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receiver_module, "MAX_WAITING", 3)
    delivery, _ = begin(two)
    wait_until(lambda: two.receiver.stats().received_pieces == 1, "the first layer came")
    (pair,) = two.sender._alive
    for number in range(2, 20):
        whole = PieceAnnounced(sequence_number=number, ticket_id=delivery.ticket.ticket_id, num_bytes=4 << 20)
        try:
            pair._say(ControlMessage(piece=whole))
        except PeerLostError:
            break  # it has hung up
    _, reason = delivery.at_receiver()  # type: ignore[misc]
    assert "announced 3 pieces more than it may have in flight" in reason
