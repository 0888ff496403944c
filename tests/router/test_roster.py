"""A large fleet is looked at in part."""

from __future__ import annotations

from protos.worker_pb2 import BlockEvents
from router.info import WorkerState
from router.prefix_index import NOTHING_KNOWN, PrefixIndex
from router.roster import MANY, NUM_DRAWN, Roster
from tests.router.test_policies import worker


def test_a_small_fleet_is_looked_at_as_a_whole() -> None:
    ready = [worker(f"d{n}", "decode") for n in range(MANY)]
    lost = worker("lost", "decode", WorkerState.LOST)
    assert Roster([*ready, lost]).candidates(NOTHING_KNOWN) == ready


def test_of_a_large_one_a_few_of_each_role_and_those_that_hold_the_prefix() -> None:
    fleet = [worker(f"p{n}", "prefill") for n in range(500)] + [worker(f"d{n}", "decode") for n in range(500)]
    index = PrefixIndex()
    index.apply(fleet[777], BlockEvents(number=1, stored=[1, 2], is_snapshot=True))
    roster = Roster(fleet)
    seen = set()
    for _ in range(200):
        some = roster.candidates(index.find([1, 2, 3], 16))
        assert fleet[777] in some
        assert len(some) == len(set(some)) <= 2 * NUM_DRAWN + 1
        assert sum(info.can_prefill for info in some) == NUM_DRAWN
        seen.update(info.worker_id for info in some)
    assert len(seen) > 800


def test_blocks_are_named_in_each_way_that_the_fleet_does() -> None:
    assert len(Roster([worker("a", "decode"), worker("b", "decode")]).chains) == 1
    assert len(Roster([worker("a", "decode"), worker("b", "decode", model_hash="new")]).chains) == 2
    assert Roster([]).chains == []
