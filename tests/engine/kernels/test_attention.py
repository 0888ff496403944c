from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.kernels.attention import SPLIT_FIELDS, TILE, SplitPlanner, Splits, decode_attention
from tests.engine.kernels.bounds import Maker, check

RAGGED = (1, 63, 64, 65, 200, 1)
UNWRITTEN = -77.0


@given(
    context_lens=st.lists(st.one_of(st.integers(1, 300), st.integers(1, 200_000)), min_size=1, max_size=70),
    num_kv_heads=st.sampled_from([1, 2, 3, 8, 32]),
    num_multiprocessors=st.integers(1, 150),
    block_size=st.sampled_from([8, 16, 32, 64, 128]),
)
def test_splits_cover_each_context_once(
    context_lens: list[int], num_kv_heads: int, num_multiprocessors: int, block_size: int
) -> None:
    planner = SplitPlanner(num_kv_heads=num_kv_heads, num_multiprocessors=num_multiprocessors, block_size=block_size)
    table, starts = planner.cut(np.array(context_lens))
    assert table.dtype == starts.dtype == np.int32
    assert table.shape == (starts[-1], SPLIT_FIELDS)
    assert starts[0] == 0
    assert len(table) <= planner.max_splits(len(context_lens))
    first_block = 0
    for row, context in enumerate(context_lens):
        splits = table[starts[row] : starts[row + 1]].tolist()
        assert splits
        assert [split[0] for split in splits] == [row] * len(splits)
        edges = [0, *(split[2] for split in splits)]
        assert [split[1] for split in splits] == edges[:-1]
        assert edges[-1] == context
        assert all(start < stop for start, stop in itertools.pairwise(edges))
        assert all(edge % TILE == 0 for edge in edges[:-1])
        assert {split[3] for split in splits} == {first_block}
        assert {split[4] for split in splits} == {int(len(splits) == 1)}
        first_block += -(-context // block_size)


def test_a_long_context_among_short_ones_is_cut_more_often() -> None:
    planner = SplitPlanner(num_kv_heads=1, num_multiprocessors=100, block_size=16)
    _, starts = planner.cut(np.array([64] * 8 + [100_000]))
    assert np.diff(starts)[:8].tolist() == [1] * 8
    assert starts[-1] - 8 > 50


class Case:
    """A cache, a question a sequence, and what the answers are by definition."""

    def __init__(
        self, make: Maker, context_lens: tuple[int, ...], block_size: int, *, slots_first: bool = True
    ) -> None:
        self.make, self.context_lens, self.block_size = make, context_lens, block_size
        self.num_blocks = sum(-(-context // block_size) for context in context_lens)
        self._slots_first = slots_first

    def fill(self, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        num_slots = (self.num_blocks + 3) * self.block_size
        if self._slots_first:
            self.cache = self.make.normal(2, num_slots, num_kv_heads, head_dim).transpose(1, 2)
        else:
            self.cache = self.make.normal(2, num_kv_heads, num_slots, head_dim)
        heads = self.make.normal(len(self.context_lens), num_heads + 2 * num_kv_heads, head_dim)
        self.q = heads[:, :num_heads]  # rows lie apart, as they do behind the projection
        self.block_ids = self.make.order(self.num_blocks + 3)[: self.num_blocks]

    def attend(self, planner: SplitPlanner, num_unused: int = 0) -> torch.Tensor:
        """The kernel's answer; num_unused rows of padding behind, as in a recorded step."""
        num_rows, device = len(self.context_lens), self.q.device
        table, starts = planner.cut(np.array(self.context_lens))
        whole = np.full((planner.max_splits(num_rows + num_unused), SPLIT_FIELDS), -1, np.int32)
        whole[: len(table)] = table
        ends = np.pad(starts, (0, num_unused), mode="edge")
        splits = Splits(torch.from_numpy(whole).to(device), torch.from_numpy(ends).to(device), self.block_ids)
        q = torch.cat((self.q, self.q[:1].expand(num_unused, -1, -1))) if num_unused else self.q
        out = torch.full((num_rows + num_unused, self.q[0].numel()), UNWRITTEN, dtype=self.q.dtype, device=device)
        decode_attention(q, self.cache, splits, self.block_size, out)
        assert bool((out[num_rows:] == UNWRITTEN).all())
        return out[:num_rows]

    def by_definition(self) -> torch.Tensor:
        """In float64, sequence by sequence."""
        out, first_block = [], 0
        groups = self.q.shape[1] // self.cache.shape[1]
        for row, context in enumerate(self.context_lens):
            token = torch.arange(context, device=self.q.device)
            blocks = self.block_ids[first_block + token // self.block_size].long()
            slots = blocks * self.block_size + token % self.block_size
            keys, values = self.cache[:, :, slots].double().repeat_interleave(groups, dim=1)
            scores = (keys @ self.q[row].double()[:, :, None]).squeeze(-1) / self.q.shape[2] ** 0.5
            out.append((torch.softmax(scores, dim=-1)[:, None] @ values).flatten())
            first_block += -(-context // self.block_size)
        return torch.stack(out)


def planner_for(case: Case, target: int) -> SplitPlanner:
    """One that wants about so many splits in all."""
    return SplitPlanner(num_kv_heads=1, num_multiprocessors=target, block_size=case.block_size)


@pytest.mark.parametrize(
    ("head_dim", "num_heads", "num_kv_heads"),
    [(64, ratio * 2, 2) for ratio in range(1, 9)]
    + [(head_dim, num_heads, 2) for head_dim in (80, 96, 128, 256) for num_heads in (6, 16)],
)
def test_attention_is_its_definition(
    device: torch.device, dtype: torch.dtype, head_dim: int, num_heads: int, num_kv_heads: int
) -> None:
    case = Case(Maker(device, dtype), (130, 1, 70), 16)
    case.fill(num_heads, num_kv_heads, head_dim)
    check(case.attend(planner_for(case, 1)), case.by_definition())


@pytest.mark.parametrize("target", [1, 4, 50], ids=["few splits", "some splits", "many splits"])
@pytest.mark.parametrize("block_size", [8, 16, 64, 128])
def test_ragged_contexts_are_cut_in_any_way(
    device: torch.device, dtype: torch.dtype, block_size: int, target: int
) -> None:
    case = Case(Maker(device, dtype), RAGGED, block_size, slots_first=target != 4)
    case.fill(4, 2, 64)
    check(case.attend(planner_for(case, target)), case.by_definition())


def test_more_splits_than_one_turn_of_the_merge_takes(device: torch.device, dtype: torch.dtype) -> None:
    case = Case(Maker(device, dtype), (64 * 37, 5), 64)
    case.fill(2, 1, 64)
    planner = planner_for(case, 50)
    assert planner.cut(np.array(case.context_lens))[1].tolist() == [0, 37, 38]
    check(case.attend(planner), case.by_definition())


def test_scores_far_from_zero_do_not_overflow(device: torch.device, dtype: torch.dtype) -> None:
    case = Case(Maker(device, dtype), (300, 64, 2), 16)
    case.fill(2, 1, 64)
    case.q *= 40.0
    found = case.attend(planner_for(case, 8))
    assert bool(torch.isfinite(found).all())
    check(found, case.by_definition())


def test_rows_without_a_sequence_are_left_alone(device: torch.device, dtype: torch.dtype) -> None:
    case = Case(Maker(device, dtype), (90, 3, 260), 16)
    case.fill(4, 2, 64)
    check(case.attend(planner_for(case, 4), num_unused=5), case.by_definition())
