"""Many pairs between two processes at once, and workers that come and go."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

from tests.kv_transfer.cast import TRANSPORTS, Child, Delivery, Node, children, record, start
from tests.kv_transfer.child import LAYOUT

NUM_PAIRS = 8
NUM_TOKENS = 256
CHUNK = 32
SOURCE = list(range(16))
SLOW_S = 0.05
"""A slow receiver's extra time for each of its pieces."""
NUM_WAVES, WAVE, WARM_UP = 10, 5, 3


@pytest.fixture(scope="module", params=TRANSPORTS)
def two(request: pytest.FixtureRequest) -> Iterator[list[Child]]:
    with children(request.param, [0, 1]) as made:
        yield made


def open_all(pairs: list[tuple[Node, Node]]) -> list[Delivery]:
    """A ticket for each pair."""
    return [Delivery.open(sender, receiver, range(20, 36), NUM_TOKENS, SOURCE) for sender, receiver in pairs]


def push_all(two: list[Child], deliveries: list[Delivery], draw: random.Random) -> None:
    """Both processes push the pieces of all their pairs at the same time, in any order."""
    for child in two:
        mine = [delivery for delivery in deliveries if delivery.sender.child is child]
        parts = [
            part
            for delivery in mine
            for first in range(0, NUM_TOKENS, CHUNK)
            for part in delivery.parts(range(LAYOUT.num_layers), first, first + CHUNK)
        ]
        draw.shuffle(parts)
        child.send("push", blocks=SOURCE, parts=parts)
    for child in two:
        child.answer()
    for delivery in deliveries:
        delivery.finish()


def time_of(two: list[Child], pairs: list[tuple[Node, Node]], draw: random.Random, num_counted: int) -> float:
    """Seconds until the first num_counted pairs' tickets have arrived; the others arrive too."""
    deliveries = open_all(pairs)
    began = time.monotonic()
    push_all(two, deliveries, draw)
    ends = [began + delivery.assert_delivered() + delivery.opened_at - began for delivery in deliveries]
    return max(ends[:num_counted]) - began


def test_eight_pairs_in_any_order_beside_computing(two: list[Child]) -> None:
    draw = random.Random(5)
    groups = [
        [start(child, f"{side}{n}", seed=n) for n in range(NUM_PAIRS)] for child, side in zip(two, "ab", strict=True)
    ]
    pairs = [(a, b) if n % 2 else (b, a) for n, (a, b) in enumerate(zip(*groups, strict=True))]
    for sender, receiver in pairs:
        sender.meet(receiver)
    for sender, receiver in pairs:
        sender.await_pair(receiver)
    for child in two:
        child.ask("compute", on=True)
    num_others = NUM_PAIRS - 1
    alone = [time_of(two, pairs, draw, num_others) for _ in range(3)]
    slow = pairs[-1][1]
    slow.child.ask("slow", name=slow.name, delay_s=SLOW_S)
    beside = [time_of(two, pairs, draw, num_others) for _ in range(2)]
    slow.child.ask("slow", name=slow.name, delay_s=0.0)
    for child in two:
        child.ask("compute", on=False)
    record("eight pairs", two[0].transport, alone_s=min(alone), beside_a_slow_one_s=min(beside))
    assert min(beside) < 3 * max(alone) + 1.0
    for sender, receiver in pairs:
        assert sender.stats().pairs == receiver.stats().pairs == 1
        assert sender.stats().lost_peers == receiver.stats().lost_peers == 0
    for node in [*groups[0], *groups[1]]:
        node.stop()


ON_GPU = pytest.param(
    True, marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
)


@pytest.mark.parametrize("on_gpu", [False, ON_GPU])
def test_two_workers_of_one_device_meet_over_gloo(on_gpu: bool) -> None:
    """On a GPU NCCL would refuse; KV goes through page-locked memory instead."""
    digest = "auto" if find_spec("xxhash") else "none"
    with children("auto", [0, 0], on_gpu=on_gpu, digest=digest) as made:
        here, there = (start(child, name, seed=n) for n, (child, name) in enumerate(zip(made, "ab", strict=True)))
        for sender, receiver in ((here, there), (there, here)):
            delivery = Delivery.open(sender, receiver, range(20, 36), NUM_TOKENS, SOURCE)
            delivery.send_all()
            delivery.assert_delivered()
        assert {info.transport for info in here.pair_infos()} == {"gloo"}


def growth_of(counts: list[list[dict[str, int]]], side: int, key: str) -> int:
    """From the most of the first waves, while allocators take what they keep, to the least of the last."""
    values = [both[side][key] for both in counts]
    return min(values[-WARM_UP:]) - max(values[: WARM_UP + 2])


def settle(two: list[Child], before: list[dict[str, int]] | None) -> list[dict[str, int]]:
    """A census of both, once their threads are back to what they were before."""
    threads = [count["threads"] for count in before or []]
    deadline = time.monotonic() + 10
    while True:
        counts = [child.ask("census") for child in two]
        if not threads or [count["threads"] for count in counts] == threads or time.monotonic() > deadline:
            return counts
        threading.Event().wait(0.05)


def join_and_leave(two: list[Child], steady: tuple[Node, Node], wave: int) -> None:
    """Five workers come, half of them send and half receive, and leave; a transfer between others goes on meanwhile."""
    home, _ = steady
    load = Delivery.open(*steady, range(20, 36), NUM_TOKENS, SOURCE)
    load.push(range(2))
    joined = [start(two[1], f"joiner-{n}", epoch=wave + 1, seed=n) for n in range(WAVE)]
    pairs = [(home, node) if n % 2 else (node, home) for n, node in enumerate(joined)]
    deliveries = [
        Delivery.open(sender, receiver, range(36 + 4 * n, 40 + 4 * n), 64, SOURCE[:4])
        for n, (sender, receiver) in enumerate(pairs)
    ]
    for delivery in deliveries:
        delivery.send_all()
    for delivery in deliveries:
        delivery.assert_delivered()
    load.push(range(2, LAYOUT.num_layers))
    for node in joined:
        node.stop()
    load.finish()
    load.assert_delivered()
    home.await_pairs(1)


def test_workers_join_and_leave_fifty_times(two: list[Child]) -> None:
    steady = start(two[0], "home", seed=1), start(two[1], "steady", seed=2)
    for child in two:
        child.ask("compute", on=True)
    counts: list[list[dict[str, int]]] = []
    began = time.monotonic()
    for wave in range(NUM_WAVES):
        join_and_leave(two, steady, wave)
        counts.append(settle(two, counts[WARM_UP]) if wave > WARM_UP else settle(two, None))
    growth = {key: max(growth_of(counts, side, key) for side in range(2)) for key in counts[0][0]}
    record("join and leave", two[0].transport, each_s=(time.monotonic() - began) / NUM_WAVES / WAVE, **growth)
    assert growth["threads"] <= 0, counts
    assert growth["fds"] <= 0, counts
    assert growth["rss"] < 24 << 20, counts
    assert growth.get("cuda_allocated", 0) <= 0, counts
    assert growth.get("cuda_used", 0) < 128 << 20, counts
    for child, node in zip(two, steady, strict=True):
        child.ask("compute", on=False)
        stats = node.stats()
        assert (stats.pairs, stats.open_tickets, stats.open_sends, stats.lost_peers) == (1, 0, 0, 0)
        child.ask("check_integrity", name=node.name)
    for node in steady:
        node.stop()
