"""Tickets between workers of unequal tensor parallelism: every head arrives, every rank hears one end."""

from __future__ import annotations

import pytest
import torch

from kv_transfer.ticket import ReceivedKV, TicketState
from tests.kv_transfer.conftest import LAYOUT, Make, slots
from tests.kv_transfer.ranks import Shared, Worker, make_worker, offer_shared, push, whole_kv
from tests.kv_transfer.test_sender import wait_until

SOURCE, TARGET = [1, 2, 3], [9, 4, 30]
NUM_TOKENS = 21


def shares(num_heads: int, size: int) -> bool:
    return num_heads % size == 0 or size % num_heads == 0


CASES = [
    (senders, receivers, num_heads)
    for senders, receivers in ((1, 1), (2, 1), (1, 2), (2, 2), (2, 4), (4, 2))
    for num_heads in (1, 2, 3, 4)
    if shares(num_heads, senders) and shares(num_heads, receivers)
]


def assert_home(receiver: Worker, kv: torch.Tensor) -> None:
    """Each rank of the receiver holds its heads of the sender's tokens, and nothing else."""
    there, here = slots(TARGET, 0, NUM_TOKENS), slots(SOURCE, 0, NUM_TOKENS)
    for layout, memory in zip(receiver.layouts, receiver.memories, strict=True):
        heads = range(layout.first_head, layout.first_head + layout.num_local_heads)
        assert torch.equal(memory.kv[:, :, there], kv[:, :, here][:, :, :, list(heads)])
        assert torch.count_nonzero(memory.kv) == torch.count_nonzero(memory.kv[:, :, there])


def assert_idle(*workers: Worker) -> None:
    for worker in workers:
        for node in worker.nodes:
            node.check_integrity(idle=True)


@pytest.mark.parametrize(("senders", "receivers", "num_heads"), CASES)
def test_every_head_of_every_token_arrives(make_node: Make, senders: int, receivers: int, num_heads: int) -> None:
    kv = whole_kv(num_heads, seed=7)
    sender = make_worker(make_node, "prefill", num_heads, senders, kv)
    receiver = make_worker(make_node, "decode", num_heads, receivers)
    shared = offer_shared(sender, receiver, NUM_TOKENS, TARGET)
    push(shared, SOURCE, 0, 10, finish=False)
    push(shared, SOURCE, 10, NUM_TOKENS, finish=True)
    ends = shared.at_receivers()
    assert all(isinstance(end, ReceivedKV) for end in ends), ends
    firsts = [end.first for end in ends if isinstance(end, ReceivedKV)]
    assert firsts[0] is not None
    assert list(firsts[0].token_ids) == [7]
    assert not any(firsts[1:]), "the first token is rank 0's"
    assert {result.state for result in shared.at_senders()} == {TicketState.DELIVERED}
    assert_home(receiver, kv)
    sent = sum(node.stats().sent_bytes for node in sender.nodes)
    assert sent == NUM_TOKENS * 3 * sum(layout.bytes_per_token_layer for layout in receiver.layouts), "each head once"
    shared.assert_told_once()
    assert_idle(sender, receiver)


@pytest.mark.parametrize(("senders", "receivers"), [(1, 2), (2, 1), (2, 4)])
def test_over_gloo(make_node: Make, senders: int, receivers: int) -> None:
    kv = whole_kv(4, seed=8)
    sender = make_worker(make_node, "prefill", 4, senders, kv, transport="gloo")
    receiver = make_worker(make_node, "decode", 4, receivers, transport="gloo")
    for _ in range(3):
        shared = offer_shared(sender, receiver, NUM_TOKENS, TARGET)
        push(shared, SOURCE, 0, NUM_TOKENS, finish=True)
        assert all(isinstance(end, ReceivedKV) for end in shared.at_receivers())
        assert {result.state for result in shared.at_senders()} == {TicketState.DELIVERED}
    assert_home(receiver, kv)
    assert sum(node.stats().pairs for node in sender.nodes) == max(senders, receivers)


def begun(make_node: Make, senders: int, receivers: int) -> tuple[Worker, Worker, Shared]:
    """A ticket of which every receiving rank holds some KV."""
    sender = make_worker(make_node, "prefill", 4, senders, whole_kv(4, seed=9))
    receiver = make_worker(make_node, "decode", 4, receivers)
    shared = offer_shared(sender, receiver, NUM_TOKENS, TARGET)
    push(shared, SOURCE, 0, 8, finish=False)
    num_holders = max(1, senders // receivers)

    def begun_everywhere() -> bool:
        tickets = [node._context.ledger._open[shared.ticket.ticket_id] for node in receiver.nodes]
        return all(len(ticket.holders) == num_holders and not ticket.num_writing for ticket in tickets)

    wait_until(begun_everywhere, "every pair has brought some")
    return sender, receiver, shared


def test_a_receiving_rank_that_fails_takes_its_senders_other_parts_along(make_node: Make) -> None:
    sender, receiver, shared = begun(make_node, 2, 4)
    receiver.nodes[1].stop()
    result = shared.sent[0].get(timeout=10)
    assert result.state in (TicketState.ABORTED, TicketState.LOST)
    for rank in (0, 1):
        state, _ = shared.received[rank].get(timeout=10)  # type: ignore[misc]
        assert state is TicketState.ABORTED
    assert shared.sent[1].empty(), "another rank's parts go on until somebody ends them"
    shared.jobs[1].abort("rank 0 failed")
    assert shared.sent[1].get(timeout=10).reason == "rank 0 failed"
    for rank in (2, 3):
        state, reason = shared.received[rank].get(timeout=10)  # type: ignore[misc]
        assert state is TicketState.ABORTED
        assert "rank 0 failed" in reason
    shared.assert_told_once()
    assert_idle(sender, receiver)


def test_the_receivers_owner_can_end_the_ranks_that_go_on(make_node: Make) -> None:
    sender, receiver, shared = begun(make_node, 2, 4)
    receiver.nodes[3].stop()
    assert shared.sent[1].get(timeout=10).state in (TicketState.ABORTED, TicketState.LOST)
    for node in receiver.nodes[:3]:
        node.abort(shared.ticket.ticket_id, "rank 3 failed")
    ends = shared.at_receivers()
    assert {end[0] for end in ends if isinstance(end, tuple)} == {TicketState.ABORTED}
    assert shared.sent[0].get(timeout=10).state is TicketState.ABORTED
    shared.assert_told_once()
    assert_idle(sender, receiver)


def test_a_sending_rank_that_fails_ends_the_ticket_for_the_others(make_node: Make) -> None:
    sender, receiver, shared = begun(make_node, 2, 1)
    sender.nodes[1].stop()
    assert shared.received[0].get(timeout=10)[0] is TicketState.ABORTED  # type: ignore[index]
    assert [result.state for result in shared.at_senders()] == [TicketState.ABORTED] * 2
    shared.assert_told_once()
    again = make_worker(make_node, "prefill", 4, 2, whole_kv(4, seed=9), epoch=2)
    next_one = offer_shared(again, receiver, NUM_TOKENS, TARGET)
    push(next_one, SOURCE, 0, NUM_TOKENS, finish=True)
    assert isinstance(next_one.at_receivers()[0], ReceivedKV)
    assert_home(receiver, whole_kv(4, seed=9))


def test_losing_one_of_its_pairs_ends_the_ticket_and_tells_the_other(make_node: Make) -> None:
    sender, receiver, shared = begun(make_node, 2, 1)
    (pair,) = sender.nodes[1]._alive
    pair.close("the link broke")
    state, reason = shared.received[0].get(timeout=10)  # type: ignore[misc]
    assert state is TicketState.ABORTED
    assert "lost" in reason
    assert shared.sent[0].get(timeout=10).reason == reason
    assert shared.sent[1].get(timeout=10).reason == "the link broke"
    assert receiver.nodes[0].stats().lost_peers == 1
    shared.assert_told_once()


def test_a_rank_whose_heads_are_sent_by_its_copies_has_nothing_to_do(make_node: Make) -> None:
    sender = make_worker(make_node, "prefill", 1, 2, whole_kv(1, seed=3))
    receiver = make_worker(make_node, "decode", 1, 1)
    shared = offer_shared(sender, receiver, NUM_TOKENS, TARGET)
    assert shared.sent[1].get(timeout=10).state is TicketState.DELIVERED
    push(shared, SOURCE, 0, NUM_TOKENS, finish=True)
    assert isinstance(shared.at_receivers()[0], ReceivedKV)
    assert sender.nodes[1].stats().pairs == 0
    assert LAYOUT.num_layers * NUM_TOKENS * 32 == sender.nodes[0].stats().sent_bytes
