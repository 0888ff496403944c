"""Two processes over gloo, one of which is killed or stopped. Bounds are five times the contract's."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator

import pytest

from kv_transfer.node import TransferNode
from kv_transfer.ticket import KVTicket, TicketState
from protos import worker_pb2
from tests.kv_transfer.child import Child
from tests.kv_transfer.conftest import LAYOUT, Delivery, Make, Memory, first_token_of, offer, send_all, slots
from tests.kv_transfer.test_sender import wait_until

PEER_TIMEOUT_S = 1.0
LOST_WITHIN_S = 5 * 2.0
CONFIG = {"transport": "gloo", "heartbeat_s": 0.2, "peer_timeout_s": PEER_TIMEOUT_S, "connect_timeout_s": 10.0}
MakeChild = Callable[[str], Child]


@pytest.fixture
def make_child() -> Iterator[MakeChild]:
    children: list[Child] = []

    def make(worker_id: str) -> Child:
        children.append(Child(worker_id, **CONFIG))
        return children[-1]

    yield make
    for child in children:
        child.close()


@pytest.fixture(scope="module")
def bystander() -> Iterator[Child]:
    """A node that nobody kills."""
    child = Child("bystander", **CONFIG)
    yield child
    child.close()


def ticket_of(child: Child, num_tokens: int, blocks: list[int]) -> KVTicket:
    answer = child.ask(grant=num_tokens, blocks=blocks)
    return KVTicket.from_proto(worker_pb2.KVTicket.FromString(bytes.fromhex(answer["ticket"])))


def have_sent(child: Child, delivery: Delivery, tokens: int, *, finish: bool) -> None:
    data = delivery.ticket.to_proto().SerializeToString().hex()
    child.ask(send=data, blocks=[0, 1, 2], tokens=tokens, finish=finish)


def assert_still_sends(sender: TransferNode, child: Child, memory: Memory) -> None:
    """The survivor serves a new receiver as if nothing had been."""
    ticket = ticket_of(child, 24, [4, 5, 6])
    delivery = Delivery(None, ticket, None)  # type: ignore[arg-type]
    send_all(sender, delivery, [0, 1, 2])
    assert delivery.at_sender().state is TicketState.DELIVERED
    while (event := child.event())["event"] != "ready":
        pass
    assert event == {"event": "ready", "id": ticket.ticket_id, "num_bytes": 24 * 3 * 64}
    expected = memory.kv[:, :, slots([0, 1, 2], 0, 24)].double().sum().item()
    assert child.ask(sum=slots([4, 5, 6], 0, 24).tolist())["sum"] == pytest.approx(expected)
    sender.check_integrity(idle=True)


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
def test_a_receiver_that_dies_or_stops_loses_its_jobs_and_nothing_else(
    make_node: Make, make_child: MakeChild, bystander: Child, blow: signal.Signals
) -> None:
    memory = Memory(LAYOUT, seed=1)
    sender = make_node(f"prefill-{blow.name}", memory, **CONFIG)
    child = make_child("decode-1")
    delivery = Delivery(None, ticket_of(child, 24, [4, 5, 6]), None)  # type: ignore[arg-type]
    job = sender.open_send(delivery.ticket, delivery.sent.put)
    job.push(0, 1, 0, slots([0, 1, 2], 0, 24))
    wait_until(lambda: child.ask()["received_pieces"] == 1, "the first layer came")
    os.kill(child.process.pid, blow)
    start = time.monotonic()
    job.push(1, 2, 0, slots([0, 1, 2], 0, 24))
    job.finish(first_token_of(delivery))
    result = delivery.at_sender()
    assert time.monotonic() - start < LOST_WITHIN_S
    assert result.state is TicketState.LOST
    assert sender.stats().lost_peers == 1
    wait_until(lambda: sender.stats().pairs == 0, "the pair is gone")
    assert_still_sends(sender, bystander, memory)


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
def test_a_sender_that_dies_or_stops_loses_its_tickets_and_nothing_else(
    make_node: Make, make_child: MakeChild, bystander: Child, blow: signal.Signals
) -> None:
    memory = Memory(LAYOUT)
    receiver = make_node("decode", memory, **CONFIG)
    children = [make_child("prefill-1"), bystander]
    lost, kept = offer(receiver, 24, [0, 1, 2]), offer(receiver, 24, [3, 4, 5])
    have_sent(children[0], lost, 16, finish=False)
    have_sent(children[1], kept, 16, finish=False)
    wait_until(lambda: receiver.stats().received_bytes == 2 * 16 * 3 * 64, "both have begun")
    os.kill(children[0].process.pid, blow)
    start = time.monotonic()
    end = lost.at_receiver()
    assert time.monotonic() - start < LOST_WITHIN_S
    assert isinstance(end, tuple)
    assert end[0] is TicketState.ABORTED
    assert "peer prefill-1/1 lost" in end[1]
    wait_until(lambda: receiver.stats().pairs == 1, "the lost pair is gone")
    assert kept.received.empty(), "the other pair goes on"
    again = offer(receiver, 24, [0, 1, 2])
    have_sent(children[1], again, 24, finish=True)
    again.at_receiver()
    receiver.abort(kept.ticket.ticket_id, "enough")
    assert kept.at_receiver() == (TicketState.ABORTED, "enough")
    receiver.check_integrity(idle=True)


def test_a_sender_stopped_for_long_comes_back_to_a_pair_that_is_gone(make_node: Make, make_child: MakeChild) -> None:
    """What it sends late reaches no block, and once it knows of the loss its next ticket makes the pair anew."""
    memory = Memory(LAYOUT)
    receiver = make_node("decode", memory, **CONFIG)
    child = make_child("prefill-1")
    lost = offer(receiver, 24, [0, 1, 2])
    have_sent(child, lost, 16, finish=False)
    wait_until(lambda: receiver.stats().received_bytes == 16 * 3 * 64, "it has begun")
    os.kill(child.process.pid, signal.SIGSTOP)
    assert isinstance(lost.at_receiver(), tuple)
    memory.kv.zero_()
    os.kill(child.process.pid, signal.SIGCONT)
    settled = child.event()
    assert settled["id"] == lost.ticket.ticket_id
    assert settled["state"] in ("LOST", "ABORTED")
    assert not memory.kv.any()
    wait_until(lambda: child.ask()["pairs"] == 0, "the sender knows that the pair is gone")
    again = offer(receiver, 24, [0, 1, 2])
    have_sent(child, again, 24, finish=True)
    assert not isinstance(again.at_receiver(), tuple)
    assert child.event()["state"] == "DELIVERED"
    assert receiver.stats().lost_peers == 1


def test_a_kill_in_the_middle_of_many_tickets(make_node: Make, make_child: MakeChild) -> None:
    """Tickets before the kill may have come through; each of the others is lost, none hangs."""
    sender = make_node("prefill", Memory(LAYOUT, seed=1), **CONFIG)
    child = make_child("decode-1")
    deliveries = [
        Delivery(None, ticket_of(child, 24, [3 * n, 3 * n + 1, 3 * n + 2]), None)  # type: ignore[arg-type]
        for n in range(10)
    ]
    for n, delivery in enumerate(deliveries):
        send_all(sender, delivery, [0, 1, 2], chunks=[5, 19])
        if n == 5:
            child.process.kill()
    start = time.monotonic()
    states = [delivery.at_sender().state for delivery in deliveries]
    assert time.monotonic() - start < LOST_WITHIN_S
    assert set(states) <= {TicketState.DELIVERED, TicketState.LOST}
    assert states[-1] is TicketState.LOST
    sender.check_integrity(idle=True)
