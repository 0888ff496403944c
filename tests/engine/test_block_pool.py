import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.block_pool import BlockPool
from engine.errors import CapacityError, IntegrityError


def test_allocate_takes_nothing_when_there_is_too_little():
    pool = BlockPool(4)
    held = pool.allocate(3)
    with pytest.raises(CapacityError, match="2 KV blocks wanted, 1 of 4 free"):
        pool.allocate(2)
    assert pool.num_free == 1
    pool.check_integrity([held])


def test_released_content_is_found_until_it_is_reused():
    pool = BlockPool(3)
    first = pool.allocate(2)
    pool.publish(first[0], b"a")
    pool.publish(first[1], b"b")
    pool.release(first)
    assert pool.find([b"a", b"b", b"c"]) == first
    assert pool.num_findable == 2
    pool.allocate(2)  # the free one, then the tail of the chain
    assert pool.find([b"a", b"b"]) == first[:1]


def test_forgotten_content_is_not_given_out_again_whoever_holds_it():
    pool = BlockPool(4)
    blocks = pool.allocate(3)
    for block, content in zip(blocks, (b"a", b"b", b"c"), strict=True):
        pool.publish(block, content)
    pool.release(blocks[1:])
    pool.forget_all()
    assert pool.find([b"a", b"b"]) == []
    assert (pool.num_findable, pool.num_free) == (0, 3)
    pool.check_integrity([blocks[:1]])
    pool.release(blocks[:1])
    assert (pool.num_findable, pool.num_free) == (0, 4)


def test_a_chain_is_found_only_from_its_start():
    pool = BlockPool(3)
    blocks = pool.allocate(2)
    pool.publish(blocks[1], b"b")
    assert pool.find([b"a", b"b"]) == []


def test_shared_blocks_are_freed_by_their_last_holder():
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    pool.publish(blocks[0], b"a")
    pool.acquire(pool.find([b"a"]))
    pool.release(blocks)
    assert pool.num_free == 1
    pool.release(blocks)
    assert pool.num_free == 2
    with pytest.raises(IntegrityError, match="released more often"):
        pool.release(blocks)


def test_without_prefix_caching_nothing_is_findable():
    pool = BlockPool(2, prefix_caching=False)
    blocks = pool.allocate(1)
    pool.publish(blocks[0], b"a")
    pool.release(blocks)
    assert pool.find([b"a"]) == []


def test_integrity_notices_a_leak():
    pool = BlockPool(2)
    pool.allocate(1)
    with pytest.raises(IntegrityError, match="1 references, its holders are 0"):
        pool.check_integrity([])


@given(st.lists(st.tuples(st.sampled_from(["take", "give", "publish", "share"]), st.integers(0, 7)), max_size=60))
def test_any_history_keeps_every_block_in_one_state(history):
    pool = BlockPool(8)
    holders: list[list[int]] = []
    for action, number in history:
        if action == "take" and number <= pool.num_free:
            holders.append(pool.allocate(number))
        elif action == "give" and holders:
            pool.release(holders.pop(number % len(holders)))
        elif action == "publish" and holders and holders[-1]:
            pool.publish(holders[-1][number % len(holders[-1])], bytes([number]))
        elif action == "share":
            found = pool.find([bytes([number])])
            pool.acquire(found)
            holders.append(found)
        pool.check_integrity(holders)
