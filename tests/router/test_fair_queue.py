"""Who goes first, and how much is ahead of whom: without clocks and futures."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from router.fair_queue import Claim, FairQueue


@dataclass(eq=False)
class Item:
    claim: Claim
    number: int


def queue_of(*claims: Claim, weights: dict[str, float] | None = None) -> tuple[FairQueue[Item], list[Item]]:
    queue = FairQueue[Item](lambda tenant: (weights or {}).get(tenant, 1.0))
    items = [Item(claim, number) for number, claim in enumerate(claims)]
    for item in items:
        queue.add(item)
    return queue, items


def drained(queue: FairQueue[Item], num: int | None = None) -> list[Item]:
    """Take them out in order."""
    order = []
    while (head := queue.head()) is not None and len(order) != num:
        queue.charge(head.claim)
        queue.remove(head)
        order.append(head)
    return order


def test_priority_then_deadline_then_arrival() -> None:
    queue, items = queue_of(
        Claim(1, deadline=5.0), Claim(0, deadline=9.0), Claim(0, deadline=7.0), Claim(0, deadline=9.0), Claim(-3)
    )
    assert drained(queue) == [items[index] for index in (4, 2, 1, 3, 0)]


@pytest.mark.parametrize("weight", [1.0, 3.0, 0.5])
def test_shares_go_by_tokens_and_weight(weight: float) -> None:
    many = [Claim(tenant="a", num_tokens=10)] * 600 + [Claim(tenant="b", num_tokens=30)] * 200
    queue, _ = queue_of(*many, weights={"b": weight})
    tokens = {"a": 0, "b": 0}
    for item in drained(queue, 120):
        tokens[item.claim.tenant] += item.claim.num_tokens
    assert tokens["b"] / tokens["a"] == pytest.approx(weight, rel=0.1)


def test_a_tenant_that_comes_late_has_saved_up_nothing() -> None:
    queue, _ = queue_of(*[Claim(tenant="a", num_tokens=10)] * 100)
    drained(queue, 50)
    for number in range(50):
        queue.add(Item(Claim(tenant="b", num_tokens=10), 1000 + number))
    names = "".join(item.claim.tenant for item in drained(queue, 40))
    assert names.count("a") in (19, 20, 21)
    assert "bbb" not in names


def test_a_tenant_that_had_more_alone_pays_nothing_for_it() -> None:
    queue, _ = queue_of(*[Claim(tenant="a", num_tokens=1000)] * 10)
    drained(queue)
    for number, tenant in enumerate("bababa"):
        queue.add(Item(Claim(tenant=tenant, num_tokens=10), 100 + number))
    assert "".join(item.claim.tenant for item in drained(queue)) == "bababa"


def test_those_marked_first_go_before_their_class_and_no_other() -> None:
    queue, items = queue_of(Claim(deadline=9.0), Claim(deadline=1.0), Claim(-1), Claim(deadline=2.0))
    queue.mark_first(items[0])
    returned = Item(Claim(), -1)
    queue.add(returned, first=True)
    assert drained(queue) == [items[2], returned, items[0], items[1], items[3]]


def test_counts_by_tenant_follow() -> None:
    queue, items = queue_of(Claim(tenant="a"), Claim(1, tenant="a"), Claim(tenant="b"))
    assert (len(queue), queue.num_of("a"), queue.num_of("b"), queue.num_of("c")) == (3, 2, 1, 0)
    assert set(queue) == set(items)
    for item in items:
        queue.remove(item)
    assert (len(queue), queue.num_of("a"), queue.head(), queue.num_tokens()) == (0, 0, None, 0)


def test_tokens_ahead_of_a_newcomer_are_about_those_that_go_before_it() -> None:
    rng = random.Random(3)
    for _ in range(50):
        names = "abc"
        weights = {"a": 1.0, "b": 2.0, "c": 0.5}
        claims = [
            Claim(rng.randrange(2), rng.choice(names), rng.randrange(5, 50), rng.uniform(0, 100)) for _ in range(60)
        ]
        queue, _ = queue_of(*claims, weights=weights)
        drained(queue, rng.randrange(20))
        newcomer = Item(Claim(1, rng.choice(names), 20, rng.uniform(0, 100)), 1000)
        expected = queue.tokens_before(newcomer.claim)
        queue.add(newcomer)
        assert queue.tokens_ahead_of(newcomer) == pytest.approx(expected, rel=0.1, abs=20)
        order = drained(queue)
        before = sum(item.claim.num_tokens for item in order[: order.index(newcomer)])
        assert expected == pytest.approx(before, abs=0.25 * before + 120)


def test_names_that_come_and_go_leave_nothing() -> None:
    queue, _ = queue_of(*[Claim(tenant="stays", num_tokens=1)] * 2)
    for number in range(200):
        queue.add(Item(Claim(tenant=f"t{number}", num_tokens=5), number))
        drained(queue, 1)
        queue.add(Item(Claim(tenant="stays"), number))
    assert len(queue._classes[0]._tenants) < 250
    drained(queue)
    assert not queue._classes


def test_a_priority_that_nobody_has_any_more_leaves_nothing_behind() -> None:
    queue, (stays,) = queue_of(Claim(0))
    for priority in range(1, 500):
        passing = Item(Claim(priority), priority)
        queue.add(passing)
        queue.charge(passing.claim)
        queue.remove(passing)
    assert list(queue._classes) == [0]
    assert queue.head() is stays
