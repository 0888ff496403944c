"""Pairs as a node keeps them: made ahead of time, retired under the cap, held back when a receiver is slow."""

from __future__ import annotations

import gc
import socket
import threading
import time
import weakref
from dataclasses import replace

import pytest
import torch

from kv_transfer.config import TransferConfig
from kv_transfer.context import PairInfo, means_of
from kv_transfer.handshake import Means
from kv_transfer.jobs import SendJob
from kv_transfer.node import TransferNode
from kv_transfer.staging import StagingPool
from kv_transfer.ticket import TicketState
from tests.kv_transfer.conftest import BOUND_S, LAYOUT, Delivery, Make, Memory, first_token_of, offer, send_all, slots
from tests.kv_transfer.test_peers import address_of
from tests.kv_transfer.test_sender import wait_until


def deliver(sender: TransferNode, receiver: TransferNode) -> None:
    delivery = offer(receiver, 8, [40])
    send_all(sender, delivery, [0])
    delivery.assert_delivered()


def states(node: TransferNode) -> dict[str, str]:
    return {info.peer: info.state for info in node.pair_infos()}


def meet(sender: TransferNode, receiver: TransferNode, name: str) -> None:
    sender.meet(name, 1, [address_of(receiver)], LAYOUT)


# -- ahead of time


def test_a_pair_is_ready_before_the_first_ticket(make_node: Make) -> None:
    sender, receiver = make_node("prefill", Memory(LAYOUT)), make_node("decode", Memory(LAYOUT))
    for _ in range(3):
        meet(sender, receiver, "decode")
    wait_until(lambda: states(sender) == {"decode/1": "ready"}, "the pair is ready")
    wait_until(lambda: states(receiver) == {"prefill/1": "ready"}, "its other end too")
    before = sender.pair_infos()
    deliver(sender, receiver)
    assert sender.pair_infos() == before, "the ticket uses that pair"


def test_every_rank_is_met(make_node: Make) -> None:
    sender = make_node("prefill", Memory(LAYOUT))
    layouts = [replace(LAYOUT, tp_size=2, tp_rank=rank) for rank in range(2)]
    ranks = [make_node("decode", Memory(layout), layout=layout) for layout in layouts]
    sender.meet("decode", 1, [address_of(rank) for rank in ranks], layouts[0])
    wait_until(lambda: states(sender) == {"decode/1 rank 0": "ready", "decode/1 rank 1": "ready"}, "both are ready")
    sender.meet("decode", 1, [address_of(rank) for rank in ranks][:1], layouts[0])
    sender.meet("other", 1, ["127.0.0.1:9"], replace(LAYOUT, head_dim=8))
    assert sender.stats().pairs == 2, "who cannot be met is left alone"


def test_a_silent_peer_holds_up_no_other_pair(make_node: Make) -> None:
    sender = make_node("prefill", Memory(LAYOUT), peer_timeout_s=1.0)
    receiver = make_node("decode", Memory(LAYOUT))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        start = time.monotonic()
        sender.meet("silent", 1, [address], LAYOUT)
        stuck = offer(receiver, 8, [1])
        ticket = replace(stuck.ticket, worker_id="silent", control_addresses=(address,))
        sender.open_send(ticket, stuck.sent.put)
        meet(sender, receiver, "decode")
        deliver(sender, receiver)
        assert time.monotonic() - start < 0.9, "before the silent one's time is up"
        assert states(sender)["silent/1"] == "connecting"
        result = stuck.at_sender()
        assert time.monotonic() - start < 5 * 1.0
        assert result.state is TicketState.LOST
        assert "did not send its challenge" in result.reason
        wait_until(lambda: "silent/1" not in states(sender), "it is given up")
        deliver(sender, receiver)
    receiver.abort(stuck.ticket.ticket_id, "over")
    stuck.at_receiver()


def test_a_peer_that_was_met_in_vain_is_tried_again_on_use(make_node: Make) -> None:
    sender, receiver = make_node("prefill", Memory(LAYOUT)), make_node("decode", Memory(LAYOUT))
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
    sender.meet("decode", 1, [address], LAYOUT)
    wait_until(lambda: sender.stats().pairs == 0, "nobody answered")
    deliver(sender, receiver)


def test_a_stopped_node_meets_nobody(make_node: Make) -> None:
    sender, receiver = make_node("prefill", Memory(LAYOUT)), make_node("decode", Memory(LAYOUT))
    sender.stop()
    meet(sender, receiver, "decode")
    assert sender.stats().pairs == 0


# -- under the cap


def test_the_pair_that_idled_longest_makes_room(make_node: Make) -> None:
    sender = make_node("prefill", Memory(LAYOUT), max_pairs=2)
    receivers = {name: make_node(name, Memory(LAYOUT)) for name in ("a", "b", "c")}
    for name in ("a", "b", "a", "c"):
        deliver(sender, receivers[name])
    wait_until(lambda: set(states(sender)) == {"a/1", "c/1"}, "b idled longest")
    assert sender.stats().retired_pairs == 1
    deliver(sender, receivers["b"])
    wait_until(lambda: set(states(sender)) == {"b/1", "c/1"}, "then a")
    wait_until(lambda: not receivers["a"].stats().pairs, "the other end knows")
    assert sum(node.stats().lost_peers for node in [sender, *receivers.values()]) == 0


def test_to_meet_somebody_closes_no_other_pair(make_node: Make) -> None:
    """Else every newcomer would cost a pair that the next ticket needs."""
    sender = make_node("prefill", Memory(LAYOUT), max_pairs=1)
    known, newcomer = make_node("known", Memory(LAYOUT)), make_node("newcomer", Memory(LAYOUT))
    deliver(sender, known)
    meet(sender, newcomer, "newcomer")
    assert states(sender) == {"known/1": "ready"}
    assert sender.stats().retired_pairs == 0
    deliver(sender, newcomer)
    wait_until(lambda: set(states(sender)) == {"newcomer/1"}, "a ticket is what makes room")


def test_a_pair_in_use_is_never_retired_and_the_cap_holds_again_later(make_node: Make) -> None:
    sender = make_node("prefill", Memory(LAYOUT), max_pairs=1)
    receivers = [make_node(f"decode-{n}", Memory(LAYOUT)) for n in range(4)]
    deliveries = [offer(receiver, 8, [0]) for receiver in receivers[:3]]
    jobs = [sender.open_send(delivery.ticket, delivery.sent.put) for delivery in deliveries]
    wait_until(lambda: list(states(sender).values()) == ["ready"] * 3, "three pairs are in use")
    for job, delivery in zip(jobs, deliveries, strict=True):
        job.push(0, 3, 0, slots([0], 0, 8))
        job.finish(first_token_of(delivery))
        delivery.assert_delivered()
    assert sender.stats().retired_pairs == 0
    deliver(sender, receivers[3])
    wait_until(lambda: set(states(sender)) == {"decode-3/1"}, "the others made room")
    assert sender.stats().retired_pairs == 3


def test_a_closed_pair_gives_its_staging_back_at_once(make_node: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not when Python next looks for cycles: a GPU would wait for a gigabyte."""
    buffers: list[weakref.ref[torch.Tensor]] = []
    allocate = StagingPool._allocate

    def watched(pool: StagingPool, num_bytes: int) -> torch.Tensor | None:
        buffer = allocate(pool, num_bytes)
        if buffer is not None:
            buffers.append(weakref.ref(buffer))
        return buffer

    monkeypatch.setattr(StagingPool, "_allocate", watched)
    sender, receiver = make_node("prefill", Memory(LAYOUT)), make_node("decode", Memory(LAYOUT))
    gc.collect()
    gc.disable()
    try:
        deliver(sender, receiver)
        assert len(buffers) >= 2
        sender.stop()
        wait_until(lambda: receiver.stats().pairs == 0, "both ends are closed")
        wait_until(lambda: not any(buffer() is not None for buffer in buffers), "all staging is free")
    finally:
        gc.enable()


# -- back-pressure

LARGE = replace(LAYOUT, num_kv_heads=8, head_dim=256)  # 24 MiB a ticket


def push_layers(sender: TransferNode, delivery: Delivery, layers: range) -> SendJob:
    job = sender.open_send(delivery.ticket, delivery.sent.put)
    assert isinstance(job, SendJob)
    for layer in layers:
        job.push(layer, 1, 0, slots(range(64), 0, 512))
    return job


@pytest.mark.usefixtures("small_sockets")
def test_a_slow_receiver_pauses_its_own_jobs_alone(make_node: Make) -> None:
    memories = {name: Memory(LARGE) for name in ("slow", "fast")}
    source = Memory(LARGE, seed=1)
    sizes = {"layout": LARGE, "piece_mib": 1, "staging_mib": 2}
    sender = make_node("prefill", source, **sizes)
    receivers = {name: make_node(name, memory, **sizes) for name, memory in memories.items()}
    memories["slow"].scatter_gate.clear()
    room = threading.Event()
    slow = offer(receivers["slow"], 512, range(64))
    job = push_layers(sender, slow, range(3))
    assert memories["slow"].scattering.wait(BOUND_S)
    assert job.must_pause(room.set)
    fast = offer(receivers["fast"], 512, range(64))
    other = push_layers(sender, fast, range(3))
    other.finish(first_token_of(fast))
    fast.assert_delivered()
    assert torch.equal(memories["fast"].kv, source.kv)
    assert not other.must_pause(lambda: None)
    sent = -1
    while sent != (sent := sender.stats().sent_pieces):
        threading.Event().wait(0.1)  # until the kernel's buffers are full, too
    room.clear()
    assert job.must_pause(room.set)
    assert not room.wait(0.1), "nothing leaves meanwhile"
    memories["slow"].scatter_gate.set()
    assert room.wait(BOUND_S)
    wait_until(lambda: not job.must_pause(lambda: None), "it has caught up")
    job.finish(first_token_of(slow))
    slow.assert_delivered()
    assert torch.equal(memories["slow"].kv, source.kv)


@pytest.mark.usefixtures("small_sockets")
def test_jobs_of_one_pair_share_its_backlog_and_each_hears_of_room(make_node: Make) -> None:
    source, target = Memory(LARGE, seed=1), Memory(LARGE, num_blocks=200)
    sizes = {"layout": LARGE, "piece_mib": 1, "staging_mib": 2}
    sender, receiver = make_node("prefill", source, **sizes), make_node("decode", target, **sizes)
    target.scatter_gate.clear()
    deliveries = [offer(receiver, 512, range(64 * n, 64 * n + 64)) for n in range(3)]
    jobs = [push_layers(sender, delivery, range(3 if n == 0 else 0)) for n, delivery in enumerate(deliveries)]
    assert target.scattering.wait(BOUND_S)
    rooms = [threading.Event() for _ in jobs]
    assert [job.must_pause(room.set) for job, room in zip(jobs, rooms, strict=True)] == [True] * 3
    target.scatter_gate.set()
    assert all(room.wait(BOUND_S) for room in rooms)
    for job, delivery in zip(jobs, deliveries, strict=True):
        job.abort("enough")
        assert not job.must_pause(lambda: None), "a settled job needs no room"
        delivery.at_sender()
        delivery.at_receiver()


@pytest.mark.parametrize(("staging_mib", "piece_mib"), [(None, 4), (64, 4), (4, 2), (1, 0.5)])
def test_pieces_fit_a_small_staging_by_themselves(make_node: Make, staging_mib: int | None, piece_mib: float) -> None:
    """A GPU's default piece of 32 MiB would not fit where somebody sets staging_mib to 16."""
    sender = make_node("prefill", Memory(LARGE, seed=1), layout=LARGE, staging_mib=staging_mib)
    receiver = make_node("decode", Memory(LARGE), layout=LARGE, staging_mib=staging_mib)
    assert sender._context.piece_bytes == piece_mib * (1 << 20)
    delivery = offer(receiver, 512, range(64))
    push_layers(sender, delivery, range(3)).finish(first_token_of(delivery))
    delivery.assert_delivered()


# -- what carries the bytes


def test_what_a_cpu_can_carry_kv_with() -> None:
    memory = Memory(LAYOUT)
    assert means_of(memory, TransferConfig()) == Means("gloo", True, "")
    assert means_of(memory, TransferConfig(transport="loopback")) == Means("loopback", False, "")


@pytest.mark.parametrize(("transport", "agreed"), [("auto", "gloo"), ("nccl", None)])
def test_workers_of_one_gpu_meet_over_gloo_if_they_may(
    make_node: Make, monkeypatch: pytest.MonkeyPatch, transport: str, agreed: str | None
) -> None:
    monkeypatch.setattr("kv_transfer.node.means_of", lambda *_: Means("nccl", transport == "auto", "GPU-1"))
    source, target = Memory(LAYOUT, seed=1), Memory(LAYOUT)
    sender = make_node("prefill", source, transport=transport)
    receiver = make_node("decode", target, transport=transport)
    delivery = offer(receiver, 8, [0])
    send_all(sender, delivery, [0])
    if agreed is None:
        assert "both workers share one GPU" in delivery.at_sender().reason
        receiver.abort(delivery.ticket.ticket_id, "over")
        delivery.at_receiver()
        return
    delivery.assert_delivered()
    assert torch.equal(source.kv[:, :, :8], target.kv[:, :, :8])
    infos: list[PairInfo] = [*sender.pair_infos(), *receiver.pair_infos()]
    assert [info.transport for info in infos] == [agreed] * 2
