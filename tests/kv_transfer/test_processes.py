"""One of two processes is killed or stopped in every state of a ticket; the other lives on and so do its pairs.

Who plays: `survivor` on the first GPU; on the second `bystander`, whose pair with the survivor goes on, `standby`, a
warm worker that takes the next ticket, and a victim. Bounds are five times the contract's (FAILURES.md 1, 2, 6, 8).
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from kv_transfer.ticket import TicketState
from tests.kv_transfer.cast import TRANSPORTS, Child, Delivery, Node, children, record, start
from tests.kv_transfer.child import LAYOUT

ENDED_WITHIN_S = 5 * 2.0
NEXT_WITHIN_S = 5 * 3.0
NUM_TOKENS = 48
SOURCE = [0, 1, 2]
QUICK = {"heartbeat_s": 0.2, "peer_timeout_s": 1.0}
"""Used where the suite must be short; a GPU's run measures with what users have."""
ENDS = (TicketState.ABORTED, TicketState.LOST, TicketState.DELIVERED)


@dataclass
class Cast:
    """The processes of this module, and the nodes that outlive a case."""

    transport: str
    survivor: Node
    bystander: Node
    standby: Child
    config: dict[str, object]
    victims: list[Child]
    """The first is the next victim, the others are starting."""
    epoch: int = 0
    before: dict[str, int] = field(default_factory=dict)

    def victim(self) -> Node:
        self.epoch += 1
        return start(self.victims[0], "victim", self.epoch, seed=3)

    def stand_in(self, name: str) -> Node:
        self.epoch += 1
        return start(self.standby, name, self.epoch, seed=4)

    def replace(self) -> None:
        """A victim is dead: let another process begin."""
        self.victims.pop(0).close()
        self.victims.append(Child(self.transport, 1, **self.config))

    def is_usual(self, census: dict[str, int]) -> bool:
        """Whether nothing has leaked; over all cases NCCL may keep a few things for good."""
        slack = 0 if self.transport == "gloo" else 4
        return all(census[key] <= self.before[key] + slack for key in census)

    def settle(self) -> dict[str, int]:
        """What the survivor uses once it has only its pairs with the bystander."""
        self.survivor.await_pairs(2)
        deadline = time.monotonic() + 10
        while True:
            census: dict[str, int] = self.survivor.child.ask("census")
            usual = {key: census[key] for key in ("threads", "fds")}
            if not self.before or self.is_usual(usual) or time.monotonic() > deadline:
                return usual
            threading.Event().wait(0.05)


@pytest.fixture(scope="module", params=TRANSPORTS)
def cast(request: pytest.FixtureRequest) -> Iterator[Cast]:
    config: dict[str, object] = dict(QUICK) if request.param == "gloo" else {}
    with children(request.param, [0, 1, 1], **config) as (one, two, three):
        survivor, bystander = start(one, "survivor", seed=1), start(two, "bystander", seed=2)
        victims = [Child(request.param, 1, **config) for _ in range(2)]
        made = Cast(request.param, survivor, bystander, three, config, victims)
        for sender, receiver in ((survivor, bystander), (bystander, survivor)):
            deliver(sender, receiver, 20)
        for _ in range(2):  # what first pairs allocate for good
            stand_in = made.stand_in("standby")
            deliver(survivor, stand_in, 24)
            deliver(stand_in, survivor, 24)
            stand_in.stop()
        made.before = made.settle()
        yield made
        for child in made.victims:
            child.close()


@pytest.fixture(autouse=True)
def _curtain(cast: Cast) -> Iterator[None]:
    """A case that fails leaves nobody stopped, held or slow for the next."""
    yield
    victim = cast.victims[0]
    if victim.is_alive:
        victim.strike(signal.SIGCONT)
        victim.ask("release")
    cast.survivor.child.ask("slow", name="survivor", delay_s=0.0)


def open_ticket(sender: Node, receiver: Node, block: int) -> Delivery:
    return Delivery.open(sender, receiver, range(block, block + 3), NUM_TOKENS, SOURCE)


def deliver(sender: Node, receiver: Node, block: int) -> float:
    delivery = open_ticket(sender, receiver, block)
    delivery.send_all()
    return delivery.assert_delivered()


# -- where a ticket is when the blow comes


def connecting(victim: Child, sender: Node, receiver: Node) -> Delivery:
    """RESERVED, and the pair is being made."""
    victim.ask("hold", where="connect", transport=victim.transport)
    delivery = open_ticket(sender, receiver, 8)
    assert victim.ask("await_hold")
    return delivery


def reserved(victim: Child, sender: Node, receiver: Node) -> Delivery:
    """RESERVED, and the pair is ready."""
    sender.meet(receiver)
    for node, peer in ((sender, receiver), (receiver, sender)):
        node.await_pair(peer)
    return open_ticket(sender, receiver, 8)


def receiving(victim: Child, sender: Node, receiver: Node) -> Delivery:
    """RECEIVING, with one end in the middle of a transfer that the other does not take part in."""
    delivery = reserved(victim, sender, receiver)
    before = receiver.stats().received_pieces
    delivery.push(range(1))
    receiver.child.wait_for(receiver.name, lambda stats: stats.received_pieces > before, "a piece is home")
    where = "send" if victim is sender.child else "recv"
    victim.ask("hold", where=where, transport=victim.transport)
    delivery.push(range(1, 3))
    assert victim.ask("await_hold")
    return delivery


def complete(victim: Child, sender: Node, receiver: Node) -> Delivery:
    """Everything has been sent, and the sender has heard nothing yet."""
    delivery = reserved(victim, sender, receiver)
    if victim is receiver.child:
        victim.ask("hold", where="complete", transport=victim.transport)
    else:
        receiver.child.ask("slow", name=receiver.name, delay_s=0.4, blocks=range(8, 11))
    before = sender.stats().sent_pieces
    delivery.send_all()
    if victim is receiver.child:
        assert victim.ask("await_hold")
    else:
        victim.wait_for(sender.name, lambda stats: stats.sent_pieces > before, "a piece has left")
    return delivery


Stage = Callable[[Child, Node, Node], Delivery]


def end_at_survivor(cast: Cast, lost: Delivery, role: str, stage: Stage) -> float:
    """Wait until the ticket has ended for the survivor; when it did."""
    if role == "sender":  # the victim
        if stage in (connecting, reserved):  # no KV has come, so nobody but the owner can know that none will
            assert cast.survivor.child.ask("abort", name="survivor", ticket_id=lost.name)
        event = lost.at_receiver()
    else:
        event = lost.at_sender()
        assert event.state in (TicketState.LOST, TicketState.ABORTED), event
    assert event.state in ENDS, event
    return event.at


def ends_of(cast: Cast, victim: Node, role: str) -> tuple[Node, Node]:
    """Sender and receiver, where the victim plays this role."""
    return (victim, cast.survivor) if role == "sender" else (cast.survivor, victim)


@pytest.mark.parametrize("stage", [connecting, reserved, receiving, complete], ids=lambda stage: stage.__name__)
@pytest.mark.parametrize("role", ["receiver", "sender"])
@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP], ids=lambda blow: blow.name)
def test_a_peer_that_dies_or_stops(cast: Cast, blow: signal.Signals, role: str, stage: Stage) -> None:
    # 1. A ticket with the victim, and one with the bystander that is half sent.
    survivor, victim = cast.survivor, cast.victim()
    kept = open_ticket(*ends_of(cast, cast.bystander, role), 30)
    kept.push(range(2))
    lost = stage(victim.child, *ends_of(cast, victim, role))

    # 2. The blow. The bystander's ticket goes on at once; the victim's ends.
    struck_at = victim.child.strike(blow)
    kept.push(range(2, LAYOUT.num_layers))
    kept.finish()
    kept.assert_delivered()
    kept_s = time.monotonic() - struck_at
    ended_s = end_at_survivor(cast, lost, role, stage) - struck_at
    assert ended_s < ENDED_WITHIN_S
    assert survivor.child.is_alive

    # 3. The next ticket, with a new peer.
    stand_in = cast.stand_in("standby")
    next_s = deliver(*ends_of(cast, stand_in, role), 12)
    assert next_s < NEXT_WITHIN_S
    survivor.child.wait_for(
        "survivor",
        lambda infos: not any(info.peer == f"victim/{victim.epoch}" for info in infos),
        "the lost pair is gone",
        "pair_infos",
    )
    pair_gone_s = time.monotonic() - struck_at

    # 4. Who was stopped comes back, hears that its ticket is over, and serves in a new life under its name.
    if blow is signal.SIGSTOP:
        come_back(cast, victim, lost, role)
    else:
        cast.replace()

    # 5. Nothing is left behind.
    stand_in.stop()
    lost.assert_told_once(survivor)
    assert_nothing_left(cast)
    case = f"{blow.name} {role} {stage.__name__}"
    times = {"ended_s": ended_s, "other_pair_s": kept_s, "next_s": next_s, "pair_gone_s": pair_gone_s}
    record(case, cast.transport, **times)


def assert_nothing_left(cast: Cast) -> None:
    after, survivor = cast.settle(), cast.survivor
    survivor.child.ask("check_integrity", name="survivor")
    stats = survivor.stats()
    assert (stats.pairs, stats.open_tickets, stats.open_sends) == (2, 0, 0)
    assert cast.is_usual(after), (after, cast.before)


def come_back(cast: Cast, victim: Node, lost: Delivery, role: str) -> None:
    blocks = list(lost.ticket.block_ids)
    before = cast.survivor.child.ask("print_of", name="survivor", blocks=blocks)
    victim.child.strike(signal.SIGCONT)
    victim.child.ask("release")
    if role == "receiver":
        victim.child.ask("abort", name="victim", ticket_id=lost.name)
    event = lost.at_receiver() if role == "receiver" else lost.at_sender()
    assert event.state in ENDS, event
    lost.assert_told_once(victim)
    again = cast.victim()
    deliver(*ends_of(cast, again, role), 16)
    again.stop()
    assert cast.survivor.child.ask("print_of", name="survivor", blocks=blocks) == before, "nothing is written late"


def test_a_ticket_for_a_peer_that_stands_still(cast: Cast) -> None:
    """Its kernel takes the connection, and nobody answers."""
    victim = cast.victim()
    delivery = Delivery.grant(cast.survivor, victim, range(8, 11), NUM_TOKENS, SOURCE)
    struck_at = victim.child.strike(signal.SIGSTOP)
    delivery.begin()
    delivery.send_all()
    deliver(cast.survivor, cast.bystander, 24)
    event = delivery.at_sender()
    assert event.state is TicketState.LOST
    assert event.at - struck_at < ENDED_WITHIN_S
    record("SIGSTOP receiver before the pair", cast.transport, ended_s=event.at - struck_at)
    come_back(cast, victim, delivery, "receiver")
    assert_nothing_left(cast)


def test_a_kill_in_the_middle_of_many_tickets(cast: Cast) -> None:
    """Tickets before the kill may have come through; each of the others is lost, none hangs."""
    victim = cast.victim()
    cast.survivor.meet(victim)
    for node, peer in ((cast.survivor, victim), (victim, cast.survivor)):
        node.await_pair(peer)
    deliveries = [open_ticket(cast.survivor, victim, 3 * n) for n in range(10)]
    for n, delivery in enumerate(deliveries):
        delivery.send_all()
        if n == 5:
            struck_at = victim.child.strike(signal.SIGKILL)
    events = [delivery.at_sender() for delivery in deliveries]
    assert max(event.at for event in events) - struck_at < ENDED_WITHIN_S
    states = [event.state for event in events]
    assert set(states) <= {TicketState.DELIVERED, TicketState.LOST}
    assert states[-1] is TicketState.LOST
    cast.replace()
    assert_nothing_left(cast)
