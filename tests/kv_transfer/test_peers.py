"""Strangers, slow ones too, cost other pairs nothing; a newer pair replaces an older one."""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from kv_transfer.config import TransferConfig
from kv_transfer.control import ControlConnection, dial
from kv_transfer.errors import PairRefusedError
from kv_transfer.handshake import Handshake, Identity, Means
from kv_transfer.node import TransferNode
from kv_transfer.peers import MAX_STRANGERS
from kv_transfer.ticket import TicketState
from tests.kv_transfer.conftest import BOUND_S, LAYOUT, SECRET, Make, Memory, offer, send_all, slots
from tests.kv_transfer.test_sender import wait_until


def address_of(node: TransferNode) -> str:
    return node._address


@pytest.fixture
def receiver(make_node: Make) -> TransferNode:
    return make_node("decode", Memory(LAYOUT), connect_timeout_s=1.0)


@pytest.fixture
def strangers() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_silent_strangers_hold_nobody_up(receiver: TransferNode, make_node: Make, strangers: ExitStack) -> None:
    for _ in range(MAX_STRANGERS - 1):
        strangers.enter_context(dial(address_of(receiver), timeout_s=2))
    sender = make_node("prefill", Memory(LAYOUT))
    delivery = offer(receiver, 8, [0])
    start = time.monotonic()
    send_all(sender, delivery, [0])
    delivery.assert_delivered()
    assert time.monotonic() - start < 0.9, "before the strangers' time is up"


def test_too_many_strangers_are_turned_away_until_some_have_gone(
    receiver: TransferNode, make_node: Make, strangers: ExitStack
) -> None:
    for _ in range(MAX_STRANGERS):
        strangers.enter_context(dial(address_of(receiver), timeout_s=2))
    one_more = strangers.enter_context(dial(address_of(receiver), timeout_s=BOUND_S))
    assert one_more.recv(1) == b"", "closed at once"
    wait_until(lambda: not receiver._peers._strangers, "the strangers' time is up")
    sender = make_node("prefill", Memory(LAYOUT))
    delivery = offer(receiver, 8, [0])
    send_all(sender, delivery, [0])
    delivery.assert_delivered()


def test_garbage_ends_only_its_own_connection(receiver: TransferNode, make_node: Make, strangers: ExitStack) -> None:
    noise = random.Random(7)
    for _ in range(20):
        stranger = strangers.enter_context(dial(address_of(receiver), timeout_s=2))
        data = noise.randbytes(noise.randint(1, 300))
        length = noise.choice([len(data), noise.getrandbits(32)])
        stranger.sendall(length.to_bytes(4, "big") + data)
    sender = make_node("prefill", Memory(LAYOUT))
    delivery = offer(receiver, 8, [0])
    send_all(sender, delivery, [0])
    delivery.assert_delivered()


def shake(receiver: TransferNode, sock: socket.socket, epoch: int, attempt: int) -> ControlConnection:
    """Become a pair as prefill/epoch, without a data channel."""
    control = ControlConnection(sock, peer="decode", send_timeout_s=2)
    means, config = Means("loopback", False, ""), TransferConfig(transport="loopback")
    handshake = Handshake(Identity("prefill", epoch), LAYOUT, config, means, SECRET)
    handshake.as_sender(control, Identity("decode", 1), attempt)
    return control


def test_an_older_life_or_attempt_is_refused(receiver: TransferNode, strangers: ExitStack) -> None:
    shake(receiver, strangers.enter_context(dial(address_of(receiver), timeout_s=2)), 5, 2)
    for epoch, attempt in ((4, 9), (5, 1), (5, 2)):
        sock = strangers.enter_context(dial(address_of(receiver), timeout_s=2))
        with pytest.raises(PairRefusedError, match="is older than attempt 2 of epoch 5"):
            shake(receiver, sock, epoch, attempt)
    assert receiver.stats().pairs == 1


def test_a_sender_that_started_anew_replaces_its_old_pair(receiver: TransferNode, make_node: Make) -> None:
    old, new = make_node("prefill", Memory(LAYOUT), epoch=1), make_node("prefill", Memory(LAYOUT), epoch=2)
    stuck = offer(receiver, 8, [0])
    old.open_send(stuck.ticket, stuck.sent.put).push(0, 1, 0, slots([0], 0, 8))
    wait_until(lambda: receiver.stats().received_pieces == 1, "the old pair is in use")
    delivery = offer(receiver, 8, [1])
    send_all(new, delivery, [0])
    delivery.assert_delivered()
    state, reason = stuck.at_receiver()  # type: ignore[misc]
    assert state is TicketState.ABORTED
    assert "replaced by attempt 1 of prefill/2" in reason
    assert stuck.at_sender().state in (TicketState.LOST, TicketState.ABORTED)
    wait_until(lambda: receiver.stats().pairs == 1, "the old pair is gone")
