from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_transfer.layout import KVLayout

ONE = KVLayout("m", num_layers=2, block_size=16, num_kv_heads=8, head_dim=64, dtype="bfloat16")


def ranks(num_heads: int, size: int) -> list[KVLayout]:
    return [replace(ONE, num_kv_heads=num_heads, tp_rank=rank, tp_size=size) for rank in range(size)]


def heads_of(layout: KVLayout) -> list[int]:
    """The heads of a rank, from the definition: ranks share heads out in order, or heads share ranks out."""
    heads, size = layout.num_kv_heads, layout.tp_size
    if size > heads:
        return [head for head in range(heads) for _ in range(size // heads)][layout.tp_rank :][:1]
    return list(range(heads))[layout.tp_rank * (heads // size) :][: heads // size]


def assert_every_head_arrives_once(num_heads: int, senders: int, receivers: int) -> None:
    for there in ranks(num_heads, receivers):
        got: list[int | None] = [None] * there.num_local_heads
        for here in ranks(num_heads, senders):
            for part in here.slices_to(there):
                assert part.num_heads > 0
                for step in range(part.num_heads):
                    assert got[part.other_first + step] is None, "a head came twice"
                    got[part.other_first + step] = heads_of(here)[part.first + step]
        assert got == heads_of(there)


@pytest.mark.parametrize("num_heads", [1, 2, 3, 4, 6, 8, 12])
def test_every_head_arrives_exactly_once_for_all_small_sizes(num_heads: int) -> None:
    sizes = [size for size in range(1, 25) if num_heads % size == 0 or size % num_heads == 0]
    for senders in sizes:
        for receivers in sizes:
            assert_every_head_arrives_once(num_heads, senders, receivers)


@settings(deadline=None, max_examples=50)
@given(
    num_heads=st.integers(1, 32),
    sender=st.tuples(st.booleans(), st.integers(1, 4)),
    receiver=st.tuples(st.booleans(), st.integers(1, 4)),
)
def test_every_head_arrives_exactly_once(num_heads: int, sender: tuple[bool, int], receiver: tuple[bool, int]) -> None:
    def size(more_ranks: bool, factor: int) -> int:
        divisors = [d for d in range(1, num_heads + 1) if num_heads % d == 0]
        return num_heads * factor if more_ranks else divisors[factor % len(divisors)]

    assert_every_head_arrives_once(num_heads, size(*sender), size(*receiver))


def test_copies_of_a_head_share_the_sending() -> None:
    busy = [any(here.slices_to(there) for there in ranks(2, 8)) for here in ranks(2, 4)]
    assert all(busy), "of two ranks with the same head, neither may send everything"


def test_equal_layouts_send_all_heads_in_place() -> None:
    (part,) = ONE.slices_to(ONE)
    assert (part.first, part.other_first, part.num_heads) == (0, 0, 8)


def test_bytes_count_key_and_value_of_the_local_heads() -> None:
    assert ONE.bytes_per_token_layer == 2 * 8 * 64 * 2
    assert replace(ONE, tp_size=4).bytes_per_token_layer == 2 * 2 * 64 * 2
    assert replace(ONE, tp_size=16, dtype="float32").bytes_per_token_layer == 2 * 1 * 64 * 4


def test_differences_name_the_field_and_both_values() -> None:
    other = replace(ONE, block_size=32, dtype="float16", tp_size=2)
    assert ONE.differences(other) == [
        "block_size is 16 here and 32 there",
        "dtype is bfloat16 here and float16 there",
    ]
    assert ONE.differences(ONE) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_layers": 0}, "num_layers"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"tp_rank": 2, "tp_size": 2}, "tp_rank"),
        ({"tp_size": 3}, "cannot be shared by 3 ranks"),
        ({"tp_size": 12}, "cannot be shared by 12 ranks"),
    ],
)
def test_impossible_layouts_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(ONE, **fields)


def test_the_wire_form_keeps_everything() -> None:
    layout = replace(ONE, tp_rank=3, tp_size=4)
    assert KVLayout.from_proto(layout.to_proto()) == layout
