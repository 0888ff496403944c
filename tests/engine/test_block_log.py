"""What others are told of a pool's contents adds up to what is there."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.block_log import BlockChanges, BlockLog, BlockMirror, key_of
from engine.block_pool import BlockPool
from protos import worker_pb2 as pb


def content(number: int) -> bytes:
    return number.to_bytes(2, "little") * 8


def test_a_snapshot_comes_first_even_of_nothing() -> None:
    log = BlockLog([])
    first = log.take()
    assert first == pb.BlockEvents(after=0, number=1, is_snapshot=True)
    assert log.take() is None
    log.stored(content(1))
    log.stored(content(2))
    log.evicted(content(1))
    assert log.take() == pb.BlockEvents(after=1, number=2, stored=[key_of(content(2))], evicted=[key_of(content(1))])


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["use", "take", "add", "forget"]), st.integers(0, 12)), max_size=60))
def test_a_mirror_has_what_the_pool_can_find(acts: list[tuple[str, int]]) -> None:
    pool, mirror = BlockPool(4), BlockMirror()
    pool.publish(pool.allocate(1)[0], content(3))
    pool.log = BlockLog(pool.contents())
    changes = BlockChanges()
    for act, number in [*acts, ("take", 0)]:
        if act == "use" and pool.num_free:
            (block,) = pool.allocate(1)
            pool.publish(block, content(number))
            pool.release([block])
        elif act == "forget":
            pool.forget_all()
        elif act in ("take", "add") and (events := pool.log.take()) is not None:
            changes.add(events)
        if act == "take" and (events := changes.take()) is not None:
            assert events.is_snapshot or events.after == mirror.snapshot().number
            mirror.apply(events)
            assert (len(changes), changes.take()) == (0, None)
    assert set(mirror.snapshot().stored) == {key_of(each) for each in pool.contents()}
    again = BlockMirror()
    again.apply(mirror.snapshot())
    assert set(again.snapshot().stored) == set(mirror.snapshot().stored)
    assert again.snapshot().number == mirror.snapshot().number


def test_a_snapshot_replaces_what_was_on_its_way() -> None:
    changes = BlockChanges()
    changes.add(pb.BlockEvents(after=3, number=4, stored=[1, 2]))
    changes.add(pb.BlockEvents(after=9, number=9, stored=[5], is_snapshot=True))
    changes.add(pb.BlockEvents(after=9, number=10, stored=[6], evicted=[5]))
    assert changes.take() == pb.BlockEvents(after=9, number=10, stored=[6], evicted=[5], is_snapshot=True)
