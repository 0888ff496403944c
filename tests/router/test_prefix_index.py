"""Who holds what, by the workers' own events."""

from __future__ import annotations

from collections.abc import Iterator

from hypothesis import given, settings
from hypothesis import strategies as st

from protos.worker_pb2 import BlockEvents
from router.info import WorkerInfo
from router.prefix_index import PrefixIndex
from tests.router.test_policies import worker


def snapshot(*keys: int, number: int = 1) -> BlockEvents:
    return BlockEvents(after=number - 1, number=number, stored=keys, is_snapshot=True)


def test_the_longest_start_of_each_worker() -> None:
    index, one, two, three = PrefixIndex(), *(worker(f"d{n}", "decode") for n in range(3))
    index.apply(one, snapshot(1, 2, 3, 4))
    index.apply(two, snapshot(1, 2, 9))
    found = index.find([1, 2, 3, 4, 5], block_size=16)
    assert [found.tokens_at(each) for each in (one, two, three)] == [64, 32, 0]
    assert found.longest(2) == [one, two]
    assert found.longest(1) == [one]
    assert index.find([7, 1, 2], 16).levels == ()


def test_no_more_keys_are_made_than_are_known() -> None:
    index, one = PrefixIndex(), worker("d0", "decode")
    index.apply(one, snapshot(1, 2))
    asked: list[int] = []

    def keys() -> Iterator[int]:
        for key in range(1, 100):
            asked.append(key)
            yield key

    assert index.find(keys(), 4).tokens_at(one) == 8
    assert asked == [1, 2, 3]


def test_a_gap_empties_the_worker_until_the_next_snapshot() -> None:
    index, one, two = PrefixIndex(), worker("d0", "decode"), worker("d1", "decode")
    assert index.apply(one, snapshot(1, 2))
    assert index.apply(two, snapshot(1))
    assert index.apply(one, BlockEvents(after=1, number=2, stored=[3], evicted=[1]))
    assert (index.num_held(one), index.num_keys) == (2, 3)
    assert not index.apply(one, BlockEvents(after=3, number=4, stored=[4]))
    assert (index.num_held(one), index.num_keys) == (0, 1)
    assert not index.apply(one, BlockEvents(after=4, number=5, stored=[5]))
    assert index.apply(one, snapshot(7, number=9))
    assert index.apply(one, BlockEvents(after=9, number=10, stored=[8]))
    assert index.num_held(one) == 2


workers = [WorkerInfo(f"d{number}", 1, "decode", "x:1") for number in range(3)]
events = st.tuples(
    st.sampled_from([0, 1, 2]), st.lists(st.integers(0, 6)), st.lists(st.integers(0, 6)), st.booleans(), st.booleans()
)


@settings(deadline=None)
@given(st.lists(events, max_size=30))
def test_the_index_is_the_sum_of_the_workers(acts: list[tuple[int, list[int], list[int], bool, bool]]) -> None:
    index = PrefixIndex()
    held: dict[WorkerInfo, set[int]] = {each: set() for each in workers}
    numbers = dict.fromkeys(workers, 0)
    for which, stored, evicted, is_snapshot, gone in acts:
        one = workers[which]
        if gone:
            index.forget(one)
            held[one], numbers[one] = set(), 0
            continue
        is_first = not numbers[one]
        numbers[one] += 1
        evicted = [key for key in evicted if key not in stored]
        index.apply(
            one,
            BlockEvents(
                after=numbers[one] - 1,
                number=numbers[one],
                stored=set(stored),
                evicted=evicted,
                is_snapshot=is_snapshot or is_first,
            ),
        )
        held[one] = set(stored) | (set() if is_snapshot or is_first else held[one] - set(evicted))
    for one in workers:
        assert index.num_held(one) == len(held[one])
        for key in range(7):
            assert (index.find([key], 1).tokens_at(one) == 1) == (key in held[one])
    assert index.num_keys == len(set().union(*held.values()))
    for one in workers:
        index.forget(one)
    assert index.num_keys == 0
