import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.block_hash import HASH_BYTES, block_hashes, root_hash

tokens = st.lists(st.integers(0, 2**31 - 1), max_size=80)


@settings(deadline=None)
@given(token_ids=tokens, block_size=st.sampled_from([1, 8, 16]))
def test_blocks_are_chained_from_the_root(token_ids: list[int], block_size: int) -> None:
    parent = root_hash("model", "float32", block_size)
    expected = []
    for start in range(0, len(token_ids) // block_size * block_size, block_size):
        packed = b"".join(token.to_bytes(4, "little") for token in token_ids[start : start + block_size])
        parent = xxhash.xxh3_128_digest(parent + packed)
        expected.append(parent)
    assert block_hashes(token_ids, block_size, root_hash("model", "float32", block_size)) == expected


@settings(deadline=None)
@given(token_ids=tokens, more=tokens)
def test_more_tokens_leave_the_first_hashes_as_they_are(token_ids: list[int], more: list[int]) -> None:
    before = block_hashes(token_ids, 8, b"root")
    assert block_hashes(token_ids + more, 8, b"root")[: len(before)] == before


@settings(deadline=None)
@given(token_ids=st.lists(st.integers(0, 1000), min_size=32, max_size=32), place=st.integers(0, 31))
def test_a_changed_token_changes_its_block_and_all_after(token_ids: list[int], place: int) -> None:
    changed = [token + (index == place) for index, token in enumerate(token_ids)]
    pairs = zip(block_hashes(token_ids, 8, b"root"), block_hashes(changed, 8, b"root"), strict=True)
    assert [one == other for one, other in pairs] == [block < place // 8 for block in range(4)]


def test_the_bytes_that_are_hashed_never_change() -> None:
    packed = b"parent" + (5).to_bytes(4, "little") + (70_000).to_bytes(4, "little")
    (found,) = block_hashes([5, 70_000], 2, b"parent")
    assert found == xxhash.xxh3_128_digest(packed)
    assert len(found) == HASH_BYTES
    assert root_hash("m", "float32", 16, "salt").hex() == "82502b869521c7b35f843082e2811a88"


@pytest.mark.parametrize(
    "other", [("x", "float32", 16, ""), ("m", "bfloat16", 16, ""), ("m", "float32", 8, ""), ("m", "float32", 16, "s")]
)
def test_roots_differ_where_kv_must_not_be_shared(other: tuple[str, str, int, str]) -> None:
    assert root_hash(*other) != root_hash("m", "float32", 16)


def test_parts_of_the_root_do_not_run_into_each_other() -> None:
    assert root_hash("ab", "c", 16) != root_hash("a", "bc", 16)
