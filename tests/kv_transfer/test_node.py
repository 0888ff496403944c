"""Whole transfers between nodes, and what a node leaves behind."""

from __future__ import annotations

import gc
import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kv_transfer.config import TransferConfig
from kv_transfer.errors import PairError, TicketError, TransferError, TransferIntegrityError
from kv_transfer.node import TransferNode
from kv_transfer.ticket import TicketState
from tests.kv_transfer.conftest import LAYOUT, SECRET, Make, Memory, Two, first_token_of, offer, send_all, slots
from tests.kv_transfer.test_sender import wait_until


def test_kv_arrives(two: Two) -> None:
    delivery = offer(two.receiver, 21, [9, 4, 30])
    send_all(two.sender, delivery, [1, 2, 3])
    received = delivery.assert_delivered()
    two.assert_same([1, 2, 3], [9, 4, 30], 0, 21)
    assert received.num_bytes == 21 * 3 * 2 * 2 * 4 * 4
    assert list(received.first.token_ids) == [7]
    assert received.busy_s > 0
    assert received.tail_s >= 0
    untouched = sorted(set(range(two.target.kv.shape[2])) - set(slots([9, 4, 30], 0, 21)))
    assert not two.target.kv[:, :, untouched].any(), "only the ticket's slots may be written"


def test_the_tail_is_what_comes_home_after_the_first_token(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    gather = two.source.gather

    def slow(*where: object) -> None:
        time.sleep(0.1)
        gather(*where)  # type: ignore[arg-type]

    monkeypatch.setattr(two.source, "gather", slow)
    late = offer(two.receiver, 21, [9, 4, 30])
    send_all(two.sender, late, [1, 2, 3])
    assert late.assert_delivered().tail_s >= 0.1

    early = offer(two.receiver, 8, [11])
    before = two.receiver.stats().received_pieces
    job = two.sender.open_send(early.ticket, early.sent.put)
    job.push(0, 3, 0, slots([5], 0, 8))
    wait_until(lambda: two.receiver.stats().received_pieces > before, "the piece is home")
    job.finish(first_token_of(early))
    assert early.assert_delivered().tail_s < 0.05


@pytest.mark.parametrize("num_tokens", [9, 16, 40])
def test_tokens_the_receiver_holds_do_not_travel(two: Two, num_tokens: int) -> None:
    source = [5, 6, 7, 8, 1]
    delivery = offer(two.receiver, num_tokens, range(20, 20 + (num_tokens - 1) // 8), first_token=8)
    send_all(two.sender, delivery, source, chunks=[1, num_tokens - 9] if num_tokens > 9 else [1])
    received = delivery.assert_delivered()
    two.assert_same(source, list(delivery.ticket.block_ids), 8, num_tokens)
    assert received.num_bytes == (num_tokens - 8) * 3 * 64
    assert torch.count_nonzero(two.target.kv).item() == received.num_bytes // 4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_arrives_bit_for_bit(make_node: Make, dtype: str) -> None:
    layout = replace(LAYOUT, dtype=dtype)
    source, target = Memory(layout, seed=1), Memory(layout)
    sender, receiver = make_node("prefill", source, layout=layout), make_node("decode", target, layout=layout)
    delivery = offer(receiver, 16, [0, 1])
    send_all(sender, delivery, [0, 1])
    delivery.assert_delivered()
    assert torch.equal(source.kv[:, :, :16].view(torch.int16), target.kv[:, :, :16].view(torch.int16))


@pytest.mark.parametrize("transport", ["gloo", "loopback"])
def test_every_node_sends_to_every_other_at_once(make_node: Make, transport: str) -> None:
    memories = [Memory(LAYOUT, seed=seed) for seed in range(3)]
    nodes = [make_node(f"worker-{n}", memory, transport=transport) for n, memory in enumerate(memories)]
    pairs = [(here, there) for here in range(3) for there in range(3) if here != there]
    deliveries = {}
    for here, there in pairs:
        for n in range(5):
            block = 20 + here * 10 + 2 * n
            deliveries[here, there, n] = offer(nodes[there], 16, [block, block + 1])
    for (here, _, n), delivery in deliveries.items():
        send_all(nodes[here], delivery, [2 * n, 2 * n + 1])
    for (here, there, n), delivery in deliveries.items():
        delivery.assert_delivered()
        arrived = memories[there].kv[:, :, slots(delivery.ticket.block_ids, 0, 16)]
        assert torch.equal(arrived, memories[here].kv[:, :, slots([2 * n, 2 * n + 1], 0, 16)])
    for node in nodes:
        node.check_integrity(idle=True)
        stats = node.stats()
        assert (stats.pairs, stats.open_tickets, stats.open_sends) == (4, 0, 0)
        assert stats.sent_bytes == stats.received_bytes == 2 * 5 * 16 * 3 * 64


def test_cancels_at_random_moments_leave_nothing_open(two: Two) -> None:
    for n in range(60):
        delivery = offer(two.receiver, 24, [3 * (n % 8), 3 * (n % 8) + 1, 3 * (n % 8) + 2])
        job = send_all(two.sender, delivery, [0, 1, 2])
        threading.Event().wait((n % 10) / 4000)
        if n % 3 == 0:
            job.abort("client left")
        elif n % 3 == 1:
            two.receiver.abort(delivery.ticket.ticket_id, "client left")
        end, result = delivery.at_receiver(), delivery.at_sender()
        if not isinstance(end, tuple):
            assert n % 3 < 2 or result.state is TicketState.DELIVERED
            two.assert_same([0, 1, 2], delivery.ticket.block_ids, 0, 24)
        else:
            assert end[0] is result.state is TicketState.ABORTED
        delivery.assert_told_once()
    two.sender.check_integrity(idle=True)
    two.receiver.check_integrity(idle=True)
    assert two.sender.stats().pairs == 1


def threads_of_transfer() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("kv-")]


def num_kernel_threads() -> int:
    return len(os.listdir("/proc/self/task"))


def num_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("transport", ["gloo", "loopback"])
def test_stop_ends_everything_and_leaves_nothing(transport: str) -> None:
    assert threads_of_transfer() == []

    def run(num_tickets: int) -> None:
        config = TransferConfig(transport=transport, heartbeat_s=0.1)  # type: ignore[arg-type]
        sender, receiver = (
            TransferNode(worker_id=name, epoch=1, layout=LAYOUT, memory=Memory(LAYOUT), config=config, secret=SECRET)
            for name in ("prefill", "decode")
        )
        sender.start()
        receiver.start()
        done = [offer(receiver, 8, [n]) for n in range(num_tickets)]
        for delivery in done:
            send_all(sender, delivery, [0])
            delivery.assert_delivered()
        halfway, untouched = offer(receiver, 8, [50]), offer(receiver, 8, [51])
        sender.open_send(halfway.ticket, halfway.sent.put).push(0, 1, 0, slots([0], 0, 8))
        start = time.monotonic()
        sender.stop()
        assert halfway.at_sender().state is TicketState.ABORTED
        receiver.stop()
        for delivery in (halfway, untouched):
            state, reason = delivery.at_receiver()  # type: ignore[misc]
            assert state is TicketState.ABORTED
            assert reason
            delivery.assert_told_once()
        assert time.monotonic() - start < 5
        sender.stop()
        with pytest.raises(TicketError, match="nothing can be granted"):
            offer(receiver, 8, [3])
        with pytest.raises(PairError, match="has stopped"):
            sender.open_send(halfway.ticket, halfway.sent.put)

    run(1)
    gc.collect()
    before = num_fds(), num_kernel_threads()
    for _ in range(3):
        run(3)
    gc.collect()
    assert threads_of_transfer() == []
    assert (num_fds(), num_kernel_threads()) == before


def test_a_quiet_pair_costs_next_to_nothing(two: Two) -> None:
    delivery = offer(two.receiver, 8, [0])
    send_all(two.sender, delivery, [0])
    delivery.assert_delivered()
    before = time.process_time()
    threading.Event().wait(1.0)
    assert time.process_time() - before < 0.05, "of a core, with ten heartbeats a second"


def test_an_open_job_is_not_idle(two: Two) -> None:
    delivery = offer(two.receiver, 8, [0])
    job = two.sender.open_send(delivery.ticket, delivery.sent.put)
    assert two.sender.stats().open_sends == 1
    with pytest.raises(TransferIntegrityError, match="1 send jobs are open"):
        two.sender.check_integrity(idle=True)
    with pytest.raises(TransferIntegrityError, match="open on an idle node"):
        two.receiver.check_integrity(idle=True)
    job.abort("over")
    delivery.at_sender()
    delivery.at_receiver()


def test_a_ticket_is_sent_once_at_a_time(two: Two) -> None:
    delivery = offer(two.receiver, 8, [0])
    job = two.sender.open_send(delivery.ticket, delivery.sent.put)
    with pytest.raises(TicketError, match="is being sent already"):
        two.sender.open_send(delivery.ticket, delivery.sent.put)
    job.abort("over")
    delivery.at_sender()
    delivery.at_receiver()


def test_a_node_needs_a_secret() -> None:
    with pytest.raises(ValueError, match="secret must not be empty"):
        TransferNode(worker_id="w", epoch=1, layout=LAYOUT, memory=Memory(LAYOUT), config=TransferConfig(), secret=b"")


def test_an_address_of_another_machine_is_refused_by_name() -> None:
    config = TransferConfig(host="192.0.2.1")
    node = TransferNode(worker_id="w", epoch=1, layout=LAYOUT, memory=Memory(LAYOUT), config=config, secret=SECRET)
    with pytest.raises(TransferError, match=r"host 192\.0\.2\.1 is no address of this machine"):
        node.start()
    node.stop()


def test_the_package_uses_no_pickle() -> None:
    sources = Path(__file__).parents[2].joinpath("kv_transfer").glob("*.py")
    assert not [path.name for path in sources if "pickle" in path.read_text()]


def test_pairs_are_many_and_one_that_is_lost_leaves_the_others(make_node: Make) -> None:
    sender = make_node("prefill", Memory(LAYOUT, seed=1))
    receivers = [make_node(f"decode-{n}", Memory(LAYOUT)) for n in range(4)]
    open_jobs = [offer(receiver, 16, [0, 1]) for receiver in receivers]
    jobs = [sender.open_send(delivery.ticket, delivery.sent.put) for delivery in open_jobs]
    for job in jobs:
        job.push(0, 3, 0, slots([0, 1], 0, 8))
    wait_until(lambda: all(receiver.stats().received_pieces for receiver in receivers), "all pairs are in use")
    receivers[0].stop()
    assert open_jobs[0].at_sender().state in (TicketState.ABORTED, TicketState.LOST)
    for job, delivery in zip(jobs[1:], open_jobs[1:], strict=True):
        job.push(0, 3, 8, slots([0, 1], 8, 16))

        job.finish(first_token_of(delivery))
        delivery.assert_delivered()
    assert open_jobs[0].at_receiver()[0] is TicketState.ABORTED  # type: ignore[index]
