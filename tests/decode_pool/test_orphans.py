"""Who waits for a new owner, and for how long."""

from __future__ import annotations

from decode_pool.orphans import Orphans
from protos import worker_pb2 as pb


def test_one_that_is_adopted_in_time_is_no_orphan() -> None:
    orphans = Orphans(10.0)
    orphans.add(("a", 0), now=100.0)
    assert ("a", 0) in orphans
    assert orphans.adopt(("a", 0)) is None
    assert ("a", 0) not in orphans
    assert orphans.expired(200.0) == []


def test_the_answer_of_one_that_ended_is_kept_for_its_next_owner() -> None:
    orphans = Orphans(10.0)
    orphans.add(("a", 1), now=100.0)
    orphans.ended(("a", 1), pb.TokenOutput(token_ids=[1, 2, 3]))
    assert orphans.expired(109.0) == []
    assert list(orphans.adopt(("a", 1)).token_ids) == [1, 2, 3]
    assert len(orphans) == 0


def test_time_runs_for_each_on_its_own() -> None:
    orphans = Orphans(10.0)
    orphans.add(("a", 0), now=100.0)
    orphans.add(("b", 0), now=105.0)
    assert orphans.expired(110.0) == [("a", 0)]
    assert orphans.expired(110.0) == []
    assert orphans.adopt(("a", 0)) is None
    assert orphans.expired(115.0) == [("b", 0)]
