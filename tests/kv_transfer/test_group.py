"""Rank 0's book of tickets that have a part on each rank, and the orders and reports behind it."""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from kv_transfer.config import TransferConfig
from kv_transfer.errors import TicketError, TransferError
from kv_transfer.group import TransferGroup
from kv_transfer.node import TransferNode
from kv_transfer.ticket import KVTicket, ReceivedKV, SendResult, TicketGrant, TicketState
from protos.transfer_pb2 import NodeStarted, RankOrder, RankReport, RankTicketEnded
from tests.kv_transfer.conftest import BOUND_S, FIRST, LAYOUT, SECRET, TICKET, Make, Memory
from tests.kv_transfer.test_sender import wait_until

HALF = replace(LAYOUT, tp_size=2)


@dataclass
class Group:
    """A group of two ranks whose other rank is the test."""

    node: TransferNode
    orders: list[RankOrder] = field(default_factory=list)
    ends: queue.SimpleQueue[Any] = field(default_factory=queue.SimpleQueue)
    sent: queue.SimpleQueue[SendResult] = field(default_factory=queue.SimpleQueue)

    def __post_init__(self) -> None:
        self.group = TransferGroup(self.node, 2, lambda payload: self.orders.append(RankOrder.FromString(payload)))

    @property
    def kinds(self) -> list[str | None]:
        return [order.WhichOneof("order") for order in self.orders]

    def hear(self, **report: Any) -> None:
        self.group.hear(1, RankReport(**report).SerializeToString())

    def grant(self, name: str = "t") -> KVTicket:
        return self.group.grant(
            TicketGrant(
                ticket_id=name,
                request_id="r",
                attempt=1,
                owner="router",
                block_ids=(1,),
                first_token=0,
                num_tokens=8,
                on_ready=self.ends.put,
                on_end=lambda state, reason: self.ends.put((state, reason)),
            )
        )


@pytest.fixture
def make_group(make_node: Make) -> Callable[..., Group]:
    def make(**overrides: object) -> Group:
        group = Group(make_node("w", Memory(HALF), layout=HALF, **overrides))
        group.group._addresses = {0: group.node.addresses[0], 1: "127.0.0.1:1"}
        return group

    return make


def test_a_part_that_ends_at_once_is_aborted_at_the_others_behind_their_opening(
    make_group: Callable[..., Group], monkeypatch: pytest.MonkeyPatch
) -> None:
    group = make_group()
    wrong = replace(TICKET, layout=replace(HALF, head_dim=8), control_addresses=("127.0.0.1:1",) * 2)
    opened = TransferNode.open_send

    def slowly(node: TransferNode, ticket: KVTicket, on_settled: Callable[[SendResult], None]) -> object:
        told = threading.Event()

        def settled(result: SendResult) -> None:
            on_settled(result)
            told.set()

        outlet = opened(node, ticket, settled)
        assert told.wait(BOUND_S)
        return outlet

    monkeypatch.setattr(TransferNode, "open_send", slowly)
    group.group.open_send(wrong, group.sent.put)
    assert group.kinds == ["open_send", "abort_send"]
    group.hear(send_settled=RankTicketEnded(ticket_id="t", state="ABORTED", reason="as told"))
    assert group.sent.get(timeout=BOUND_S).state is TicketState.ABORTED


def test_another_ranks_failure_ends_the_own_part_even_before_it_is_there(
    make_group: Callable[..., Group], monkeypatch: pytest.MonkeyPatch
) -> None:
    group = make_group()
    opened = TransferNode.open_send

    def late(node: TransferNode, ticket: KVTicket, on_settled: Callable[[SendResult], None]) -> object:
        group.hear(send_settled=RankTicketEnded(ticket_id="t", state="LOST", reason="no answer"))
        return opened(node, ticket, on_settled)

    monkeypatch.setattr(TransferNode, "open_send", late)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        addresses = (f"127.0.0.1:{silent.getsockname()[1]}",) * 2
        outlet = group.group.open_send(replace(TICKET, layout=HALF, control_addresses=addresses), group.sent.put)
        assert outlet.local.settled  # type: ignore[attr-defined]
        assert group.sent.get(timeout=BOUND_S) == SendResult("t", TicketState.LOST, "rank 1: no answer")


def test_a_name_in_use_harms_its_first_owner_not(make_group: Callable[..., Group]) -> None:
    group = make_group()
    ticket = replace(TICKET, layout=HALF, control_addresses=("127.0.0.1:1",) * 2)
    group.group.open_send(ticket, group.sent.put).abort("over")
    with pytest.raises(TicketError):
        group.group.open_send(ticket, group.sent.put)
    group.hear(send_settled=RankTicketEnded(ticket_id="t", state="ABORTED"))
    assert group.sent.get(timeout=BOUND_S).state in (TicketState.ABORTED, TicketState.LOST)  # nobody listens there
    group.grant("g")
    with pytest.raises(TicketError):
        group.grant("g")
    group.group.abort("g", "over")
    group.hear(ticket_ended=RankTicketEnded(ticket_id="g", state="ABORTED"))
    assert group.ends.get(timeout=BOUND_S) == (TicketState.ABORTED, "over")


def test_parts_that_never_follow_rank_0s_expire(make_group: Callable[..., Group]) -> None:
    group = make_group(ticket_lease_s=0.2)
    group.grant()
    ready = group.node._context.ledger._open["t"].grant.on_ready
    ready(ReceivedKV("t", FIRST, 0.0, 0, 0.0))
    wait_until(lambda: "end" in group.kinds, "the lease was over")
    assert group.kinds == ["grant", "end"]
    assert group.ends.empty(), "rank 1 may write until it says that it does not"
    group.hear(ticket_ended=RankTicketEnded(ticket_id="t", state="ABORTED"))
    state, reason = group.ends.get(timeout=BOUND_S)
    assert state is TicketState.EXPIRED
    assert "ranks [1] did not come within 0.2 s" in reason


def test_a_group_that_cannot_start_leaves_nothing_started(config: TransferConfig) -> None:
    node = TransferNode(worker_id="w", epoch=1, layout=HALF, memory=Memory(HALF), config=config, secret=SECRET)
    group = Group(node)
    group.hear(started=NodeStarted(error="no such address", epoch=1))
    with pytest.raises(TransferError, match="rank 1: no such address"):
        group.group.start()
    assert group.kinds == ["start", "stop"]
    assert not node._peers._accepting.is_alive()


def test_the_late_answer_to_an_earlier_start_is_no_address(config: TransferConfig) -> None:
    node = TransferNode(worker_id="w", epoch=2, layout=HALF, memory=Memory(HALF), config=config, secret=SECRET)
    group = Group(node)
    group.hear(started=NodeStarted(address="127.0.0.1:1", epoch=1))
    group.hear(started=NodeStarted(address="127.0.0.1:2", epoch=2))
    group.group.start()
    assert group.group.addresses[1] == "127.0.0.1:2"
    group.hear(started=NodeStarted(address="127.0.0.1:1", epoch=1))
    assert group.group.addresses[1] == "127.0.0.1:2"
    group.group.stop()
